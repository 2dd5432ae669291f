"""Training steps through random layers of true size: ours, TorchDEQ's, and of stacks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...implicit import GradientConfig, fixed_point
from ...layers.transformer.layer import TransformerLayer
from ...layers.transformer.weights import DropoutMasks
from ...layers.weight_norm import Initializer
from ...solvers import FixedPoint, SolverConfig, captured, fused, release_recordings, solve
from .visit import CUDA, DEVICE, Part, launches, milliseconds, precision, wait

# name -> width, feed-forward width, heads, width of a head.
SIZES = {
    "128": (128, 512, 4, 32),
    "512": (512, 2048, 8, 64),
    "700": (700, 48000, 10, 70),
    "1024": (1024, 4096, 16, 64),
}
ROWS, TOKENS = 14, 150
if not CUDA:
    SIZES = {"128": (16, 32, 2, 8), "512": (24, 48, 2, 12), "700": (32, 96, 2, 16), "1024": (48, 96, 4, 12)}
    ROWS, TOKENS = 2, 10


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


def our_step(layer: RandomLayer, facts: dict[str, Any], **options_of_solves: str) -> Step:
    """One of ours, of all positions unless told otherwise; `facts` receives what its solves did."""
    chosen: dict[str, Any] = {"active_set": "never"} | options_of_solves
    options = SolverConfig(max_evals=60, rtol=1e-3, atol=0.0, **chosen)

    def run() -> Any:
        found = fixed_point(layer.bound(), layer.z0, options, GradientConfig(solver=options))
        assert found.result is not None
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
    empty = _forget_recordings()
    try:
        with precision(kind):
            run = make(facts)
            begin = time.perf_counter()
            run()
            wait()
            entry: dict[str, Any] = {"first s": time.perf_counter() - begin}
            run()  # a kind of solve is recorded when it comes for the second time
            wait()
            if CUDA:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                # Between steps: gradients, recordings, and what replayed graphs compute with.
                entry["kept MiB"] = (torch.cuda.memory_reserved() - empty) / 2**20
            entry["ms"] = milliseconds(run, 3 if entry["first s"] < 3 else 1)
            if CUDA:
                entry["MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        entry["compiled"] = fused.fusing(layer.z0)
        entry |= captured.refused  # why maps were not recorded
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

    def ours(**options: str) -> Callable[[dict[str, Any]], Step]:
        return lambda facts: our_step(layer, facts, **options)

    def stack(layers: int) -> Callable[[dict[str, Any]], Step]:
        return lambda facts: stack_step(layer, layers)

    def broyden(facts: dict[str, Any]) -> Step:
        return torchdeq_step(layer, "broyden", facts)

    graph = {"cuda_graph": "auto"}
    runs: dict[str, tuple[str, Callable[[dict[str, Any]], Step], bool]] = {
        "ours fp32": ("fp32", ours(), False),
        "ours captured fp32": ("fp32", ours(**graph), False),
        "stack of 12 fp32": ("fp32", stack(12), False),
        "torchdeq broyden fp32": ("fp32", broyden, False),
        "ours tf32": ("tf32", ours(), False),
        "ours captured tf32": ("tf32", ours(**graph), False),
        "ours captured bf16": ("bf16", ours(**graph), False),
        "ours captured early tf32": ("fp32", ours(early_precision="tf32", **graph), False),
        "ours captured early bf16": ("fp32", ours(early_precision="bfloat16", **graph), False),
        "stack of 12 tf32": ("tf32", stack(12), False),
        "torchdeq broyden tf32": ("tf32", broyden, False),
        "ours compiled tf32": ("tf32", ours(), True),
        "ours compiled captured tf32": ("tf32", ours(**graph), True),
        "ours compiled fp32": ("fp32", ours(), True),
        "stack of 24 fp32": ("fp32", stack(24), False),
        "stack of 24 tf32": ("tf32", stack(24), False),
        "ours active auto fp32": ("fp32", ours(active_set="auto"), False),
        "ours compiled bf16": ("bf16", ours(), True),
        "stack of 12 bf16": ("bf16", stack(12), False),
    }
    for name, (kind, make, compiled) in runs.items():
        limit = 90 if compiled else 25
        part.measure(name, limit, lambda k=kind, m=make, c=compiled: step_entry(layer, k, m, c))  # type: ignore[misc]
    for name, compiled, cuda_graph in (
        ("", False, "never"),
        (" captured", False, "auto"),
        (" compiled", True, "never"),
    ):
        part.measure(f"an iteration{name}", 60, lambda c=compiled, g=cuda_graph: iteration_entry(layer, c, g))  # type: ignore[misc]


def iteration_entry(layer: RandomLayer, compiled: bool, cuda_graph: str) -> dict[str, Any]:
    """What an iteration of a forward solve costs beside f."""
    config = SolverConfig(max_evals=60, rtol=1e-3, atol=0.0, active_set="never", cuda_graph=cuda_graph)
    fused.fuse(compiled)
    _forget_recordings()

    def run() -> FixedPoint:
        return solve(layer.bound(), layer.z0, config)  # a new f each time, as in training

    try:
        with torch.no_grad(), precision("tf32"):
            f = layer.bound()
            run()
            result = run()  # which is recorded, if that is asked for
            whole = milliseconds(run) - milliseconds(layer.bound)
            alone = milliseconds(lambda: [f(layer.z0) for _ in range(10)]) / 10
            found, own, binding = launches(run), launches(lambda: f(layer.z0)), launches(layer.bound)
    finally:
        fused.fuse(False)
    entry: dict[str, Any] = {"iterations": result.nfe, "ms": whole / result.nfe, "f ms": alone}
    if found:
        entry["launches"] = (found["launches"] - binding["launches"]) / result.nfe
        if cuda_graph == "never":
            entry["launches beside f"] = entry["launches"] - own["launches"]
        entry["waits"] = found["waits"] / result.nfe
    return entry


def _forget_recordings() -> int:
    """Forget what an earlier row has recorded; return the bytes that torch then still holds on the device."""
    captured.refused.clear()
    release_recordings()
    if not CUDA:
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()
