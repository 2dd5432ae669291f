"""The DEQ-Transformer layer: relative attention and feed-forward, with the input injected into q, k and v.

Part of a model that fairseq_deq exported (MIT licence).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .options_deq import ModelOptions

# Buffers of keys and values grow to this many positions, or by a quarter.
LEAST_CAPACITY = 64
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class TransformerLayer(nn.Module):
    """One Transformer-XL layer f(z; u), to be solved for z = f(z; u).

    With [q, k, v] = W_qkv z + u over all positions up to that of the query,
        A_ij = ((q_i + r_w) . k_j + (q_i + r_r) . (W_r R_{i-j})) / sqrt(D),  a = W_o softmax(A) v,
        or with rotary positions A_ij = (G_i q_i) . (G_j k_j) / sqrt(D), where G_i rotates by angles that grow
        with i (see `turned`),
        F(x) = W_2 act(W_1 x), or gated F(x) = W_2 (act(W_1 x) * W_3 x),
    post-norm:  h = LN(a + z),  f = LN(h + F(h)),
    pre-norm:   h = a + z with attention on LN(z),  f = LN(h + F(LN(h))).
    With `input_residual`, u has a further part u_h, and a + z + u_h takes the place of a + z. With
    `closing_norm` False, h = LN(a + z) in both forms, and f = h + F(h). Each LN is a `Norm` with its own
    parameters, if any.

    Args:
        o: options of the model. `pre_norm` chooses the form, and `activation` is act (relu, gelu or silu).
    Source: Dai et al. (2019, arXiv 1901.02860); Bai, Kolter, Koltun (2019, arXiv 1909.01377).
    """

    def __init__(self, o: ModelOptions) -> None:
        super().__init__()
        dim, heads, head_dim, ffn_dim = o.embed_dim, o.heads, o.head_dim, o.ffn_dim
        self.dim, self.heads, self.head_dim, self.local_size = dim, heads, head_dim, o.local_size
        self.input_residual = o.input_residual
        self.activation = ACTIVATIONS[o.activation]
        inner = heads * head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.rotary = o.positions == "rotary"
        self.relative = None if self.rotary else nn.Linear(dim, inner, bias=False)
        self.out = nn.Linear(inner, dim)
        self.ffn_in = nn.Linear(dim, ffn_dim)
        self.ffn_gate = nn.Linear(dim, ffn_dim) if o.gated_ffn else None
        self.ffn_out = nn.Linear(ffn_dim, dim)
        self.attention_norm = Norm(dim, o.norm, o.norm_affine) if o.pre_norm else None
        self.middle_norm = Norm(dim, o.norm, o.norm_affine)
        self.closing_norm = Norm(dim, o.norm, o.norm_affine) if o.closing_norm else None
        if not self.rotary:
            self.content_bias = nn.Parameter(torch.zeros(heads, head_dim))  # r_w
            self.position_bias = nn.Parameter(torch.zeros(heads, head_dim))  # r_r

    @property
    def state_dim(self) -> int:
        """Channels of the state, C."""
        return self.dim

    @property
    def injection_dim(self) -> int:
        """Channels of the injection u."""
        return 3 * self.heads * self.head_dim + (self.dim if self.input_residual else 0)

    def output(self, state: Tensor) -> Tensor:
        """The features that the softmax reads: the states."""
        return state

    def beginning(self, batch: int, like: Tensor) -> KeysValues:
        """The past at the beginning of a text: no positions."""
        return KeysValues(self, like.new_zeros(2, batch, self.heads, 0, self.head_dim))

    def by_distance(self, capacity: int, like: Tensor) -> Tensor | None:
        """W_r R at distances capacity-1 ... 0, (H, D, capacity); None if positions are rotary."""
        if self.relative is None:
            return None
        distance = torch.arange(capacity - 1, -1, -1, device=like.device)
        table = F.linear(sinusoid(distance, self.dim).to(like.dtype), self.relative.weight)
        return table.unflatten(-1, (self.heads, self.head_dim)).permute(1, 2, 0)

    def bind(self, u: Tensor, past: KeysValues, lengths: Tensor) -> BoundTransformer:
        """f over the positions that follow; what does not depend on z is computed here, once.

        Args:
            u: injections, (B, T, 3*H*D), or with u_h (B, T, 3*H*D + C).
            past: keys and values of the positions before; f writes its own after them.
            lengths: number of positions before, (B,).
        """
        return BoundTransformer(self, u, past, lengths)


class Norm(nn.Module):
    """Layer norm or RMS norm of each row: gain * x^ + bias.

    Layer norm has x^ = (x - mean(x)) / std(x), and RMS norm x^ = x / rms(x) and no bias.

    Args:
        dim: channels of x.
        kind: `layer` or `rms`.
        affine: False: there is no gain and no bias.
    """

    def __init__(self, dim: int, kind: str, affine: bool) -> None:
        super().__init__()
        self.kind = kind
        self.gain = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine and kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        """x normalised, in the same shape."""
        if self.kind == "rms":
            return F.rms_norm(x, x.shape[-1:], self.gain, 1e-5)
        return F.layer_norm(x, x.shape[-1:], self.gain, self.bias, 1e-5)


class KeysValues:
    """Keys and values of each text from its first position on, in buffers that grow.

    Args:
        layer: the layer that they belong to.
        buffers: (2, B, H, capacity, D).
        relative: W_r R for as many distances, distance 0 last, (H, D, capacity); None: it is computed.
    """

    def __init__(self, layer: TransformerLayer, buffers: Tensor, relative: Tensor | None = None) -> None:
        self.layer, self.buffers = layer, buffers
        self.relative = layer.by_distance(buffers.shape[3], buffers) if relative is None else relative

    def reserve(self, columns: int) -> None:
        """Make room for `columns` positions of each text."""
        capacity = self.buffers.shape[3]
        if columns > capacity:
            wanted = max(columns, LEAST_CAPACITY, capacity + capacity // 4)
            self.buffers = F.pad(self.buffers, (0, 0, 0, wanted - capacity))
            self.relative = self.layer.by_distance(wanted, self.buffers)

    def reordered(self, order: Tensor) -> KeysValues:
        """The texts with these indices, (B',), in that order."""
        return KeysValues(self.layer, self.buffers.index_select(1, order), self.relative)


class BoundTransformer:
    """z -> f(z) over (B, T, C), for the positions that follow `past`."""

    def __init__(self, layer: TransformerLayer, u: Tensor, past: KeysValues, lengths: Tensor) -> None:
        self.layer, self.past = layer, past
        self.batch, self.length = u.shape[:2]
        first = int(lengths.min())
        self.uniform = first == int(lengths.max())
        longest = int(lengths.max()) + self.length
        # With a multiple of 16 keys a sum over them rounds the same, however many of them are hidden.
        self.columns = longest if self.length == 1 else longest + -longest % 16
        past.reserve(self.columns)
        inner = layer.heads * layer.head_dim
        scale = layer.head_dim**-0.5
        self.query = layer.qkv.weight[:inner] * scale
        self.key_value = layer.qkv.weight[inner:]
        # r_w is added to q just as u_q is; both are scaled by 1/sqrt(D), as q is.
        bias = 0.0 if layer.rotary else layer.content_bias.flatten()
        self.query_injection = (u[..., :inner] + bias) * scale
        self.kv_injection = u[..., inner : 3 * inner]
        self.residual = u[..., 3 * inner :] if layer.input_residual else None
        self.position = lengths.unsqueeze(1) + torch.arange(self.length, device=u.device)  # (B, T)
        self.angles = angles(self.position, layer.head_dim, u) if layer.rotary else None
        self.first = first
        self._set_distances(u, scale)

    def __call__(self, z: Tensor) -> Tensor:
        layer, batch, length = self.layer, self.batch, self.length
        rows = z.reshape(batch * length, -1)
        normed = self._normed(rows)
        query = F.linear(normed, self.query).view(batch, length, -1) + self.query_injection
        query = self._split(query if self.angles is None else turned(query, self.angles))
        keys, values = self._write(normed)
        scores = torch.matmul(query, keys.transpose(2, 3))  # (B, H, T, columns)
        if self.relative is not None:
            by_distance = torch.matmul(query, self.relative)
            if self.by_key is not None:
                by_distance = by_distance.gather(3, self.by_key.expand(batch, layer.heads, -1, -1))
            scores = scores.add_(by_distance)
        scores = scores.add_(self.bias)
        attended = torch.matmul(scores.softmax(-1), values).transpose(1, 2).reshape(batch * length, -1)
        h = F.linear(attended, layer.out.weight, layer.out.bias) + rows
        if self.residual is not None:
            h = h + self.residual.reshape(batch * length, -1)
        normed = layer.middle_norm(h)
        if layer.attention_norm is None or layer.closing_norm is None:
            h = normed
        inner = layer.activation(layer.ffn_in(normed))
        if layer.ffn_gate is not None:
            inner = inner * layer.ffn_gate(normed)
        out = layer.ffn_out(inner) + h
        return (out if layer.closing_norm is None else layer.closing_norm(out)).view_as(z)

    def part(self, rows: Tensor, begin: int) -> BoundTransformer:
        """f at some rows (b,) and times from `begin` on; the others keep the states of the latest evaluation.

        It has its own copy of keys and values, so its evaluations do not change those of the whole.
        """
        part = copy.copy(self)
        part.batch, part.length, part.first = len(rows), self.length - begin, self.first + begin
        for name in ("query_injection", "kv_injection", "position"):
            setattr(part, name, getattr(self, name).index_select(0, rows)[:, begin:])
        for name in ("bias", "by_key"):
            of_all = getattr(self, name)
            if of_all is not None:
                of_rows = of_all if self.uniform else of_all.index_select(0, rows)
                setattr(part, name, of_rows[:, :, begin:])
        if self.residual is not None:
            part.residual = self.residual.index_select(0, rows)[:, begin:]
        if self.angles is not None:
            part.angles = self.angles.index_select(1, rows)[:, :, begin:]
        part.past = self.past.reordered(rows)
        return part

    def settle(self, z: Tensor, counts: Tensor) -> KeysValues:
        """The past after these positions, settled at z.

        Args:
            z: their states, (B, T, C).
            counts: how many of them are real in each text, (B,); the caller adds them to the lengths.
        """
        self._write(self._normed(z.reshape(self.batch * self.length, -1)))
        return self.past

    def column(self, z: Tensor, t: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """Raise NotImplementedError: all positions of a Transformer are solved side by side."""
        raise NotImplementedError("a Transformer has no solver_scope recurrence; use position")

    def _normed(self, rows: Tensor) -> Tensor:
        return rows if self.layer.attention_norm is None else self.layer.attention_norm(rows)

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, H*D) -> (B, H, T, D)."""
        return x.unflatten(-1, (self.layer.heads, self.layer.head_dim)).transpose(1, 2)

    def _write(self, normed: Tensor) -> Tensor:
        """Write the positions' own keys and values after the past; all, (2, B, H, columns, D)."""
        own = F.linear(normed, self.key_value).view_as(self.kv_injection) + self.kv_injection
        if self.angles is not None:
            keys, values = own.chunk(2, -1)
            own = torch.cat([turned(keys, self.angles), values], -1)
        buffers = self.past.buffers
        for buffer, new in zip(buffers, own.chunk(2, -1)):
            new = self._split(new)
            if self.uniform:
                buffer[:, :, self.first : self.first + self.length] = new
            else:
                place = self.position[:, None, :, None].expand_as(new)
                buffer.scatter_(2, place, new)
        return buffers[:, :, :, : self.columns]

    def _set_distances(self, like: Tensor, scale: float) -> None:
        """Compute what the scores contain besides q . k.

        These are W_r R by distance, the column of the distance between each query and key, and the part that
        does not depend on z, with the mask.
        """
        layer, columns, device = self.layer, self.columns, like.device
        position = self.position[:1] if self.uniform else self.position
        gap = position.unsqueeze(2) - torch.arange(columns, device=device)  # (1 or B, T, columns)
        by_key = (columns - 1 - gap.clamp(min=0)).unsqueeze(1)
        self.relative, relative = None, self.past.relative
        bias = like.new_zeros(1, 1, *gap.shape[1:])
        if relative is not None:
            self.relative = relative = relative[..., -columns:]  # (H, D, columns), the nearest last
            # q + r_r = (q + r_w) + (r_r - r_w), where the second part is the same for every query.
            extra = ((layer.position_bias - layer.content_bias) * scale).unsqueeze(1)  # (H, 1, D)
            bias = torch.bmm(extra, relative).squeeze(1)[:, by_key.squeeze(1)].transpose(0, 1)
        hidden = gap < 0
        if layer.local_size:
            hidden = hidden | (gap >= layer.local_size)
        self.bias = bias.masked_fill(hidden.unsqueeze(1), float("-inf"))  # (1 or B, H, T, columns)
        # One position per text, at the same index in all: the distances are in the order of the keys.
        alone = self.uniform and self.length == 1
        self.by_key = None if alone or relative is None else by_key


def angles(position: Tensor, head_dim: int, like: Tensor) -> Tensor:
    """cos and sin of position / 10000^(2*j/D), each written twice, (2, B, T, 1, D), for positions (B, T)."""
    inverse = 10000 ** (-torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float64) / head_dim)
    angle = (position.unsqueeze(-1) * inverse).repeat(1, 1, 2).unsqueeze(2)
    return torch.stack([angle.cos(), angle.sin()]).to(like.dtype)


def turned(x: Tensor, by: Tensor) -> Tensor:
    """x (B, T, H*D), channels j and j + D/2 of each head rotated; `by` has cos and sin of the angles."""
    heads = x.unflatten(-1, (-1, by.shape[-1]))
    a, b = heads.chunk(2, -1)
    return (heads * by[0] + torch.cat([-b, a], -1) * by[1]).flatten(-2)


def sinusoid(distance: Tensor, dim: int) -> Tensor:
    """[sin; cos] of distance / 10000^(2*j/dim), j = 0 ... dim/2 - 1, (len(distance), dim), in float32."""
    inverse = 10000 ** (-torch.arange(0, dim, 2, device=distance.device, dtype=torch.float32) / dim)
    angle = distance.float().unsqueeze(1) * inverse
    return torch.cat([angle.sin(), angle.cos()], 1)[:, :dim]
