"""CUDA graphs: record a program over buffers, and replay it in one launch."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

# A program: from tensors to the tensors of the next iteration, in the same order.
Program = Callable[[list[Tensor]], list[Tensor]]


def capture(program: Program, buffers: list[Tensor]) -> Callable[[], None]:
    """Record `program`, and return a function that replays it and writes its results to `buffers`.

    Raises:
        RuntimeError: the program waits for the host, or does something else that CUDA cannot record.
    """
    device = buffers[0].device
    # Programs of a pool share memory, so they must not run at the same time: each stream has its own pool.
    pool = _pool(device, torch.cuda.current_stream(device).cuda_stream)
    return pool.record(lambda: write_back(program(buffers), buffers)).replay


def release_pools() -> None:
    """Give back the memory that is kept for further recordings."""
    _pool.cache_clear()


def write_back(found: list[Tensor], buffers: list[Tensor]) -> None:
    """Copy the results of a program to the buffers. A result may be a buffer, the same one or another."""
    changed = [i for i, (tensor, buffer) in enumerate(zip(found, buffers)) if tensor is not buffer]
    at = {_address(buffers[i]): i for i in changed}
    # A buffer that is the result for a later one is copied first, before it is overwritten.
    kept = [found[i].clone() if at.get(_address(found[i]), i + 1) <= i else found[i] for i in changed]
    for i, tensor in zip(changed, kept):
        buffers[i].copy_(tensor)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Pool:
    """What recording needs: a stream of its own, and memory that is kept from one program to the next."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.caller = torch.cuda.current_stream(device)
        self.handle = torch.cuda.graph_pool_handle()
        self.lock = threading.Lock()  # one recording at a time
        self.ones = torch.ones(8, 8, device=device)
        torch.addmm(self.ones[0], self.ones, self.ones)  # cuBLAS sets itself up, which must not be recorded
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            self.holder = self._record_little()  # while it lives, the pool keeps its memory

    def record(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """The graph of the launches of `run`. Recording does not execute them.

        Raises:
            RuntimeError: it cannot be recorded.
        """
        with self.lock, torch.cuda.stream(self.stream):
            self.stream.wait_stream(self.caller)
            graph = self._begun()
            try:
                run()
            except BaseException:
                with suppress(RuntimeError):  # the first error is the one to report
                    self._end(graph)
                raise
            self._end(graph)
            self.caller.wait_stream(self.stream)
        return graph

    def _begun(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads may use CUDA freely while this one records.
        graph.capture_begin(pool=self.handle, capture_error_mode="thread_local")
        return graph

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            # After a recording that failed, torch still believes that it is recording to this pool: freed
            # memory does not come back, the next recording to the pool fails, and so does drawing random
            # numbers. Release the pool, and make one recording that succeeds, which resets the generator.
            lost, self.handle = self.handle, torch.cuda.graph_pool_handle()
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.device.index, lost)
                torch._C._cuda_releasePool(self.device.index, lost)
            with suppress(RuntimeError):
                self.holder = self._record_little()
            raise

    def _record_little(self) -> torch.cuda.CUDAGraph:
        """A product. For it cuBLAS allocates its workspace of this stream, in the pool: all graphs use that,
        and outside of the pool torch could give the memory away while they still do."""
        graph = self._begun()
        torch.addmm(self.ones[0], self.ones, self.ones)
        graph.capture_end()
        return graph


@functools.cache
def _pool(device: torch.device, stream: int) -> _Pool:
    return _Pool(device)
