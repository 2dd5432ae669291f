"""One visit to a device: where it writes, how long parts may take, and how calls are timed and counted."""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

DEVICE = os.environ.get("DEVICE", "cuda")
OUT = Path(os.environ.get("OUT", "gpu_check"))
PARTS = Path(os.environ.get("PARTS", OUT / "parts"))
CUDA = DEVICE == "cuda"


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
