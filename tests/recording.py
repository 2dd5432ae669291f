"""Recorded solves without a GPU.

On a CPU a recording is a trace of the tensor operations of an iteration (`torch.fx`): like a CUDA graph it
repeats exactly these, whatever the data say, and cannot be made where an iteration asks what they say.
"""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fairseq_deq.solvers import active, captured, few_lanes, record


def traced(program, buffers):
    """`captured.capture` for a CPU."""
    # Tracing executes the program, which writes to some of its tensors; recording a graph does not.
    recorded = make_fx(program)([buffer.clone() for buffer in buffers])
    operations = {str(node.target) for node in recorded.graph.nodes}
    # On a device these would be numbers copied from the host, which waits for that.
    assert not [name for name in operations if "lift_fresh" in name]
    return lambda: captured.write_back(recorded(buffers), buffers)


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
    monkeypatch.setattr(captured, "capture", traced)
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
