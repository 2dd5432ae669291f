"""The DEQ-Transformer of the reference code (version 2.0) as its formulas say, for one stream, in float64.

Written from a description of its layout and equations, with nothing of this package in it: `random_state`
makes a state_dict with its names and shapes, and `Original` scores a text with one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

DIM, HEADS, HEAD_DIM, FFN = 16, 2, 8, 24


def random_state(
    seed: int,
    types: int,
    cutoffs: Sequence[int] = (),
    div_val: int = 1,
    weight_norm: bool = True,
    embedding_dim: int = DIM,
    tied_words: bool = True,
    tied_projections: bool = True,
    gain: float = 1.0,
) -> dict[str, Tensor]:
    """Random weights of a model, of which f contracts, so that there is one equilibrium.

    Args:
        seed: of the numbers.
        types: words.
        cutoffs, div_val, embedding_dim: of embeddings and softmax.
        weight_norm: whether the layer has it (`--wnorm`).
        tied_words, tied_projections: whether the softmax has those of the embeddings.
        gain: factor of the layer's attention.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    state = {
        "inject_conv.weight": draw(3 * DIM, DIM, 1, std=0.4),
        "inject_conv.bias": draw(3 * DIM, std=0.3),
        # The reference rounds 1 / 10000^(2i/C), which can differ from this in its last bit.
        "pos_emb.inv_freq": 10000 ** (-torch.arange(0.0, DIM, 2.0) / DIM),
        "func.dec_attn.r_w_bias": draw(HEADS, HEAD_DIM, std=0.3),
        "func.dec_attn.r_r_bias": draw(HEADS, HEAD_DIM, std=0.3),
    }
    for name, shape, std in (
        ("func.dec_attn.qkv_net", (3 * DIM, DIM, 1), 0.1 * gain),
        ("func.dec_attn.r_net", (DIM, DIM, 1), 0.3),
        ("func.dec_attn.o_net", (DIM, DIM, 1), 1.6),
        ("func.pos_ff.ff1_net", (FFN, DIM), 0.2),
        ("func.pos_ff.ff2_net", (DIM, FFN), 0.1),
    ):
        weight = draw(*shape, std=std)
        if weight_norm:  # the direction alone counts in V, so any length will do
            norm = weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))
            state[f"{name}.weight_g"], state[f"{name}.weight_v"] = norm, weight * 3.7
        else:
            state[f"{name}.weight"] = weight
        if "qkv" not in name and "r_net" not in name:
            state[f"{name}.bias"] = draw(shape[0], std=0.3)
    ends = [*cutoffs, types]
    begins = [0, *cutoffs]
    if div_val == 1:
        tables = [(types, embedding_dim)]
    else:
        tables = [(e - b, embedding_dim // div_val**i) for i, (b, e) in enumerate(zip(begins, ends))]
    for i, (n, width) in enumerate(tables):
        words = draw(n, width, std=0.5)
        state[f"word_emb.emb_layers.{i}.weight"] = words
        state[f"crit.out_layers.{i}.weight"] = words.clone() if tied_words else draw(n, width, std=0.5)
        state[f"crit.out_layers.{i}.bias"] = draw(n, std=1.0)
        if div_val > 1 or embedding_dim != DIM:
            state[f"word_emb.emb_projs.{i}.weight"] = draw(DIM, width, std=0.4)
    if div_val > 1 or embedding_dim != DIM:
        for i in range(len(ends)):
            width = embedding_dim // div_val**i
            name = f"word_emb.emb_projs.{i if div_val > 1 else 0}.weight"
            tied = tied_projections and i > 0  # the head's is never tied
            state[f"crit.out_projs.{i}.weight"] = state[name].clone() if tied else draw(DIM, width, std=0.4)
    if cutoffs:
        state["crit.cluster_weight"] = draw(len(cutoffs), embedding_dim, std=0.5)
        state["crit.cluster_bias"] = draw(len(cutoffs), std=1.0)
    return state


@dataclass
class Original:
    """A model of the reference.

    Attributes:
        state: its state_dict.
        cutoffs: where its bands of words end.
        div_val: by which they narrow.
        pre_norm: its `--pre_lnorm`.
        horizon: positions that attention sees.
    """

    state: dict[str, Tensor]
    cutoffs: Sequence[int] = ()
    div_val: int = 1
    pre_norm: bool = False
    horizon: int = 1000

    def __post_init__(self) -> None:
        self.double = {name: tensor.double() for name, tensor in self.state.items()}
        self.types = sum(t.shape[0] for name, t in self.state.items() if "emb_layers" in name)

    def log_probs(self, tokens: Sequence[int], segment: int, mem_len: int) -> Tensor:
        """Log-probabilities of the word after each token, (S, V), read in segments with memory between."""
        z0, u0 = torch.zeros(0, DIM).double(), torch.zeros(0, 3 * DIM).double()
        found = []
        for begin in range(0, len(tokens), segment):
            part = tokens[begin : begin + segment]
            embedded = torch.stack([self._embedding(token) for token in part])
            u = torch.cat([u0, embedded @ self._matrix("inject_conv").T + self.double["inject_conv.bias"]])
            z = torch.zeros(len(part), DIM).double()
            for _ in range(5000):
                new = self._f(z, u, z0)
                gap, z = (new - z).abs().max(), 0.5 * new + 0.5 * z
                if gap < 1e-13:
                    break
            assert gap < 1e-13, "no fixed point was found"
            found.append(torch.stack([self._softmax(row) for row in z]))
            keep = max(0, len(z0) + len(z) - mem_len)
            z0, u0 = torch.cat([z0, z])[keep:], u[keep:]
        return torch.cat(found)

    def _matrix(self, name: str) -> Tensor:
        if f"{name}.weight_v" in self.double:
            v, g = (self.double[f"{name}.weight_{part}"].flatten(1) for part in "vg")
            return v * (g / v.pow(2).sum(1, keepdim=True).sqrt())
        return self.double[f"{name}.weight"].flatten(1)

    def _band(self, word: int) -> tuple[int, int]:
        """The band of a word, and its number there."""
        band = sum(word >= cutoff for cutoff in self.cutoffs)
        return band, word - [0, *self.cutoffs][band]

    def _embedding(self, word: int) -> Tensor:
        band, row = self._band(word) if self.div_val > 1 else (0, word)
        vector = self.double[f"word_emb.emb_layers.{band}.weight"][row]
        projection = self.double.get(f"word_emb.emb_projs.{band}.weight")
        return (vector if projection is None else projection @ vector) * math.sqrt(DIM)

    def _f(self, z: Tensor, u: Tensor, z0: Tensor) -> Tensor:
        context = torch.cat([z0, z])
        seen = F.layer_norm(context, (DIM,)) if self.pre_norm else context
        q, k, v = (seen @ self._matrix("func.dec_attn.qkv_net").T + u).chunk(3, 1)
        w_r, r_w, r_r = (self._matrix("func.dec_attn.r_net"), *self._biases())
        attended = []
        for i in range(len(z0), len(context)):
            distances = torch.arange(min(i, self.horizon - 1), -1, -1.0)  # of the keys, in order
            angles = distances[:, None] * self.state["pos_emb.inv_freq"]  # float32, as in the reference
            r = torch.cat([angles.sin(), angles.cos()], 1).double() @ w_r.T
            keys = slice(i + 1 - len(distances), i + 1)
            heads = []
            for h in range(HEADS):
                own = slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
                scores = k[keys, own] @ (q[i, own] + r_w[h]) + r[:, own] @ (q[i, own] + r_r[h])
                heads.append((scores / math.sqrt(HEAD_DIM)).softmax(0) @ v[keys, own])
            attended.append(torch.cat(heads))
        out = torch.stack(attended) @ self._matrix("func.dec_attn.o_net").T
        h = out + self.double["func.dec_attn.o_net.bias"] + z
        # Before or after: the feed-forward part is added to what has been normalised.
        h = F.layer_norm(h, (DIM,))
        inner = torch.relu(
            h @ self._matrix("func.pos_ff.ff1_net").T + self.double["func.pos_ff.ff1_net.bias"]
        )
        f = h + inner @ self._matrix("func.pos_ff.ff2_net").T + self.double["func.pos_ff.ff2_net.bias"]
        return f if self.pre_norm else F.layer_norm(f, (DIM,))

    def _biases(self) -> tuple[Tensor, Tensor]:
        return self.double["func.dec_attn.r_w_bias"], self.double["func.dec_attn.r_r_bias"]

    def _softmax(self, z: Tensor) -> Tensor:
        """Log-probabilities (V,) after a state (C,)."""
        edges = [0, *self.cutoffs, self.types]
        bands = []
        for i, (begin, end) in enumerate(pairwise(edges)):
            table, rows = (i, slice(None)) if self.div_val > 1 else (0, slice(begin, end))
            weight = self.double[f"crit.out_layers.{table}.weight"][rows]
            bias = self.double[f"crit.out_layers.{table}.bias"][rows]
            if i == 0 and self.cutoffs:
                weight = torch.cat([weight, self.double["crit.cluster_weight"]])
                bias = torch.cat([bias, self.double["crit.cluster_bias"]])
            projection = self.double.get(f"crit.out_projs.{i}.weight")
            features = z if projection is None else projection.T @ z
            bands.append((weight @ features + bias).log_softmax(0))
        # The class of band i is the i-th of the head from its end.
        tails = [bands[i] + bands[0][-i] for i in range(1, len(bands))]
        return torch.cat([bands[0][: edges[1]], *tails])
