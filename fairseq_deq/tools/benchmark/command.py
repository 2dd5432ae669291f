#!/usr/bin/env python
"""Time, memory and accuracy of a training step through the equilibrium layer, side by side with its peers.

    python scripts/benchmark.py data-bin/wikitext-2 --path checkpoint_last.pt --tokens 64 --out benchmark

One step is the forward solve, one evaluation of f with its graph, the backward solve and the gradients of
the layer's parameters; softmax and optimizer are left out, and so is dropout. Every method has the same f,
weights, text, memory, tolerance and budgets. The methods take turns, so that a busy machine slows all of them
alike: times are medians, ratios medians of the ratios within a turn. TorchDEQ's rows need
`pip install --no-deps torchdeq`. "no preconditioner", "no start" and "no order" are our default without what
the model has learned, without the learned start, and without lanes that are final as soon as all before them
are.
OUT.json and OUT.png are written beside the table that is printed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler measures memory, and need not say so

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from fairseq import utils
from step_layer import Layer, Method, load_layer
from step_methods import TorchDEQ, methods

import fairseq_deq  # noqa: F401  (registers the models)
from fairseq_deq import implicit
from fairseq_deq.implicit import GradientConfig, fixed_point
from fairseq_deq.jacobian import spectral_radius
from fairseq_deq.patches.sentences import one_sentence
from fairseq_deq.solvers import Recurrent, SolverConfig
from fairseq_deq.tools.probe import Probe, peak_mib, replaced, synchronize


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
    difference = sum((g.double() - t).pow(2).sum() for g, t in zip(gradients, truth))
    return (difference / sum(t.pow(2).sum() for t in truth)).sqrt().item()


def measure(args: argparse.Namespace, layer: Layer, truth: list[Tensor]) -> dict[str, dict[str, float]]:
    """A row of figures for each method."""
    runs = {name: m for name, m in methods(args, layer).items() if not args.only or name in args.only}
    size = layer.bound()[1].numel()
    rows: dict[str, dict[str, float]] = {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    parts: dict[str, list[Probe]] = {name: [] for name in runs}
    for i, (name, method) in enumerate(runs.items(), 1):  # not timed: it also warms up
        print(f"{i:2d} of {len(runs)}: {name}", file=sys.stderr, flush=True)
        _, probe, gradients = probed_step(layer, method, size)
        rows[name] = {"gradient_error": gradient_error(gradients, truth)}
        rows[name] |= residuals(layer, method, probe)
        rows[name]["peak_mib"] = peak_mib(partial(layer.step, method), layer.tokens.is_cuda)
    for turn in range(args.rounds):
        print(f"turn {turn + 1} of {args.rounds}", file=sys.stderr, flush=True)
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
    "fwd": ("f_ms", ".0f"),
    "bwd": ("b_ms", ".0f"),
    "nfe": ("f_evaluations", ".0f"),
    "b_nfe": ("b_evaluations", ".0f"),
    "lane": ("f_lane_evaluations", ".1f"),
    "b_lane": ("b_lane_evaluations", ".1f"),
    "res": ("f_position", ".0e"),
    "b_res": ("b_position", ".0e"),
    "in f": ("inside_f", ".0%"),
    "MiB": ("peak_mib", ".0f"),
    "error": ("gradient_error", ".0e"),
}


def table(rows: dict[str, dict[str, float]]) -> str:
    """The rows in Markdown, aligned, in less than 120 columns."""
    lines = [["method", *COLUMNS]]
    for name, row in rows.items():
        cells = [format(row[key], form) if key in row else "" for key, form in COLUMNS.values()]
        lines.append([name.replace("anderson", "and.").replace("broyden", "broy."), *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "|" + "|".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]) + "|"
        for line in lines
    )


def plot(rows: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """Time, divided into its parts, peak memory, and the error of the gradient, side by side."""
    import matplotlib

    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(rows)[::-1]
    figure, (time_axis, memory_axis, error_axis) = pyplot.subplots(
        1, 3, figsize=(13, 0.4 * len(rows) + 1.4), layout="constrained", sharey=True, width_ratios=(2, 1, 1)
    )
    left = [0.0] * len(names)
    rest = {n: rows[n]["step_ms"] - rows[n]["f_ms"] - rows[n]["b_ms"] for n in names}
    for label, values in (
        ("forward solve", [rows[n]["f_ms"] for n in names]),
        ("backward solve", [rows[n]["b_ms"] for n in names]),
        ("the rest of the step", [rest[n] for n in names]),
    ):
        time_axis.barh(names, values, left=left, label=label)
        left = [a + b for a, b in zip(left, values)]
    time_axis.set_xlabel("ms per step")
    time_axis.legend()
    memory_axis.barh(names, [rows[n]["peak_mib"] for n in names], color="tab:gray")
    memory_axis.set_xlabel("peak memory of a step, MiB")
    error_axis.barh(names, [rows[n]["gradient_error"] for n in names], color="tab:red")
    error_axis.set_xscale("log")
    error_axis.set_xlabel("relative error of the gradient")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="folder made by fairseq-preprocess")
    parser.add_argument("--user-dir", help="folder of a plugin that registers the model, if it is not ours")
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
    if args.user_dir:
        utils.import_user_module(args)
    layer, exact = load_layer(args)
    truth = true_gradients(layer, exact)
    rows = measure(args, layer, truth)
    title = (
        f"{Path(args.path).parent.name}: {args.batch} x {args.tokens} tokens, memory {args.memory}, "
        f"tolerance {args.rtol:g}, {args.device}, {torch.get_num_threads()} threads"
    )
    print(
        f"{title}; ratios to {args.reference!r}; lane: evaluations computed per position; res: relative "
        f"residual of the worst position; error: of the gradient\n\n{table(rows)}"
    )
    out = Path(args.out)
    out.with_suffix(".json").write_text(json.dumps({"arguments": vars(args), "rows": rows}, indent=1))
    plot(rows, title, out.with_suffix(".png"))


if __name__ == "__main__":
    with one_sentence():
        main()
