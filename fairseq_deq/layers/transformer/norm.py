"""Layer norm and RMS norm of the DEQ-Transformer layer, each with its transposed Jacobian."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = ("layer", "rms")
_EPS = 1e-5


@dataclass(frozen=True)
class Norm:
    """Normalise each row: y = gain * x^ + bias.

    Layer norm has x^ = (x - mean(x)) / std(x), and RMS norm x^ = x / rms(x), both with 1e-5 added under the
    root. The result of a row does not depend on the other rows, not even in its rounding: the kernels sum
    each row in one fixed order.

    Attributes:
        kind: `layer` or `rms`.
        gain: (C,); None: 1.
        bias: (C,); None: 0, as always for `rms`.
    Source: Ba, Kiros, Hinton (2016, arXiv 1607.06450); Zhang, Sennrich (2019, arXiv 1910.07467).
    """

    kind: str = "layer"
    gain: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        """y, (n, C), of rows (n, C)."""
        if self.kind == "rms":
            return F.rms_norm(rows, rows.shape[-1:], self.gain, _EPS)
        return torch.layer_norm(rows, rows.shape[-1:], self.gain, self.bias, _EPS)

    def at(self, rows: Tensor) -> NormAt:
        """The norm, linearised at rows x (n, C)."""
        if self.kind == "rms":
            rstd = rows.square().mean(-1, keepdim=True).add_(_EPS).rsqrt_()
            return NormAt(self, rows * rstd, rstd)
        unit, _, rstd = torch.native_layer_norm(rows, rows.shape[-1:], None, None, _EPS)
        return NormAt(self, unit, rstd)


@dataclass(frozen=True)
class NormAt:
    """A norm, linearised at rows x (n, C).

    Attributes:
        norm: the norm.
        unit: x^, (n, C).
        rstd: 1/std(x), or 1/rms(x), (n, 1).
    """

    norm: Norm
    unit: Tensor
    rstd: Tensor

    @property
    def value(self) -> Tensor:
        """y, (n, C)."""
        y = self.unit if self.norm.gain is None else self.unit * self.norm.gain
        return y if self.norm.bias is None else y + self.norm.bias

    def rows(self, index: Tensor) -> NormAt:
        """The same for the rows with these indices, (n',)."""
        return NormAt(self.norm, self.unit.index_select(0, index), self.rstd.index_select(0, index))

    def transposed(self, grad: Tensor) -> Tensor:
        """(dy/dx)^T grad = rstd * (g - mean(g) - x^ * mean(g * x^)) with g = gain * grad, (n, C).

        For `rms` the term mean(g) is absent.
        """
        if self.norm.gain is not None:
            grad = grad * self.norm.gain
        along = torch.linalg.vecdot(grad, self.unit).div_(grad.shape[-1]).unsqueeze(1)
        if self.norm.kind == "rms":
            return torch.addcmul(grad, self.unit, along, value=-1).mul_(self.rstd)
        centred = grad - grad.mean(1, keepdim=True)
        return centred.addcmul_(self.unit, along, value=-1).mul_(self.rstd)


class NormParameters(nn.Module):
    """The parameters of a norm: a gain, which starts at 1, and for `layer` a bias, which starts at 0.

    Args:
        dim: channels, C.
        kind: `layer` or `rms`.
        affine: False: there are no parameters.
    Raises:
        ValueError: `kind` is neither of the two.
    """

    def __init__(self, dim: int, kind: str, affine: bool) -> None:
        super().__init__()
        if kind not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {kind!r}")
        self.kind = kind
        self.gain = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine and kind == "layer" else None

    def norm(self) -> Norm:
        """The norm with these parameters."""
        return Norm(self.kind, self.gain, self.bias)
