"""Linear maps with or without weight normalisation, whose weight is computed once per forward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Initializer:
    """Draws initial weights: `normal` N(0, std), `uniform` U(-range, range), `fan_in` U(+-1/sqrt(fan_in)).

    Args:
        name: `normal`, `uniform` or `fan_in`.
        std: standard deviation of `normal`.
        range: largest absolute value of `uniform`.
    Raises:
        ValueError: `name` is none of these, or `std` or `range` is not above 0.
    """

    NAMES = ("normal", "uniform", "fan_in")

    def __init__(self, name: str, std: float, range: float) -> None:
        if name not in self.NAMES:
            raise ValueError(f"--init must be one of {', '.join(self.NAMES)}; got {name!r}")
        for option, value in (("--init-std", std), ("--init-range", range)):
            if not value > 0:
                raise ValueError(f"{option} must be above 0, got {value!r}")
        self.name, self.std, self.range = name, std, range

    def fill(self, weight: Tensor) -> None:
        """Overwrite `weight`, (out, in), with drawn numbers."""
        if self.name == "normal":
            nn.init.normal_(weight, 0.0, self.std)
            return
        bound = self.range if self.name == "uniform" else weight.shape[1] ** -0.5
        nn.init.uniform_(weight, -bound, bound)


class WeightNormLinear(nn.Module):
    """The parameters of a linear map, optionally weight-normalised: W = g * V / |V|, with a norm per row.

    It has no `forward`. Call `weight()` once before a solve, and use the W that it returns in every
    evaluation. Initially V is the W that was drawn, and g holds the norms of its rows.

    Args:
        in_features, out_features: sizes.
        bias: whether there is a bias, (out_features,).
        weight_norm: whether W is normalised.
    Source: Salimans and Kingma (2016, arXiv 1602.07868).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, weight_norm: bool) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        self.weight_g = nn.Parameter(torch.empty(out_features, 1)) if weight_norm else None
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @torch.no_grad()
    def initialize(self, initializer: Initializer) -> None:
        """Draw W from `initializer`: V becomes what is drawn, and g its norms."""
        initializer.fill(self.weight_v)
        if self.weight_g is not None:
            self.weight_g.copy_(self.weight_v.norm(dim=1, keepdim=True))

    def weight(self, mask: Tensor | None = None) -> Tensor:
        """W, (out_features, in_features), from V, or from V * mask if there is a mask of that shape."""
        v = self.weight_v if mask is None else self.weight_v * mask
        if self.weight_g is None:
            return v
        return torch._weight_norm(v, self.weight_g, 0)

    def required_bias(self) -> Tensor:
        """The bias, (out_features,), of a map that was made with one."""
        assert self.bias is not None
        return self.bias
