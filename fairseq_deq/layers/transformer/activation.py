"""The activation of the feed-forward part, with or without a gate, and its derivative."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("relu", "gelu", "silu")


@dataclass(frozen=True)
class Activation:
    """Maps x to the F inner channels of the feed-forward part: act(x), or with a gate act(a) * b.

    Without a gate x = W_1 h has F channels. With one x = [a, b] = [W_1 h, W_3 h] has 2*F.

    On a CPU, torch's own `gelu`, `silu` and `sigmoid` compute the last elements of a matrix, and of each
    thread's share, by a scalar function, which rounds differently from the vectorised one. Here an element is
    rounded the same wherever it stands: `erf` and `tanh` use one function for all elements, and sums and
    products are correctly rounded by both kinds of function.

    Attributes:
        name: `relu`: max(x, 0); `gelu`: x P(X <= x) with X standard normal; `silu`: x / (1 + exp(-x)).
        gated: whether there is a gate.
    Raises:
        ValueError: `name` is none of these.
    Source: Hendrycks and Gimpel (2016, arXiv 1606.08415); of the gate Shazeer (2020, arXiv 2002.05202).
    """

    name: str = "relu"
    gated: bool = False

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {self.name!r}")

    def __call__(self, x: Tensor) -> Tensor:
        """The inner channels, (n, F), of x (n, F) or (n, 2*F); x may be overwritten."""
        if not self.gated:
            return x.relu_() if self.name == "relu" else self._smooth(x)
        a, b = x.chunk(2, -1)
        return (a.relu() if self.name == "relu" else self._smooth(a)) * b

    def at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The inner channels, (n, F), and the derivatives that `transposed` needs; x may be overwritten.

        Args:
            x: (n, F) or (n, 2*F).
        Returns:
            the inner channels, and act'(x), or with a gate [act'(a) * b, act(a)], in the shape of x.
        """
        a, b = x.chunk(2, -1) if self.gated else (x, None)
        if self.name == "relu":
            value = a.relu_()
            slope = (value > 0).to(a.dtype)
        else:
            wide = _wide(a)
            share = self._share(wide)
            value = share * wide
            if self.name == "gelu":
                slope = (wide.square() * -0.5).exp_().mul_(wide).mul_(1 / math.sqrt(2 * math.pi)) + share
            else:
                slope = (1 - share).mul_(value).add_(share)
            value, slope = value.to(a.dtype), slope.to(a.dtype)
        if b is None:
            return value, slope
        return value * b, torch.cat([slope * b, value], -1)

    def transposed(self, grad: Tensor, slopes: Tensor) -> Tensor:
        """The gradient with respect to x, in the shape of x.

        Args:
            grad: the gradient with respect to the inner channels, (n, F).
            slopes: the derivatives, from `at`.
        """
        if not self.gated:
            return grad * slopes
        return (grad.unsqueeze(1) * slopes.unflatten(1, (2, -1))).flatten(1)

    def mask_of_slopes(self, mask: Tensor | None) -> Tensor | None:
        """A dropout mask of the inner channels, (B, F), repeated to the channels of the slopes."""
        return mask.repeat(1, 2) if self.gated and mask is not None else mask

    def _smooth(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return F.gelu(x) if self.name == "gelu" else F.silu(x)
        wide = _wide(x)
        share = self._share(wide)
        return (share * wide if share.requires_grad else share.mul_(wide)).to(x.dtype)

    def _share(self, x: Tensor) -> Tensor:
        """act(x) / x, which is a number between 0 and 1.

        For `gelu` it is P(X <= x) = (1 + erf(x/sqrt(2)))/2, and for `silu`
        1/(1 + exp(-x)) = (1 + tanh(x/2))/2.
        """
        if self.name == "gelu":
            odd = torch.erf(x * math.sqrt(0.5))
        else:
            odd = torch.tanh(x * 0.5)
        # In place is a quarter faster, but would overwrite values that autograd needs.
        return (odd + 1) * 0.5 if odd.requires_grad else odd.add_(1).mul_(0.5)


def _wide(x: Tensor) -> Tensor:
    """x in float32 if it has half precision, in which 1 + erf(x) would lose digits; else x itself."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
