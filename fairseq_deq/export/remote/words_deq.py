"""Embeddings and softmax over words: one table, or bands of words, of which rarer words have fewer channels.

Part of a model that fairseq_deq exported (MIT licence).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def band_edges(cutoffs: Sequence[int], types: int) -> list[int]:
    """0, the cut-offs, and the number of types unless the last cut-off is that number."""
    return [0, *cutoffs] if cutoffs[-1] == types else [0, *cutoffs, types]


class Table(nn.Module):
    """Embeddings from one table.

    Args:
        types: number of symbols.
        dim: channels, D.
    """

    def __init__(self, types: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(types, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, T, D) of tokens (B, T)."""
        return F.embedding(tokens, self.weight)


class Bands(nn.Module):
    """Embeddings in bands: those of band i have D / factor^i channels, and are projected to D.

    Args:
        types: number of symbols.
        dim: channels, D.
        cutoffs: the numbers at which bands end.
        factor: by which the bands narrow.
    Source: Baevski and Auli (2018, arXiv 1809.10853).
    """

    def __init__(self, types: int, dim: int, cutoffs: Sequence[int], factor: float) -> None:
        super().__init__()
        self.edges, self.dim = band_edges(cutoffs, types), dim
        widths = [int(dim // factor**i) for i in range(len(self.edges) - 1)]
        sizes = [end - begin for begin, end in zip(self.edges, self.edges[1:])]
        self.words = nn.ParameterList(torch.zeros(n, width) for n, width in zip(sizes, widths))
        self.projections = nn.ParameterList(torch.zeros(dim, width) for width in widths)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, T, D) of tokens (B, T)."""
        out = self.words[0].new_zeros(*tokens.shape, self.dim)
        for i, (begin, end) in enumerate(zip(self.edges, self.edges[1:])):
            mask = (tokens >= begin) & (tokens < end)
            out[mask] = F.linear(F.embedding(tokens[mask] - begin, self.words[i]), self.projections[i])
        return out


class Softmax(nn.Module):
    """Logits over all words.

    Args:
        types: number of symbols.
        dim: channels of the features.
        own: whether it has its own weight; False: it uses that of the embedding, a `Table`.
        bias: whether each word has a bias.
    """

    def __init__(self, types: int, dim: int, own: bool, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(types, dim)) if own else None
        self.bias = nn.Parameter(torch.zeros(types)) if bias else None

    def forward(self, features: Tensor, embedding: nn.Module) -> Tensor:
        """Logits (..., V) of features (..., C)."""
        weight = embedding.weight if self.weight is None else self.weight
        assert isinstance(weight, Tensor)
        return F.linear(features, weight, self.bias)


class AdaptiveSoftmax(nn.Module):
    """Log-probabilities over all words: the head has the first band's words, and a class per other band.

    Args:
        types: number of symbols.
        dim: channels of the features.
        cutoffs, factor: as for `Bands`.
        tie_words, tie_projections: whether it uses the words, and projections, of the embedding, a `Bands`.
        bias: whether each word, and each class, has a bias.
        projection: whether the features are multiplied by a matrix before the head.
    Source: Grave et al. (2016, arXiv 1609.04309).
    """

    def __init__(
        self,
        types: int,
        dim: int,
        cutoffs: Sequence[int],
        factor: float,
        tie_words: bool,
        tie_projections: bool,
        bias: bool,
        projection: bool,
    ) -> None:
        super().__init__()
        self.edges = band_edges(cutoffs, types)
        tails = len(self.edges) - 2
        widths = [int(dim // factor ** (i + 1)) for i in range(tails)]
        sizes = [end - begin for begin, end in zip(self.edges[1:], self.edges[2:])]
        first = self.edges[1] * (not tie_words)  # rows of the first band, before the classes
        self.head = nn.Parameter(torch.zeros(first + tails, dim))
        self.words = None if tie_words else _tables(zip(sizes, widths))
        self.projections = None if tie_projections else _tables((width, dim) for width in widths)
        self.projection = nn.Parameter(torch.zeros(dim, dim)) if projection else None
        self.head_bias = nn.Parameter(torch.zeros(self.edges[1] + tails)) if bias else None
        self.biases = _tables((size,) for size in sizes) if bias else None

    def forward(self, features: Tensor, embedding: nn.Module) -> Tensor:
        """Log-probabilities (..., V) of features (..., C)."""
        seen = features if self.projection is None else F.linear(features, self.projection)
        head = F.linear(seen, self.head)
        if self.words is None:
            assert isinstance(embedding, Bands)
            head = torch.cat([F.linear(seen, embedding.words[0]), head], -1)
        if self.head_bias is not None:
            head = head + self.head_bias
        head = head.log_softmax(-1)
        parts, first_band = [head[..., : self.edges[1]]], self.edges[1]
        for i in range(len(self.edges) - 2):
            words = embedding.words[i + 1] if self.words is None else self.words[i]  # type: ignore[index]
            if self.projections is None:
                projection = embedding.projections[i + 1].t()  # type: ignore[index]
            else:
                projection = self.projections[i]
            bias = None if self.biases is None else self.biases[i]
            tail = F.linear(F.linear(features, projection), words, bias).log_softmax(-1)
            parts.append(tail + head[..., first_band + i, None])
        return torch.cat(parts, -1)


def _tables(shapes: object) -> nn.ParameterList:
    return nn.ParameterList(torch.zeros(*shape) for shape in shapes)  # type: ignore[attr-defined]
