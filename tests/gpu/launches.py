"""What a solve asks of a device: operations that start a kernel, and waits for what one has found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Only memory or a handle is made.
_FREE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "alias"}
# The host must know what the device has found; these wait for it.
WAITS = {"_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "masked_select", "unique_dim"}


class Launches(TorchDispatchMode):
    """Counts the operations that are called in its context, those inside of its map left out.

    Attributes:
        operations: name -> how many that start a kernel.
        waits: how many wait for the device.
        evaluations: how often the map was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits = self.evaluations = self._inside = 0

    def leaving_out(self, f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """f, whose own operations are not counted."""

        def called(z: Tensor) -> Tensor:
            self.evaluations += 1
            self._inside += 1
            try:
                return f(z)
            finally:
                self._inside -= 1

        return called

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not self._inside and not view and name not in _FREE:
            if name in WAITS:
                self.waits += 1
            else:
                self.operations[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def an_iteration(self) -> float:
        """Operations an evaluation of the map."""
        return self.operations.total() / self.evaluations

    @property
    def waits_an_iteration(self) -> float:
        """Waits an evaluation of the map."""
        return self.waits / self.evaluations


def kernels(run: Callable[[], object]) -> int:
    """Kernels that a call starts on a CUDA device, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    starts = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
    return sum(e.count for e in recorded.key_averages() if e.key.startswith(starts))
