"""Where the tests of a device run: on CUDA, or on the CPU as if it were a device (`--device cpu`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recording import device as recorded  # noqa: F401  (a fixture)

import fairseq_deq.models  # noqa: F401  (fairseq's tools find them registered)
from fairseq_deq.solvers import active, few_lanes, record


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available() and item.config.getoption("--device") == "cuda":
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, or --device cpu"))


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device; on a CPU solves keep their books in tensors too."""
    name = request.config.getoption("--device")
    if name == "cpu":
        for module in (record, active, few_lanes):
            monkeypatch.setattr(module, "books_on_host", lambda device: False)
    return torch.device(name)


@pytest.fixture
def on_cpu(device: torch.device) -> tuple[str, ...]:
    """What fairseq's tools are told where there is no GPU."""
    return ("--cpu",) if device.type == "cpu" else ()
