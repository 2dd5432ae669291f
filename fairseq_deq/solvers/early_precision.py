"""The first evaluations of a solve in a lower precision, the last in the full one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# The relative residual to which each is used: some times its rounding, which is 2^-11 and 2^-8 in a product.
EARLY_TOLERANCES = {"tf32": 4e-3, "bfloat16": 2e-2}
PRECISIONS = ("full", *EARLY_TOLERANCES)
# Of the budget of a solve, the share that may be spent in the lower precision.
EARLY_SHARE = 0.5


@contextmanager
def lowered(precision: str, device: torch.device) -> Iterator[None]:
    """f in a lower precision: `tf32`, products of float32 matrices on a GPU, or `bfloat16`, autocast."""
    if precision == "tf32":
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        matmul.fp32_precision = "tf32"
        try:
            yield
        finally:
            matmul.fp32_precision = before
        return
    with torch.autocast(device.type, dtype=torch.bfloat16):
        yield
