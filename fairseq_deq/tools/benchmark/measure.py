"""What a training step takes and comes to, by every method in turns."""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial

import torch
from torch import Tensor

from ... import implicit
from ...errors import OptionError
from ...implicit import GradientConfig, fixed_point
from ...jacobian import spectral_radius
from ...solvers import Recurrent, SolverConfig
from ..command import progress
from ..probe import Probe, peak_mib, replaced, synchronize
from .layer import Layer, Method
from .methods import TorchDEQ, methods


def probed_step(layer: Layer, method: Method, size: int) -> tuple[float, Probe, list[Tensor]]:
    """Seconds of one step, what its solves did, and its gradients."""
    probe = Probe(size)
    grad = probe.evaluation(torch.autograd.grad, lambda out, leaf, vector, *args: vector.numel())
    ours = {
        "solve": probe.solver(implicit.solve, lambda result: result.state),
        "solve_keeping_inverse": probe.solver(implicit.solve_keeping_inverse, lambda result: result[0].state),
    }
    synchronize()
    begin = time.perf_counter()
    with (
        replaced(implicit, **ours),
        replaced(torch.autograd, grad=grad),
        replaced(TorchDEQ, probe=probe),
    ):
        gradients = layer.step(method, probe)
    synchronize()
    return time.perf_counter() - begin, probe, gradients


def residuals(layer: Layer, method: Method, probe: Probe) -> dict[str, float]:
    """How far from solved both systems were left: of the worst sample, and of the worst position."""
    f, *_ = layer.bound()
    forward, backward = probe.phases["f"].state, probe.phases["b"].state
    z = probe.final if forward is None else forward
    found = {}
    with torch.no_grad():
        found["f_sample"], found["f_position"] = _relative(f(z) - z, f(z))
    if backward is not None:
        # TorchDEQ takes the Jacobian one evaluation further on.
        point = f(z) if isinstance(method, TorchDEQ) else z
        leaf = point.detach().requires_grad_()
        fz = f(leaf)
        (grad,) = torch.autograd.grad((layer.decoder.layer.output(leaf) * layer.weighting).sum(), leaf)
        (product,) = torch.autograd.grad(fz, leaf, backward)
        found["b_sample"], found["b_position"] = _relative(product + grad - backward, product + grad)
    return found


def _relative(difference: Tensor, size: Tensor) -> tuple[float, float]:
    by_sample = difference.flatten(1).norm(dim=1) / size.flatten(1).norm(dim=1)
    return by_sample.max().item(), (difference.norm(dim=-1) / size.norm(dim=-1)).max().item()


def true_gradients(layer: Layer, exact: Layer) -> list[Tensor]:
    """The gradients in float64, from solves far below any tolerance asked for.

    A trained layer can have several equilibria; the truth is the one that our default solve comes to.
    """
    start, z0, known = layer.bound()
    scope = "recurrence" if isinstance(start, Recurrent) else "position"
    with torch.no_grad():
        config = SolverConfig(max_evals=200, scope=scope)
        near = fixed_point(start, z0, config, GradientConfig(), preconditioner=known).state
    forward = SolverConfig(max_evals=500, rtol=1e-10, atol=0.0, memory=5, scope=scope)
    backward = SolverConfig(max_evals=500, rtol=1e-9, atol=0.0, memory=8, scope=scope)
    probe = Probe(1)
    gradient = GradientConfig(solver=backward)
    gradients = exact.step(lambda f, *_: fixed_point(f, near.double(), forward, gradient).state, probe)
    z = probe.final
    f, *_ = exact.bound()
    with torch.no_grad():
        sample, position = _relative(f(z) - z, z)
    print(f"truth: residual {sample:.1e} of the worst sample, {position:.1e} of the worst position")
    radius = spectral_radius(f, z).value  # the blocks of single positions: the spectrum is theirs together
    print(f"spectral radius: {radius.max():.2f} at the worst position, {radius.mean():.2f} on average")
    return gradients


def gradient_error(gradients: list[Tensor], truth: list[Tensor]) -> float:
    """|g - g*| / |g*| over all parameters of the layer."""
    found, true = (torch.cat([part.double().flatten() for part in parts]) for parts in (gradients, truth))
    return ((found - true).norm() / true.norm()).item()


def measure(args: argparse.Namespace, layer: Layer, truth: list[Tensor]) -> dict[str, dict[str, float]]:
    """A row of figures for each method.

    Raises:
        OptionError: `--only` names no method.
    """
    known = methods(args, layer)
    runs = {name: method for name, method in known.items() if not args.only or name in args.only}
    missing = [name for name in args.only or () if name not in known and not name.startswith("torchdeq")]
    if missing or not runs:
        names = ", ".join(repr(name) for name in known)
        raise OptionError(f"--only {(missing or args.only)[0]!r} is not a row; the rows are {names}")
    size = layer.bound()[1].numel()
    rows: dict[str, dict[str, float]] = {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    parts: dict[str, list[Probe]] = {name: [] for name in runs}
    for name, method in progress(runs.items(), "methods", len(runs)):  # not timed: it also warms up
        _, probe, gradients = probed_step(layer, method, size)
        rows[name] = {"gradient_error": gradient_error(gradients, truth)}
        rows[name] |= residuals(layer, method, probe)
        rows[name]["peak_mib"] = peak_mib(partial(layer.step, method), layer.tokens.is_cuda)
    for _ in progress(range(args.rounds), "turns"):
        for name, method in runs.items():
            seconds, probe, _ = probed_step(layer, method, size)
            times[name].append(seconds)
            parts[name].append(probe)
    base = args.reference if args.reference in runs else next(iter(runs))
    args.reference = base
    for name, row in rows.items():
        row["step_ms"] = 1e3 * statistics.median(times[name])
        row["ratio"] = statistics.median(a / b for a, b in zip(times[name], times[base]))
        for phase in ("f", "b"):
            solves = [probe.phases[phase] for probe in parts[name]]
            row[f"{phase}_ms"] = 1e3 * statistics.median(s.seconds for s in solves)
            row[f"{phase}_evaluations"] = statistics.median(s.calls for s in solves)
            row[f"{phase}_lane_evaluations"] = statistics.median(s.share for s in solves)
        spent = [sum(p.seconds for p in probe.phases.values()) for probe in parts[name]]
        inside = [sum(p.inside for p in probe.phases.values()) for probe in parts[name]]
        if min(spent) > 0:
            row["inside_f"] = statistics.median(i / s for i, s in zip(inside, spent))
    return rows
