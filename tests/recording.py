"""Recorded solves without a GPU.

On a CPU a recording is the list of tensor operations of an iteration: like a CUDA graph it repeats exactly
these on the same memory, whatever the data say, and cannot be made where an iteration asks what they say.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fairseq_deq.solvers import active, captured, few_lanes, record


class Recorder(TorchDispatchMode):
    """Notes the operations that run under it, and repeats them."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # On a device this would be a number copied from the host, which waits for that.
        assert operation is not torch.ops.aten.lift_fresh.default
        if _asks(operation, args):
            raise RuntimeError(f"{operation} asks what the data say")
        kwargs = kwargs or {}
        out = operation(*args, **kwargs)
        self.steps.append((operation, args, kwargs, out))
        return out

    @torch.inference_mode()  # which may write to any tensor, as a graph does
    def replay(self) -> None:
        """Run the operations again, each with its results where they were."""
        for operation, args, kwargs, out in self.steps:
            for old, new in zip(tree_leaves(out), tree_leaves(operation(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():  # neither a view nor changed in place
                    old.copy_(new)


def _asks(operation: Any, args: Any) -> bool:
    """Whether the host must know what the data say to go on: a number, or how large a result is."""
    if operation is torch.ops.aten.index.Tensor:
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operation.tags))


def recorded(program, buffers):
    """`captured.capture` for a CPU."""
    before = [buffer.clone() for buffer in buffers]
    recorder = Recorder()
    try:
        with recorder:
            captured.write_back(program(buffers), buffers)
    finally:  # it has been executed; recording a graph does not
        for buffer, then in zip(buffers, before):
            buffer.copy_(then)
    return recorder.replay


@pytest.fixture
def device(monkeypatch):
    """A GPU where there is one; otherwise a CPU that keeps books in tensors and records, as a GPU does."""
    monkeypatch.setattr(captured, "refused", {})
    monkeypatch.setattr(captured, "opaque", {})
    captured.kept.clear()
    if torch.cuda.is_available():
        return torch.device("cuda")
    for module in (record, active, few_lanes):
        monkeypatch.setattr(module, "books_on_host", lambda device: False)
    monkeypatch.setattr(captured, "capture", recorded)
    monkeypatch.setattr(captured, "RECORDS", ("cuda", "cpu"))
    return torch.device("cpu")


@pytest.fixture
def made(device, monkeypatch):
    """A list that grows with each recording that is made."""
    made, capture = [], captured.capture

    def counted(program, buffers):
        made.append(1)
        return capture(program, buffers)

    monkeypatch.setattr(captured, "capture", counted)
    return made
