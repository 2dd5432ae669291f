"""The ways to take a training step that the benchmark sets side by side."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...implicit import GradientConfig, fixed_point
from ...solvers import Preconditioner, Recurrent, SolverConfig, direction_of
from ..probe import Probe, ProbedMap
from .layer import InSubsequences, Layer, Map, Method

try:
    import torchdeq
except ImportError:
    torchdeq = None


def our_method(solver: SolverConfig, gradient: GradientConfig) -> Method:
    """A solve and a gradient of this package."""
    return lambda f, z0, known: fixed_point(f, z0, solver, gradient, preconditioner=known).state


def without(method: Method, *parts: str) -> Method:
    """The method without some of what makes it fast: `preconditioner`, `start` or `order`."""

    def run(f: Map, z0: Tensor, known: Preconditioner | None) -> Tensor:
        if "order" in parts:
            f = _unordered(f)
        z0 = torch.zeros_like(z0) if "start" in parts else z0
        return method(f, z0, None if "preconditioner" in parts else known)

    return run


def _unordered(f: Any) -> Any:
    """f, and its adjoint, without word of which positions come first, so that no lane is final early."""
    if direction_of(f) == 0:
        return f
    silent = object.__new__(type(f))
    vars(silent).update(vars(f), direction=0)
    if hasattr(f, "adjoint"):
        silent.adjoint = lambda *arguments: _unordered(f.adjoint(*arguments))
    return silent


def stack(layers: int, checkpointed: bool) -> Method:
    """A stack of tied layers with ordinary gradients."""

    def run(f: Map, z0: Tensor, known: Preconditioner | None) -> Tensor:
        z = torch.zeros_like(z0)
        for _ in range(layers):
            z = checkpoint(f, z, use_reentrant=False) if checkpointed else f(z)
        return z

    return run


class ScannedCells:
    """f of a TrellisNet with its cell states scanned: a sweep in time for all positions, same fixed points.

    The gates come from h as in f, then c_t = sigma(f_t) * c_{t-1} + sigma(i_t) * tanh(g_t) is run through the
    segment: a quasi-Newton step that inverts what is diagonal in the coupling of positions.
    Source: Lim et al. (2023, arXiv 2309.12252); Gonzalez et al. (2024, arXiv 2407.19115).
    """

    def __init__(self, f: Any) -> None:
        self.f = f

    def __call__(self, z: Tensor) -> Tensor:
        segment = self.f.segment
        i, o, g, forget = segment.gates(z).chunk(4, -1)
        added, forget, cell = i.sigmoid() * g.tanh(), forget.sigmoid(), segment.context.cell[:, 0]
        cells = []
        for t in range(segment.length):
            cell = forget[:, t] * cell + added[:, t]
            cells.append(cell)
        cell = torch.stack(cells, 1)
        return torch.cat([o.sigmoid() * cell.tanh(), cell], -1)


def scanned(f: Any) -> Map:
    """`ScannedCells` of f, under its probe if it has one."""
    return ProbedMap(ScannedCells(f.f), f.probe) if isinstance(f, ProbedMap) else ScannedCells(f)


class TorchDEQ:
    """A solve and a gradient of TorchDEQ 0.1.0, its solvers under the probe of the step that runs."""

    probe: Probe | None = None

    def __init__(self, args: argparse.Namespace, solver: str, **options: Any) -> None:
        plain = torchdeq.solver.get_solver(solver)

        def probed(*arguments: Any, **keywords: Any) -> Any:
            run = plain if self.probe is None else self.probe.solver(plain, lambda result: result[0])
            return run(*arguments, **keywords)

        name = f"probed_{solver}_{id(self)}"
        torchdeq.solver.register_solver(name, probed)
        self.deq = torchdeq.get_deq(
            f_solver=name,
            b_solver=name,
            f_max_iter=args.f_thres,
            b_max_iter=args.b_thres,
            f_tol=args.rtol,
            b_tol=args.rtol,
            f_stop_mode="rel",
            b_stop_mode="rel",
            **options,
        ).train()

    def __call__(self, f: Map, z0: Tensor, known: Preconditioner | None) -> Tensor:
        return self.deq(f, torch.zeros_like(z0))[0][-1]


def recurrent_methods(args: argparse.Namespace, f: Any) -> dict[str, Any]:
    """What only recurrences offer, the solves of the paper of TrellisNets, and the stack that it has."""
    forward = SolverConfig(scope="recurrence", memory=2, max_evals=args.f_thres, rtol=args.rtol, atol=0.0)
    backward = replace(forward, max_evals=args.b_thres)
    found: dict[str, Any] = {}
    for solver, memory in (("anderson", 2), ("anderson", 5), ("broyden", 0), ("picard", 0)):
        pair = (replace(config, solver=solver, memory=memory) for config in (forward, backward))
        name = f"{solver} {memory}".removesuffix(" 0") + "+ift, position after position"
        found[name] = our_method(next(pair), GradientConfig(solver=next(pair)))
    whole = replace(forward, solver="broyden", scope="batch", memory=0)
    # What a recurrence has learned is of the channels of its own solve alone: no other scope can use it.
    found["broyden+ift, whole batch"] = without(
        our_method(whole, GradientConfig(solver=replace(whole, max_evals=args.b_thres))), "preconditioner"
    )
    sweep = replace(forward, scope="sample", memory=6)
    gradient = GradientConfig(solver=replace(sweep, max_evals=args.b_thres, memory=8))
    if hasattr(getattr(f, "segment", None), "gates"):
        found["anderson+ift, cells scanned, sample scope"] = lambda f, z0, known: (
            fixed_point(scanned(f), z0, sweep, gradient).state
        )
    chunks = replace(forward, scope="sample", memory=5)
    chunked = without(
        our_method(chunks, GradientConfig(solver=replace(chunks, max_evals=args.b_thres))), "preconditioner"
    )
    for length in (4, 16):
        found[f"anderson+ift, sample scope, {length} at a time"] = InSubsequences(chunked, length)
    found["stack of 40"] = stack(40, False)
    return found


def methods(args: argparse.Namespace, layer: Layer) -> dict[str, Any]:
    """All methods by name."""
    forward = SolverConfig(max_evals=args.f_thres, rtol=args.rtol, atol=0.0)
    backward = SolverConfig(max_evals=args.b_thres, rtol=args.rtol, atol=0.0)
    loose = args.rtol * args.lane_factor
    ours: dict[str, tuple[SolverConfig, GradientConfig]] = {
        "anderson+ift": (forward, GradientConfig(solver=backward)),
        f"anderson+ift, lanes at {loose:g}": (
            replace(forward, rtol=loose),
            GradientConfig(solver=replace(backward, rtol=loose)),
        ),
        "anderson+ift, no restarts": (replace(forward, patience=10**6), GradientConfig(solver=backward)),
        "anderson+gmres": (forward, GradientConfig(solver=replace(backward, solver="gmres", memory=0))),
        "anderson+ift, sample scope": (
            replace(forward, scope="sample", memory=6),
            GradientConfig(solver=replace(backward, scope="sample", memory=8)),
        ),
        "broyden+ift, sample scope": (
            replace(forward, solver="broyden", scope="sample", memory=0),
            GradientConfig(solver=replace(backward, solver="broyden", scope="sample", memory=0)),
        ),
        "anderson+shine5": (forward, GradientConfig("shine", backward, refine=5)),
        "anderson+phantom5": (forward, GradientConfig("phantom", backward, steps=5)),
        "anderson+jfb": (forward, GradientConfig("jfb", backward)),
    }
    found: dict[str, Any] = {name: our_method(*pair) for name, pair in ours.items()}
    if layer.decoder.solver.scope == "recurrence":
        found = {name: without(method, "preconditioner") for name, method in found.items()}
    else:
        default = found["anderson+ift"]
        for parts in (("preconditioner",), ("start",), ("order",), ("preconditioner", "start", "order")):
            found["anderson+ift, no " + ", ".join(parts)] = without(default, *parts)
    if torchdeq is not None:
        found |= {
            "torchdeq broyden+ift": TorchDEQ(args, "broyden", ift=True),
            "torchdeq anderson+ift": TorchDEQ(args, "anderson", ift=True),
            "torchdeq broyden+phantom5": TorchDEQ(args, "broyden", grad=5, tau=1.0),
        }
    else:
        print("torchdeq is not installed: its rows are left out (pip install --no-deps torchdeq)")
    f = layer.bound()[0]
    if isinstance(f, Recurrent):
        found = recurrent_methods(args, f) | found
    for layers in (12, 24):
        for checkpointed in (False, True):
            name = f"stack of {layers}" + (", checkpointed" if checkpointed else "")
            found[name] = stack(layers, checkpointed)
    return found
