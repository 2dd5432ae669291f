"""Checks of a layer, each of which returns one sentence that says what is wrong and what to change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adjoint import HasAdjoint
from ..solvers import Restrictable
from .layer import Layer, Map, PreparedLayer, recorded
from .weight_norm import Initializer

# Numbers of samples and positions, and the position at which a text is cut into two segments.
_B, _T, _CUT = 3, 21, 8
# A difference larger than this, relative to the size of f, is not due to rounding in float64.
_ROUNDING = 1e-9
_STEP = 1e-6  # of finite differences
_SLOPE = 1e-4  # relative error that a slope may have


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: what was checked.
        fault: what is wrong and what to change; empty if nothing is wrong.
    """

    name: str
    fault: str


def check_layer(make: Callable[[], Layer], seed: int = 0) -> list[Check]:
    """Check a layer, without solving for an equilibrium.

    Args:
        make: makes the layer, with the sizes to try; it is called several times.
        seed: of the layer's weights, and of the states at which it is evaluated.
    Returns:
        a list of `Check`. Mend faults in this order, because one fault can cause later ones.
    """
    checks: list[Check] = []
    subject = _Subject(make, seed)
    for name, check in _CHECKS.items():
        try:
            fault = check(subject)
        except Exception as error:  # a layer that is being written can fail in any way
            fault = f"it raises {type(error).__name__}: {error}"
        checks.append(Check(name, fault))
        if fault and name == "shapes":
            break  # nothing else can be tried
    return checks


def assert_layer_is_sound(make: Callable[[], Layer], seed: int = 0) -> None:
    """For tests: raise AssertionError with the faults of a layer, if it has any.

    Args:
        make, seed: as for `check_layer`.
    Raises:
        AssertionError: the layer has faults; a line for each.
    """
    faults = [f"{check.name}: {check.fault}" for check in check_layer(make, seed) if check.fault]
    assert not faults, "\n".join(faults)


class _Subject:
    """The layer to check, in evaluation mode and float64, with its f and random states and injections."""

    def __init__(self, make: Callable[[], Layer], seed: int) -> None:
        self.make, self.seed = make, seed
        self.layer = self.layer_in(torch.float64)
        self.prepared = self.prepared_of(self.layer)
        self.z = self.draw(self.layer.state_dim, 1)
        self.u = self.draw(self.layer.injection_dim, 2)

    def layer_in(self, dtype: torch.dtype, training: bool = False) -> Layer:
        torch.manual_seed(self.seed)
        layer = self.make()
        layer.initialize(Initializer("normal", 0.3, 1.0))
        return layer.to(dtype).train(training)

    def draw(self, channels: int, seed: int, length: int = _T) -> Tensor:
        """Random numbers, (B, length, channels)."""
        generator = torch.Generator().manual_seed(self.seed + 10 * seed)
        return torch.randn(_B, length, channels, generator=generator, dtype=torch.float64)

    @staticmethod
    def prepared_of(layer: Layer, batch: int = _B) -> PreparedLayer:
        like = next((p for p in layer.parameters()), torch.zeros(1, dtype=torch.float64))
        return layer.prepare(layer.draw(batch, _T, 0, like))

    def f(self, u: Tensor | None = None, **given: Any) -> Map:
        return self.prepared.bind(self.u if u is None else u, None, **given)


def _far(a: Tensor, b: Tensor) -> bool:
    """Whether two values of f differ by more than rounding, or are not finite."""
    return not bool(((a - b).abs() <= _ROUNDING * (1 + b.abs())).all())


def _shapes(s: _Subject) -> str:
    if not isinstance(s.layer, Layer):
        return f"{type(s.layer).__name__} is not a subclass of fairseq_deq.layers.layer.Layer; make it one"
    fz = s.f()(s.z)
    if fz.shape != s.z.shape:
        return f"f maps states {tuple(s.z.shape)} to {tuple(fz.shape)}; return a state of the same shape"
    if not bool(torch.isfinite(fz).all()):
        return "f is not finite at random states of size 1; look for a division or a logarithm"
    features = s.layer.output(s.z)
    if features.shape != (_B, _T, s.layer.output_dim):
        return (
            f"output gives {tuple(features.shape)}, and output_dim is {s.layer.output_dim}; make them agree"
        )
    return ""


def _in_place(s: _Subject) -> str:
    kept, f = s.z.clone(), s.f()
    first = f(s.z).clone()
    if not torch.equal(kept, s.z):
        s.z = kept
        return "f writes to the state it is given; write z = z + ..., not z += ..., and relu, not relu_"
    if not torch.equal(first, f(s.z)):
        return (
            "f gives two different results for the same state; store nothing on the layer between evaluations"
        )
    return ""


def _dropout(s: _Subject) -> str:
    layer = s.layer_in(torch.float64, training=True)
    f = s.prepared_of(layer).bind(s.u, None)
    if not torch.equal(f(s.z), f(s.z)):
        return (
            "in training f gives two different results for the same state; draw dropout masks in `draw`, "
            "once per forward pass, instead of using nn.Dropout or F.dropout in f"
        )
    return ""


def _causality(s: _Subject) -> str:
    t, before = 12, s.f()(s.z)
    for changed, name in ((s.z.clone(), "states"), (s.u.clone(), "injections")):
        changed[:, t] += 1.0
        after = s.f()(changed) if name == "states" else s.f(changed)(s.z)
        if not torch.equal(after[:, :t], before[:, :t]):
            first = int((after != before).any(-1).any(0).nonzero()[0])
            return (
                f"position {first} changes with the {name} of position {t}, which comes later; "
                "let each position depend only on itself and on earlier positions"
            )
    return ""


def _batch(s: _Subject) -> str:
    whole, others = s.f()(s.z), s.z.clone()
    others[[0, 2]] += 1.0
    if not torch.equal(s.f()(others)[1], whole[1]):
        return (
            "the result of a row changes with the states of other rows; take no mean or norm over the batch"
        )
    for dtype in (torch.float32, torch.float64):
        layer = s.layer_in(dtype)
        for length in (1, 2, 3, _T):
            z, u = s.z[:, :length].to(dtype), s.u[:, :length].to(dtype)
            alone = s.prepared_of(layer, 1).bind(u[1:2], None)(z[1:2])
            together = s.prepared_of(layer).bind(u, None)(z)[1:2]
            if not torch.equal(alone, together):
                return (
                    f"a row alone and the same row in a batch round differently ({dtype}, length {length}); "
                    "use rowwise_linear of fairseq_deq.invariant_matmul, or make it a WindowLayer"
                )
    return ""


def _right_padding(s: _Subject) -> str:
    cut = s.prepared.bind(s.u[:, :_CUT], None)(s.z[:, :_CUT])
    if _far(cut, s.f()(s.z)[:, :_CUT]):
        return (
            "the result of a text changes with what follows it; let f depend only on positions up to its own"
        )
    return ""


def _left_padding(s: _Subject) -> str:
    pad = 5
    hidden = torch.zeros(_B, pad + _T, dtype=torch.bool)
    hidden[:, :pad] = True
    garbage = [torch.cat([s.draw(x.shape[-1], 3, pad), x], 1) for x in (s.z, s.u)]
    padded = s.f(garbage[1], padding=hidden)
    if _far(padded(garbage[0])[:, pad:], s.f()(s.z)):
        # A layer may also set f to zero at padding, since states before a text are zero. Then the result must
        # agree once the states at padding are those that f gives.
        garbage[0][:, :pad] = padded(garbage[0])[:, :pad]
        if _far(padded(garbage[0])[:, pad:], s.f()(s.z)):
            return (
                "the result of a text changes when padding precedes it; hide the positions that "
                "bind's `padding` marks, or make f zero there if your layer reads zeros before a text"
            )
    return ""


def _restriction(s: _Subject) -> str:
    f = s.f()
    if not isinstance(f, Restrictable):
        return ""
    width, positions = s.z.shape[-1], torch.tensor([0, 3, 4, _T + 2, 2 * _T + 20])
    rows = s.z.reshape(-1, width)[positions]
    if _far(f.restrict(s.z, positions, None)(rows), f(s.z).reshape(-1, width)[positions]):
        return "restrict(z, positions) differs from f at these positions; see WindowLayer for a correct one"
    moved = s.z.reshape(-1, width).index_copy(0, positions, rows + 0.5).view_as(s.z)
    if _far(f.restrict(s.z, positions, None)(rows + 0.5), f(moved).reshape(-1, width)[positions]):
        return "restrict is wrong when its rows change together; only the other positions are held at z"
    return ""


def _memory(s: _Subject) -> str:
    whole, first = s.f()(s.z), s.prepared.bind(s.u[:, :_CUT], None)
    context = s.prepared.context(recorded(first, s.z[:, :_CUT]), s.u[:, :_CUT], None)
    for begin, end in ((_CUT, _CUT + 2), (_CUT + 2, _T)):
        f = s.prepared.bind(s.u[:, begin:end], context)
        if _far(f(s.z[:, begin:end]), whole[:, begin:end]):
            return (
                "a text in several segments differs from the same text in one; `context` must keep "
                "everything that later positions see of a segment, and of the context before it"
            )
        context = s.prepared.context(recorded(f, s.z[:, begin:end]), s.u[:, begin:end], context)
    return ""


def _cache(s: _Subject) -> str:
    whole, cache, order = s.f()(s.z), s.prepared.new_cache(_B), torch.tensor([2, 0, 0])
    f = cache.bind(s.u[:, :_CUT], None)
    cache.append(recorded(f, s.z[:, :_CUT]), s.u[:, :_CUT])
    z, u = s.z, s.u
    for t in range(_CUT, _T):
        if t == _CUT + 3:  # as beam search does
            cache.reorder(order)
            whole, z, u = whole[order], z[order], u[order]
        f = cache.bind(u[:, t : t + 1], None)
        if _far(f(z[:, t : t + 1]), whole[:, t : t + 1]):
            when = " after `reorder`" if t >= _CUT + 3 else ""
            return (
                f"token {t} from the cache{when} differs from the whole text; `append` must keep, "
                "and `bind` must read, everything that a new token sees of earlier ones"
            )
        cache.append(recorded(f, z[:, t : t + 1]), u[:, t : t + 1])
        if cache.length != t + 1:
            return f"cache.length is {cache.length} after {t + 1} tokens"
    return ""


def _slopes(s: _Subject) -> str:
    """Compare autograd with finite differences: of z, of u, and of every parameter."""
    weighting = s.draw(s.layer.state_dim, 4)
    named = {"the state": s.z, "the injection": s.u, **dict(s.layer.named_parameters())}

    def loss(z: Tensor, u: Tensor) -> Tensor:
        return (s.prepared_of(s.layer).bind(u, None)(z) * weighting).sum()

    z, u = s.z.clone().requires_grad_(), s.u.clone().requires_grad_()
    leaves = [z, u, *s.layer.parameters()]
    gradients = torch.autograd.grad(loss(z, u), leaves, allow_unused=True)
    for (name, value), gradient in zip(named.items(), gradients):
        torch.manual_seed(s.seed)
        along = torch.randn_like(value)
        told = 0.0 if gradient is None else float((gradient * along).sum())
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                kept = value.clone()
                value.add_(along, alpha=sign * _STEP)
                ends.append(float(loss(s.z, s.u)))
                value.copy_(kept)
        slope = (ends[0] - ends[1]) / (2 * _STEP)
        if abs(told - slope) > _SLOPE * (1 + abs(slope)):
            return (
                f"the gradient of {name} is {told:.4g}, but f has the slope {slope:.4g}; look for detach, "
                ".data, no_grad, or a backward of your own"
            )
    return ""


def _adjoint(s: _Subject) -> str:
    f, grad, vector = s.f(), s.draw(s.layer.state_dim, 5), s.draw(s.layer.state_dim, 6)
    if not isinstance(f, HasAdjoint):
        return ""
    z = s.z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(z), z, vector)
    if _far(f.adjoint(s.z, grad)(vector), expected + grad):
        return "adjoint(z, grad)(v) differs from autograd's J^T v + grad; correct it, or leave it out"
    return ""


_CHECKS: dict[str, Callable[[_Subject], str]] = {
    "shapes": _shapes,
    "nothing in place": _in_place,
    "dropout held": _dropout,
    "batch mates": _batch,
    "causality": _causality,
    "right padding": _right_padding,
    "left padding": _left_padding,
    "some positions": _restriction,
    "memory": _memory,
    "decoding": _cache,
    "gradient": _slopes,
    "adjoint": _adjoint,
}
