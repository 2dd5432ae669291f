"""The gradient of every mode beside a nearly exact one, on one batch."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...implicit import GradientConfig
from ...solvers import SolverConfig
from ..probe import replaced
from .subject import Layer, Subject

# Options of the gradient that the others are compared with.
_EXACT_TOLERANCE, _EXACT_BUDGET = 1e-6, 150
# Tolerances of the curve of errors.
_TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5)


@dataclass(frozen=True)
class ModeGradient:
    """The gradient of one mode.

    Attributes:
        mode: its name.
        cosine: of the angle to the exact gradient; NaN where it is not finite.
        norm: its length in lengths of the exact one.
        error: |gradient - exact| / |exact|.
        seconds: of the forward and the backward pass.
        remark: why there is none, or how it was taken.
    """

    mode: str
    cosine: float
    norm: float
    error: float
    seconds: float
    remark: str = ""


@dataclass(frozen=True)
class Gradients:
    """What was found of the gradients.

    Attributes:
        modes: one a mode, the model's own first.
        by_tolerance: tolerance of both solves, and the error of `ift` there.
        own: mode of the model.
    """

    modes: list[ModeGradient]
    by_tolerance: list[tuple[float, float]]
    own: str

    def of(self, mode: str) -> ModeGradient | None:
        """The gradient of a mode, where there is one."""
        return next((m for m in self.modes if m.mode == mode and m.cosine == m.cosine), None)


def measure_gradients(subject: Subject, layer: Layer) -> Gradients:
    """Compare the modes on the layer's block.

    Args:
        subject: the model.
        layer: the layer at a block of text, of few rows.
    """
    decoder, own = subject.decoder, subject.decoder.gradient
    exact, _ = _gradient(
        subject,
        layer,
        _tight(decoder.solver),
        GradientConfig("ift", replace(_tight(own.solver), solver="anderson", memory=5)),
    )
    size = torch.linalg.vector_norm(exact)
    found = []
    for mode in dict.fromkeys((own.mode, "ift", "shine", "phantom", "jfb", "unroll")):
        try:
            gradient, seconds = _gradient(subject, layer, decoder.solver, replace(own, mode=mode))
        except ValueError as error:
            found.append(ModeGradient(mode, float("nan"), float("nan"), float("nan"), 0.0, str(error)))
            continue
        length = torch.linalg.vector_norm(gradient)
        found.append(
            ModeGradient(
                mode,
                float(torch.dot(gradient, exact) / (length * size)),
                float(length / size),
                float(torch.linalg.vector_norm(gradient - exact) / size),
                seconds,
                f"{decoder.solver.max_evals} steps from the start" if mode == "unroll" else "",
            )
        )
    curve = []
    for tolerance in _TOLERANCES:
        forward, backward = (
            replace(solver, rtol=tolerance, max_evals=_EXACT_BUDGET)
            for solver in (decoder.solver, own.solver)
        )
        gradient, _ = _gradient(subject, layer, forward, GradientConfig("ift", backward))
        curve.append((tolerance, float(torch.linalg.vector_norm(gradient - exact) / size)))
    return Gradients(found, curve, own.mode)


def _tight(solver: SolverConfig) -> SolverConfig:
    return replace(solver, rtol=_EXACT_TOLERANCE, atol=0.0, max_evals=_EXACT_BUDGET, policy="best")


def _gradient(
    subject: Subject, layer: Layer, solver: SolverConfig, gradient: GradientConfig
) -> tuple[Tensor, float]:
    """The gradient of the mean loss with respect to the layer's parameters, (P,), and its seconds."""
    decoder = subject.decoder
    parameters = [p for part in (decoder.layer, decoder.injection) for p in part.parameters()]
    begin = time.perf_counter()
    with replaced(decoder, solver=solver, gradient=gradient), torch.enable_grad():
        loss, _ = subject.loss(layer)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    seconds = time.perf_counter() - begin
    flat = [(torch.zeros_like(p) if g is None else g).flatten().double() for p, g in zip(parameters, found)]
    return torch.cat(flat), seconds


def output_gradient(subject: Subject, layer: Layer) -> Tensor:
    """dL/dz*, (B, T, C): what the backward solve starts from."""
    with torch.enable_grad():
        state = layer.state.detach().requires_grad_()
        features = subject.decoder.layer.output(state)
        loss = subject.loss_of((subject.decoder.output_layer(features), {}), layer.targets)
        return torch.autograd.grad(loss, state)[0]
