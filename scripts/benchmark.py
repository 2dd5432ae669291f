#!/usr/bin/env python
"""Time, memory and accuracy of a training step through the equilibrium layer, side by side with its peers.

    python scripts/benchmark.py data-bin/wikitext-2 --path checkpoint_last.pt --tokens 64 --out benchmark

One step is the forward solve, one evaluation of f with its graph, the backward solve and the gradients of
the layer's parameters; softmax and optimizer are left out, and so is dropout. Every method has the same f,
weights, text, memory, tolerance and budgets. The methods take turns, so that a busy machine slows all of them
alike: times are medians, ratios medians of the ratios within a turn. TorchDEQ's rows need
`pip install --no-deps torchdeq`. OUT.json and OUT.png are written beside the table that is printed.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, tasks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fairseq_deq  # noqa: F401  (registers the models)
from fairseq_deq import implicit
from fairseq_deq.implicit import Equilibrium, GradientConfig, SolveStats, fixed_point
from fairseq_deq.jacobian import spectral_radius
from fairseq_deq.models import deq_decoder
from fairseq_deq.modules.trellis_cell import TrellisCell
from fairseq_deq.solvers import SolverConfig

try:
    import torchdeq
except ImportError:
    torchdeq = None

Map = Callable[[Tensor], Tensor]
Method = Callable[[Map, Tensor], Tensor]  # f, z0 -> the state, with its graph

# ---------------------------------------------------------------------- what is measured in a step


@dataclass
class Phase:
    """The forward or the backward solve of one step."""

    seconds: float = 0.0
    inside: float = 0.0  # seconds of those spent in f or in products with its Jacobian
    calls: int = 0
    share: float = 0.0  # evaluations, each weighted by the share of the positions it was made at
    state: Tensor | None = None


@dataclass
class Probe:
    """Measures what happens in the solves of one step."""

    size: int  # numbers in the state
    phases: dict[str, Phase] = field(default_factory=lambda: {"f": Phase(), "b": Phase()})
    current: Phase | None = None
    depth: int = 0
    backward: bool = False
    final: Tensor | None = None  # what the method returned

    def solver(self, solve: Callable[..., Any], state: Callable[[Any], Tensor]) -> Callable[..., Any]:
        """`solve`, timed as the solve of the phase that the step is in."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.current = self.phases["b" if self.backward else "f"]
            synchronize()
            begin = time.perf_counter()
            result = solve(*args, **kwargs)
            synchronize()
            self.current.seconds += time.perf_counter() - begin
            self.current.state, self.current = state(result).detach(), None
            return result

        return timed

    def evaluation(self, f: Callable[..., Any], numbers: Callable[..., int]) -> Callable[..., Any]:
        """`f`, timed as work inside f where a solve asks for it; `numbers` of its arguments are evaluated."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            phase = self.current
            if phase is None or self.depth:
                return f(*args, **kwargs)
            self.depth += 1
            begin = time.perf_counter()
            result = f(*args, **kwargs)
            synchronize()
            phase.inside += time.perf_counter() - begin
            self.depth -= 1
            phase.calls += 1 if numbers(*args) else 0
            phase.share += numbers(*args) / self.size
            return result

        return timed


class ProbedMap:
    """f or its adjoint, whole or at some positions, under a probe; it offers what the map offers."""

    def __new__(cls, f: Any, probe: Probe) -> ProbedMap:
        offered = [kind for kind in (_Restricting, _Adjoining, _Recurring) if hasattr(f, kind.offers)]
        return super().__new__(type("ProbedMap", (*offered, cls), {}))

    def __init__(self, f: Any, probe: Probe) -> None:
        self.probe, self.f = probe, f
        self.call = probe.evaluation(f, Tensor.numel)

    def __call__(self, z: Tensor) -> Tensor:
        return self.call(z)


class _Restricting:
    offers = "restrict"

    def restrict(self: Any, *args: Any) -> Callable[..., Any]:
        restricted = self.probe.evaluation(self.f.restrict, lambda *_: 0)(*args)
        return self.probe.evaluation(restricted, Tensor.numel)


class _Adjoining:
    offers = "adjoint"

    def adjoint(self: Any, *args: Any) -> ProbedMap:
        return ProbedMap(self.f.adjoint(*args), self.probe)


class _Recurring:
    offers = "column"

    @property
    def own(self: Any) -> int:
        return self.f.own

    @property
    def order(self: Any) -> Any:
        return self.f.order

    def start(self: Any, *args: Any) -> Tensor:
        return self.f.start(*args)

    def column(self: Any, *args: Any) -> Callable[..., Any]:
        column = self.probe.evaluation(self.f.column, lambda *_: 0)(*args)
        return self.probe.evaluation(column, Tensor.numel)


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Attributes of a module or an object, changed for a while."""
    old = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in old.items():
            setattr(owner, name, value)


def synchronize() -> None:
    """Wait for the GPU, if there is one in use."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---------------------------------------------------------------------- the layer and one step through it


@dataclass
class Layer:
    """The layer of a trained model at one segment of text.

    Attributes:
        decoder: the model's decoder, whose embeddings are frozen.
        tokens: the segment, (B, T).
        memory: what the segments before it left.
        weighting: the gradient of the loss with respect to the output of the layer, (B, T, C).
    """

    decoder: Any
    tokens: Tensor
    memory: Any
    weighting: Tensor | None = None

    def parameters(self) -> list[Tensor]:
        return [*self.decoder.cell.parameters(), *self.decoder.injection.parameters()]

    def step(self, method: Method, probe: Probe | None = None) -> list[Tensor]:
        """One training step; the gradients of the layer's parameters."""

        def solved(f: Map, z0: Tensor, *_: Any) -> Equilibrium:
            state = method(f if probe is None else ProbedMap(f, probe), z0)
            if probe is not None:
                probe.final = state.detach()
            return Equilibrium(state, None, SolveStats.empty(z0.device), SolveStats.empty(z0.device))

        with replaced(deq_decoder, fixed_point=solved):
            x, _ = self.decoder.extract_features(self.tokens, memory=self.memory)
        if probe is not None:
            probe.backward = True
        return list(torch.autograd.grad((x * self.weighting).sum(), self.parameters()))

    def bound(self) -> tuple[Map, Tensor]:
        """f and the start of a solve."""
        found: list[tuple[Map, Tensor]] = []

        def spy(f: Map, z0: Tensor, *_: Any) -> Equilibrium:
            found.append((f, z0))
            return Equilibrium(z0, None, SolveStats.empty(z0.device), SolveStats.empty(z0.device))

        with replaced(deq_decoder, fixed_point=spy):
            self.decoder.extract_features(self.tokens, memory=self.memory)
        return found[0]


def load_layer(args: argparse.Namespace) -> tuple[Layer, Layer]:
    """The layer at real text, in float32 and in float64."""
    state = checkpoint_utils.load_checkpoint_to_cpu(args.path, {})
    cfg = state["cfg"]
    cfg.task._name, cfg.task.data, cfg.task.tokens_per_sample = "language_modeling", args.data, args.tokens
    task = tasks.setup_task(cfg.task)
    task.load_dataset(args.split)
    cfg.model.mem_len, cfg.model.subseq_len, cfg.model.pretrain_steps = args.memory, 0, 0
    model = task.build_model(cfg.model, from_checkpoint=True)
    model.load_state_dict(state["model"], strict=True, model_cfg=cfg.model)
    decoder = model.decoder.eval().to(args.device)
    decoder.embed_tokens.requires_grad_(False)
    blocks = task.datasets[args.split]
    text = torch.cat([torch.as_tensor(blocks[i]["source"]) for i in range(len(blocks))])
    before = -(-args.memory // args.tokens)
    needed = args.batch * (before + 1) * args.tokens + 1
    if len(text) < needed:
        sys.exit(
            f"--split {args.split} has {len(text)} tokens, and {needed} are needed; lower --batch or --tokens"
        )
    rows = text[: len(text) // args.batch * args.batch].view(args.batch, -1).to(args.device)
    memory = None
    for k in range(before):
        with torch.no_grad():
            _, extra = decoder.extract_features(
                rows[:, k * args.tokens : (k + 1) * args.tokens], memory=memory
            )
        memory = extra["memory"]
    begin = before * args.tokens
    layer = Layer(decoder, rows[:, begin : begin + args.tokens], memory)
    with torch.no_grad():
        x, _ = decoder.extract_features(layer.tokens, memory=memory)
    x.requires_grad_()
    targets = rows[:, begin + 1 : begin + args.tokens + 1]
    layer.weighting = torch.autograd.grad(_loss(decoder, x, targets), x)[0]
    double = None
    if memory is not None:
        double = replace(memory, state=memory.state.double(), injection=memory.injection.double())
    exact = Layer(copy.deepcopy(decoder).double(), layer.tokens, double, layer.weighting.double())
    return layer, exact


def _loss(decoder: Any, x: Tensor, targets: Tensor) -> Tensor:
    if decoder.adaptive_softmax is None:
        logits = decoder.output_layer(x).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, targets.flatten())
    outputs, clusters = decoder.adaptive_softmax(x, targets.flatten())
    pairs = [(o, t) for o, t in zip(outputs, clusters) if t is not None]
    return sum(torch.nn.functional.cross_entropy(o, t, reduction="sum") for o, t in pairs) / targets.numel()


# ---------------------------------------------------------------------- the methods


def our_method(solver: SolverConfig, gradient: GradientConfig) -> Method:
    """A solve and a gradient of this package."""
    return lambda f, z0: fixed_point(f, z0, solver, gradient).state


def stack(layers: int, checkpointed: bool) -> Method:
    """A stack of tied layers with ordinary gradients."""

    def run(f: Map, z: Tensor) -> Tensor:
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
        self.f = getattr(f, "f", f)

    def __call__(self, z: Tensor) -> Tensor:
        f = self.f
        i, o, g, forget = f.gates(z).chunk(4, -1)
        added, forget, cell = i.sigmoid() * g.tanh(), forget.sigmoid(), f.past.cell[:, 0]
        cells = []
        for t in range(f.length):
            cell = forget[:, t] * cell + added[:, t]
            cells.append(cell)
        cell = torch.stack(cells, 1)
        return torch.cat([o.sigmoid() * cell.tanh(), cell], -1)


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

    def __call__(self, f: Map, z0: Tensor) -> Tensor:
        return self.deq(f, z0)[0][-1]


def trellis_methods(args: argparse.Namespace) -> dict[str, Any]:
    """What only TrellisNets offer, the solves of their paper, and the stack that it compares with."""
    forward = SolverConfig(scope="recurrence", memory=2, max_evals=args.f_thres, rtol=args.rtol, atol=0.0)
    backward = replace(forward, max_evals=args.b_thres)
    found: dict[str, Any] = {}
    for solver, memory in (("anderson", 2), ("anderson", 5), ("broyden", 0), ("picard", 0)):
        pair = (replace(config, solver=solver, memory=memory) for config in (forward, backward))
        name = f"{solver} {memory}".removesuffix(" 0") + "+ift, position after position"
        found[name] = our_method(next(pair), GradientConfig(solver=next(pair)))
    whole = replace(forward, solver="broyden", scope="batch", memory=0)
    found["broyden+ift, whole batch"] = our_method(
        whole, GradientConfig(solver=replace(whole, max_evals=args.b_thres))
    )
    sweep = replace(forward, scope="sample", memory=6)
    gradient = GradientConfig(solver=replace(sweep, max_evals=args.b_thres, memory=8))
    found["anderson+ift, cells scanned, sample scope"] = lambda f, z0: (
        fixed_point(ScannedCells(f), z0, sweep, gradient).state
    )
    found["stack of 40"] = stack(40, False)
    return found


def methods(args: argparse.Namespace, layer: Layer) -> dict[str, Any]:
    """All methods by name."""
    forward = SolverConfig(max_evals=args.f_thres, rtol=args.rtol, atol=0.0)
    backward = SolverConfig(max_evals=args.b_thres, memory=5, rtol=args.rtol, atol=0.0)
    loose = args.rtol * args.lane_factor
    sample = {"scope": "sample", "memory": 0}
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
            replace(forward, solver="broyden", **sample),
            GradientConfig(solver=replace(backward, solver="broyden", **sample)),
        ),
        "anderson+shine5": (forward, GradientConfig("shine", backward, refine=5)),
        "anderson+phantom5": (forward, GradientConfig("phantom", backward, steps=5)),
        "anderson+jfb": (forward, GradientConfig("jfb", backward)),
    }
    found: dict[str, Any] = {name: our_method(*pair) for name, pair in ours.items()}
    if torchdeq is not None:
        found |= {
            "torchdeq broyden+ift": TorchDEQ(args, "broyden", ift=True),
            "torchdeq anderson+ift": TorchDEQ(args, "anderson", ift=True),
            "torchdeq broyden+phantom5": TorchDEQ(args, "broyden", grad=5, tau=1.0),
        }
    else:
        print("torchdeq is not installed: its rows are left out (pip install --no-deps torchdeq)")
    if isinstance(layer.decoder.cell, TrellisCell):
        found = trellis_methods(args) | found
    for layers in (12, 24):
        for checkpointed in (False, True):
            name = f"stack of {layers}" + (", checkpointed" if checkpointed else "")
            found[name] = stack(layers, checkpointed)
    return found


# ---------------------------------------------------------------------- measurements


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


def peak_memory(layer: Layer, method: Method) -> float:
    """MiB allocated at the peak of one step, over what there was before it."""
    if layer.tokens.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        layer.step(method)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        layer.step(method)
    events = recorded.profiler.kineto_results.events()
    level = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak / 2**20


def residuals(layer: Layer, method: Method, probe: Probe) -> dict[str, float]:
    """How far from solved both systems were left: of the worst sample, and of the worst position."""
    f, _ = layer.bound()
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
        (grad,) = torch.autograd.grad((layer.decoder.cell.output(leaf) * layer.weighting).sum(), leaf)
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
    with torch.no_grad():
        near = fixed_point(*layer.bound(), SolverConfig(max_evals=200), GradientConfig()).state
    forward = SolverConfig(max_evals=500, rtol=1e-10, atol=0.0, memory=5)
    backward = SolverConfig(max_evals=500, rtol=1e-9, atol=0.0, memory=8)
    probe = Probe(1)
    gradient = GradientConfig(solver=backward)
    gradients = exact.step(lambda f, _: fixed_point(f, near.double(), forward, gradient).state, probe)
    z = probe.final
    f, _ = exact.bound()
    with torch.no_grad():
        sample, position = _relative(f(z) - z, z)
    print(f"truth: residual {sample:.1e} of the worst sample, {position:.1e} of the worst position")
    radius = spectral_radius(f, z).value  # the blocks of single positions: the spectrum is theirs together
    print(f"spectral radius: {radius.max():.2f} at the worst position, {radius.mean():.2f} on average")
    return gradients


def gradient_error(gradients: list[Tensor], truth: list[Tensor]) -> float:
    """|g - g*| / |g*| over all parameters of the layer."""
    difference = sum((g.double() - t).pow(2).sum() for g, t in zip(gradients, truth))
    return (difference / sum(t.pow(2).sum() for t in truth)).sqrt().item()


def measure(args: argparse.Namespace, layer: Layer, truth: list[Tensor]) -> dict[str, dict[str, float]]:
    """A row of figures for each method."""
    runs = {name: m for name, m in methods(args, layer).items() if not args.only or name in args.only}
    size = layer.bound()[1].numel()
    rows: dict[str, dict[str, float]] = {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    parts: dict[str, list[Probe]] = {name: [] for name in runs}
    for name, method in runs.items():  # not timed: it also warms up
        _, probe, gradients = probed_step(layer, method, size)
        rows[name] = {"gradient_error": gradient_error(gradients, truth)}
        rows[name] |= residuals(layer, method, probe)
        rows[name]["peak_mib"] = peak_memory(layer, method)
    for _ in range(args.rounds):
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


# ---------------------------------------------------------------------- output

COLUMNS = {  # column -> (its key, its format)
    "step ms": ("step_ms", ".0f"),
    "ratio": ("ratio", ".2f"),
    "fwd ms": ("f_ms", ".0f"),
    "bwd ms": ("b_ms", ".0f"),
    "evals f": ("f_evaluations", ".0f"),
    "evals b": ("b_evaluations", ".0f"),
    "lane f": ("f_lane_evaluations", ".1f"),
    "lane b": ("b_lane_evaluations", ".1f"),
    "res f": ("f_sample", ".1e"),
    "worst pos. f": ("f_position", ".1e"),
    "res b": ("b_sample", ".1e"),
    "worst pos. b": ("b_position", ".1e"),
    "in f": ("inside_f", ".0%"),
    "peak MiB": ("peak_mib", ".0f"),
    "grad error": ("gradient_error", ".1e"),
}


def table(rows: dict[str, dict[str, float]]) -> str:
    """The rows in Markdown."""
    lines = ["| method | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in rows.items():
        cells = [format(row[key], form) if key in row else "" for key, form in COLUMNS.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """Bars of the step, divided into its parts."""
    import matplotlib

    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 0.4 * len(rows) + 1.2), layout="constrained")
    names = list(rows)[::-1]
    left = [0.0] * len(names)
    rest = {n: rows[n]["step_ms"] - rows[n]["f_ms"] - rows[n]["b_ms"] for n in names}
    for label, values in (
        ("forward solve", [rows[n]["f_ms"] for n in names]),
        ("backward solve", [rows[n]["b_ms"] for n in names]),
        ("the rest of the step", [rest[n] for n in names]),
    ):
        axis.barh(names, values, left=left, label=label)
        left = [a + b for a, b in zip(left, values)]
    axis.set_xlabel("ms a step")
    axis.set_title(title, fontsize="medium")
    axis.legend()
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="folder made by fairseq-preprocess")
    parser.add_argument("--path", required=True, help="checkpoint of a model of this package")
    parser.add_argument("--split", default="valid", help="text to take the segment from")
    parser.add_argument("--tokens", type=int, default=64, help="positions of the segment")
    parser.add_argument("--memory", type=int, help="positions remembered before it; default: as --tokens")
    parser.add_argument("--batch", type=int, default=16, help="rows")
    parser.add_argument("--rtol", type=float, default=1e-3, help="relative tolerance of both solves")
    parser.add_argument(
        "--lane-factor",
        type=float,
        default=1.5,
        help="one row has lanes this factor looser, so that its samples, not its positions, meet --rtol",
    )
    parser.add_argument("--f-thres", type=int, default=60, help="evaluations of f at most")
    parser.add_argument("--b-thres", type=int, default=60, help="vector-Jacobian products at most")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each method")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0: its default")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", action="append", help="a row to measure, by name; may be repeated")
    parser.add_argument("--reference", default="torchdeq broyden+ift", help="the row that ratios refer to")
    parser.add_argument("--out", default="benchmark", help="where to write OUT.json and OUT.png")
    args = parser.parse_args()
    args.memory = args.tokens if args.memory is None else args.memory
    for name in ("tokens", "batch", "f_thres", "b_thres", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    layer, exact = load_layer(args)
    truth = true_gradients(layer, exact)
    rows = measure(args, layer, truth)
    title = (
        f"{Path(args.path).parent.name}: {args.batch} x {args.tokens} tokens, memory {args.memory}, "
        f"tolerance {args.rtol:g}, {args.device}, {torch.get_num_threads()} threads"
    )
    print(f"{title}; ratios to {args.reference!r}\n\n{table(rows)}")
    out = Path(args.out)
    out.with_suffix(".json").write_text(json.dumps({"arguments": vars(args), "rows": rows}, indent=1))
    plot(rows, title, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
