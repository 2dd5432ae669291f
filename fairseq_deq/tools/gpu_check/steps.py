#!/usr/bin/env python
"""Parts of scripts/gpu_check.sh: training steps at true size, what a machine can do, loss curves, one report.

    python scripts/gpu_check.py steps 700 512     # of random layers of these widths
    python scripts/gpu_check.py warm              # compiles what solves run on the device
    python scripts/gpu_check.py curves LOG...     # of fairseq-train with --log-format json
    python scripts/gpu_check.py merge             # all parts as OUT/gpu_check.json

Every part is a file in the folder PARTS that is written after each entry; entries that are there are not
measured again. DEVICE=cpu rehearses it at toy sizes.
A step is the forward solve, the backward solve and the gradients of the layer's parameters, after a memory of
as many positions; embeddings, softmax and optimizer are left out.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fairseq_deq.implicit import GradientConfig, fixed_point
from fairseq_deq.layers.transformer.layer import TransformerLayer
from fairseq_deq.layers.transformer.weights import DropoutMasks
from fairseq_deq.layers.weight_norm import Initializer
from fairseq_deq.solvers import SolverConfig, active, fused, record, solve

DEVICE = os.environ.get("DEVICE", "cuda")
OUT = Path(os.environ.get("OUT", "gpu_check"))
PARTS = Path(os.environ.get("PARTS", OUT / "parts"))
CUDA = DEVICE == "cuda"
# name -> width, feed-forward width, heads, width of a head.
SIZES = {"128": (128, 512, 4, 32), "512": (512, 2048, 8, 64), "700": (700, 48000, 10, 70)}
ROWS, TOKENS = 14, 150
if not CUDA:
    SIZES = {"128": (16, 32, 2, 8), "512": (24, 48, 2, 12), "700": (32, 96, 2, 16)}
    ROWS, TOKENS = 2, 10
    record.books_on_host = active.books_on_host = lambda device: False  # as on a device


class Part:
    """A file of results that grows."""

    def __init__(self, name: str) -> None:
        self.path = PARTS / f"{name}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def put(self, key: str, value: Any) -> None:
        """Keep an entry."""
        self.found[key] = value
        partial = self.path.with_suffix(".tmp")
        partial.write_text(json.dumps(self.found, indent=1, default=str))
        partial.replace(self.path)

    def measure(self, key: str, seconds: int, run: Callable[[], dict[str, Any]]) -> None:
        """Keep and print what `run` finds within so many seconds, or why it found nothing."""
        if "error" not in self.found.get(key, {"error": ""}):
            return
        try:
            with limited(seconds):
                entry = run()
        except Exception as error:
            entry = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        self.put(key, entry)
        text = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items())
        print(f"{key:34s} {text}", flush=True)


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after so many seconds."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"over {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def wait() -> None:
    """For the device."""
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], object], times: int = 3) -> float:
    """Median time of a call."""
    spent = []
    for _ in range(times):
        wait()
        begin = time.perf_counter()
        run()
        wait()
        spent.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(spent)


def launches(run: Callable[[], object]) -> dict[str, int]:
    """Kernels started and waits for the device of a call; nothing on a CPU."""
    if not CUDA:
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        run()
    found = {"launches": 0, "waits": 0}
    for event in recorded.key_averages():
        found["launches"] += event.count * event.key.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch"))
        found["waits"] += event.count * event.key.startswith("Memcpy DtoH")
    return found


@contextmanager
def precision(name: str) -> Iterator[None]:
    """fp32, tf32, or bf16 by autocast."""
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=name == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision("highest")


class RandomLayer:
    """A layer of random weights whose solves take some 50 evaluations, and a segment."""

    def __init__(self, size: str) -> None:
        width, ffn, heads, head = SIZES[size]
        torch.manual_seed(0)
        self.cell = TransformerLayer(width, ffn, heads, head, False, False, 0.0, 0.0, 0)
        self.cell.initialize(Initializer("fan_in", 0.02, 0.05))
        with torch.no_grad():
            self.cell.out.weight_v.mul_(4.0)
        self.cell = self.cell.to(DEVICE)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE)

        generator = torch.Generator().manual_seed(1)
        self.injection = drawn(ROWS, 2 * TOKENS, 3 * heads * head)
        self.memory, self.weighting = drawn(ROWS, TOKENS, width), drawn(ROWS, TOKENS, width)
        self.z0 = torch.zeros(ROWS, TOKENS, width, device=DEVICE)
        self.parameters = list(self.cell.parameters())

    def bound(self) -> Any:
        """f."""
        cell = self.cell.prepare(DropoutMasks())
        with torch.no_grad():
            past = cell.context(self.memory, self.injection[:, :TOKENS], None)
        return cell.bind(self.injection[:, TOKENS:], past)

    def gradients(self, out: Tensor) -> Any:
        """Of the parameters."""
        return torch.autograd.grad((out * self.weighting).sum(), self.parameters)


Step = Callable[[], Any]


def our_step(layer: RandomLayer, active: str, facts: dict[str, Any]) -> Step:
    """One of ours; `facts` receives what its solves did."""
    forward = SolverConfig(max_evals=60, rtol=1e-3, atol=0.0, active_set=active)
    backward = SolverConfig(max_evals=60, rtol=1e-3, atol=0.0, active_set=active)

    def run() -> Any:
        found = fixed_point(layer.bound(), layer.z0, forward, GradientConfig(solver=backward))
        facts["state"], facts["nfe"] = found.state.detach(), found.result.nfe
        return layer.gradients(found.state)

    return run


def stack_step(layer: RandomLayer, layers: int) -> Step:
    """One of a stack of tied layers."""

    def run() -> Any:
        f, z = layer.bound(), layer.z0
        for _ in range(layers):
            z = f(z)
        return layer.gradients(z)

    return run


def torchdeq_step(layer: RandomLayer, solver: str, facts: dict[str, Any]) -> Step:
    """One of TorchDEQ's, with the same tolerance and budgets."""
    import torchdeq

    options = {
        f"{p}_{k}": v for p in "fb" for k, v in (("max_iter", 60), ("tol", 1e-3), ("stop_mode", "rel"))
    }
    deq = torchdeq.get_deq(f_solver=solver, b_solver=solver, ift=True, **options).train()

    def run() -> Any:
        out, info = deq(layer.bound(), layer.z0)
        facts["state"], facts["nfe"] = out[-1].detach(), float(info["nstep"].float().mean())
        return layer.gradients(out[-1])

    return run


def step_entry(layer: RandomLayer, kind: str, make: Callable[[dict[str, Any]], Step], compiled: bool) -> Any:
    """Time, memory, evaluations and residual of one kind of step."""
    facts: dict[str, Any] = {}
    fused.fuse(compiled)
    try:
        with precision(kind):
            run = make(facts)
            begin = time.perf_counter()
            run()
            wait()
            entry: dict[str, Any] = {"first s": time.perf_counter() - begin}
            if CUDA:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            entry["ms"] = milliseconds(run, 3 if entry["first s"] < 3 else 1)
            if CUDA:
                entry["MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        entry["compiled"] = fused.fusing(layer.z0)
    finally:
        fused.fuse(False)
    if "state" in facts:
        f = layer.bound()
        with torch.no_grad():  # in float32
            fz = f(facts["state"])
            lane = (fz - facts["state"]).norm(dim=-1) / fz.norm(dim=-1)
        entry |= {"nfe": facts["nfe"], "residual": lane.mean().item(), "worst": lane.max().item()}
    return entry


def steps(size: str) -> None:
    """All kinds of steps at one width."""
    part = Part(f"steps-{size}")
    print(f"-- {size}: {SIZES[size]}, {ROWS} x {TOKENS} tokens, memory {TOKENS}", flush=True)
    layer = RandomLayer(size)

    def ours(facts: dict[str, Any]) -> Step:
        return our_step(layer, "never", facts)

    runs: dict[str, tuple[str, Callable[[dict[str, Any]], Step], bool]] = {
        "ours fp32": ("fp32", ours, False),
        "stack of 12 fp32": ("fp32", lambda facts: stack_step(layer, 12), False),
        "torchdeq broyden fp32": ("fp32", lambda facts: torchdeq_step(layer, "broyden", facts), False),
        "ours tf32": ("tf32", ours, False),
        "ours compiled tf32": ("tf32", ours, True),
        "ours compiled fp32": ("fp32", ours, True),
        "stack of 12 tf32": ("tf32", lambda facts: stack_step(layer, 12), False),
        "torchdeq broyden tf32": ("tf32", lambda facts: torchdeq_step(layer, "broyden", facts), False),
        "stack of 24 fp32": ("fp32", lambda facts: stack_step(layer, 24), False),
        "stack of 24 tf32": ("tf32", lambda facts: stack_step(layer, 24), False),
        "ours active auto fp32": ("fp32", lambda facts: our_step(layer, "auto", facts), False),
        "ours compiled bf16": ("bf16", ours, True),
        "stack of 12 bf16": ("bf16", lambda facts: stack_step(layer, 12), False),
    }
    for name, (kind, make, compiled) in runs.items():
        limit = 90 if compiled else 25
        part.measure(name, limit, lambda k=kind, m=make, c=compiled: step_entry(layer, k, m, c))  # type: ignore[misc]
    for compiled in (False, True):
        name = f"an iteration{' compiled' if compiled else ''}"
        part.measure(name, 60, lambda c=compiled: iteration_entry(layer, c))  # type: ignore[misc]


def iteration_entry(layer: RandomLayer, compiled: bool) -> dict[str, Any]:
    """What an iteration of a forward solve costs beside f."""
    config = SolverConfig(max_evals=60, rtol=1e-3, atol=0.0, active_set="never")
    fused.fuse(compiled)
    try:
        with torch.no_grad(), precision("tf32"):
            f = layer.bound()
            result = solve(f, layer.z0, config)
            whole = milliseconds(lambda: solve(f, layer.z0, config))
            alone = milliseconds(lambda: [f(layer.z0) for _ in range(10)]) / 10
            found, own = launches(lambda: solve(f, layer.z0, config)), launches(lambda: f(layer.z0))
    finally:
        fused.fuse(False)
    entry: dict[str, Any] = {"iterations": result.nfe, "ms": whole / result.nfe, "f ms": alone}
    if found:
        entry["launches"] = found["launches"] / result.nfe
        entry["launches beside f"] = found["launches"] / result.nfe - own["launches"]
        entry["waits"] = found["waits"] / result.nfe
    return entry


def warm() -> None:
    """Compile the rules once, so that later processes find them in torch's cache."""
    layer = RandomLayer("512")
    entry = step_entry(layer, "tf32", lambda facts: our_step(layer, "never", facts), compiled=True)
    Part("warm").put("compiling", entry)
    print(entry)


def machine() -> None:
    """Versions, and the rates of products and copies."""
    part = Part("machine")
    part.put("versions", {"torch": torch.__version__, "python": sys.version.split()[0]})
    if CUDA:
        about = torch.cuda.get_device_properties(0)
        part.put("device", {"name": about.name, "MiB": about.total_memory // 2**20})
    n = 4096 if CUDA else 64
    for kind in ("fp32", "tf32"):
        with precision(kind):
            a = torch.randn(n, n, device=DEVICE)
            part.put(f"TFLOP/s {kind}", 2e-9 * n**3 / milliseconds(lambda: a @ a, 6))  # noqa: B023
    print(part.found)


def curves(logs: list[str]) -> None:
    """Loss by update of trainings."""
    part = Part("curves")
    for log in map(Path, logs):
        text = log.read_text(errors="replace") if log.exists() else ""
        lines = [json.loads(line[line.index("{") :]) for line in text.splitlines() if '{"epoch"' in line]
        rows = [
            {
                k: float(line[k])
                for k in ("num_updates", "loss", "f_nfe", "f_conv", "b_conv", "ups")
                if k in line
            }
            for line in lines
            if "loss" in line
        ]
        part.put(log.stem, rows)
        shown = rows[:: max(1, len(rows) // 6)] + rows[-1:]
        print(log.stem, " ".join(f"{r['num_updates']:.0f}:{r['loss']:.3f}" for r in shown))
        if rows:
            print("   last:", rows[-1])


def merge() -> None:
    """One file of all parts."""
    parts = {path.stem: json.loads(path.read_text()) for path in sorted(PARTS.glob("*.json"))}
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "gpu_check.json").write_text(json.dumps(parts, indent=1))


def main(command: str, *arguments: str) -> None:
    """Run one part."""
    if command == "steps":
        for size in arguments:
            steps(size)
    elif command == "curves":
        curves(list(arguments))
    else:
        {"warm": warm, "machine": machine, "merge": merge}[command]()


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("steps", "warm", "machine", "curves", "merge"):
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
