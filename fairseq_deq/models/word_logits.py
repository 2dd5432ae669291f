"""Linear maps to words with more parameters than fairseq's: biases, and a projection in the adaptive head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from fairseq.modules import AdaptiveSoftmax
from fairseq.modules.adaptive_softmax import TiedHeadModule, TiedLinear
from torch import Tensor, nn


class BiasedTiedLinear(TiedLinear):
    """x W^T + b, where W is a parameter of another module too.

    Args:
        weight: W, (words, channels).
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight, transpose=False)
        self.bias = nn.Parameter(torch.zeros(weight.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, words) of features (n, channels)."""
        return F.linear(x, self.weight, self.bias)


class TiedHead(nn.Module):
    """The logits of an adaptive softmax's first band, and then those of its other bands as wholes.

    With p = P x, or x without a projection: [p W^T + b; p C^T + c], where W is a parameter of the embeddings.

    Args:
        tied: the head that fairseq makes, which has W and C.
        bias: whether there are b and c.
        projection: whether there is P; it starts as the identity.
    """

    def __init__(self, tied: TiedHeadModule, bias: bool, projection: bool) -> None:
        super().__init__()
        words = tied.word_proj.weight
        classes, dim = tied.class_proj.weight.shape
        self.word_proj = BiasedTiedLinear(words) if bias else tied.word_proj
        self.class_proj = nn.Linear(dim, classes, bias=bias)
        self.class_proj.weight = tied.class_proj.weight
        if bias:
            nn.init.zeros_(self.class_proj.bias)
        self.projection = _identity(dim) if projection else None

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, words + classes) of features (n, channels)."""
        if self.projection is not None:
            x = self.projection(x)
        return torch.cat([self.word_proj(x), self.class_proj(x)], -1)


class Head(nn.Linear):
    """The same with weights of its own: P x [W; C]^T + [b; c].

    Args:
        own: the head that fairseq makes, which has [W; C].
        bias, projection: as for `TiedHead`.
    """

    def __init__(self, own: nn.Linear, bias: bool, projection: bool) -> None:
        out, dim = own.weight.shape
        super().__init__(dim, out, bias=bias)
        self.weight = own.weight
        if bias:
            nn.init.zeros_(self.bias)
        self.projection = _identity(dim) if projection else None

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, words + classes) of features (n, channels)."""
        return super().forward(x if self.projection is None else self.projection(x))


class BiasedAdaptiveSoftmax(AdaptiveSoftmax):
    """fairseq's adaptive softmax with biases in every band, and a projection in its head.

    Args:
        vocab_size, input_dim, cutoff, dropout, adaptive_inputs, factor, tie_proj: as for fairseq's.
        bias: whether every logit has a bias; they start at 0.
        projection: whether the head sees the features through a matrix; it starts as the identity.
    """

    def __init__(
        self,
        vocab_size: int,
        input_dim: int,
        cutoff: list[int],
        dropout: float,
        factor: float,
        adaptive_inputs: Any,
        tie_proj: bool,
        bias: bool,
        projection: bool,
    ) -> None:
        super().__init__(vocab_size, input_dim, cutoff, dropout, factor, adaptive_inputs, tie_proj)
        made: Any = self.head
        tied = adaptive_inputs is not None
        self.head: nn.Module = (TiedHead if tied else Head)(made, bias, projection)
        if bias:
            for tail in self.tail:
                words = tail[2]
                tail[2] = BiasedTiedLinear(words.weight) if tied else _biased(words)


def _identity(dim: int) -> nn.Linear:
    linear = nn.Linear(dim, dim, bias=False)
    nn.init.eye_(linear.weight)
    return linear


def _biased(linear: nn.Linear) -> nn.Linear:
    """The same map, with a bias of zeros."""
    words, dim = linear.weight.shape
    biased = nn.Linear(dim, words)
    biased.weight = linear.weight
    nn.init.zeros_(biased.bias)
    return biased
