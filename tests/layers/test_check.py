"""The checks of a layer find planted mistakes, and pass the layers that are right."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from variants import VARIANTS, draw_vectors

from fairseq_deq.check_layer import main
from fairseq_deq.layers.cache import ContextCache
from fairseq_deq.layers.check import assert_layer_is_sound, check_layer
from fairseq_deq.layers.composition import Composition
from fairseq_deq.layers.layer import Layer, PreparedLayer
from fairseq_deq.layers.transformer.layer import TransformerLayer
from fairseq_deq.layers.trellis.layer import TrellisLayer
from fairseq_deq.layers.window import BoundWindow, PreparedWindow, WindowLayer


class Gated(WindowLayer):
    """A gated causal convolution, which is right."""

    def __init__(self, dim: int = 12, taps: int = 3) -> None:
        super().__init__(dim, 2 * dim, window=taps)
        self.convolution = nn.Linear(taps * dim, 2 * dim)

    def forward(self, states, injection):
        value, gate = (self.convolution(states.flatten(1)) + injection).chunk(2, -1)
        return value.tanh() * gate.sigmoid()


class MixesRows(Gated):
    def forward(self, states, injection):
        return super().forward(states - states.mean(0), injection)


class Altered(Gated):
    """A layer with another f in the place of its own."""

    @staticmethod
    def altered(f):
        raise NotImplementedError

    def prepare(self, masks):
        altered = self.altered

        class Prepared(PreparedWindow):
            def bind(self, *arguments, **options):
                return altered(super().bind(*arguments, **options))

        return Prepared(self, masks)


class InPlace(Altered):
    @staticmethod
    def altered(f):
        return lambda z: f(z.mul_(0.5))


class WrongGradient(Gated):
    def forward(self, states, injection):
        return super().forward(states.detach() * 0.5 + states * 0.5, injection)


class WrongGradientOfWeights(Gated):
    def forward(self, states, injection):
        value, gate = (
            nn.functional.linear(states.flatten(1), self.convolution.weight.data) + injection
        ).chunk(2, -1)
        return value.tanh() * gate.sigmoid()


class DropsInside(Gated):
    def forward(self, states, injection):
        return super().forward(nn.functional.dropout(states, 0.5, self.training), injection)


class Whole(Layer):
    """z_t = tanh(W z_t + z_{t-1} / 2 + u_t), without a window; it is right."""

    class Prepared(PreparedLayer):
        def __init__(self, layer):
            self.layer = layer

        def context(self, record, injection, context):
            return Last(record[:, -1:].clone())

        def bind(self, injection, context, padding=None, start=0):
            first = injection.new_zeros(len(injection), 1, 12) if context is None else context.state
            hidden = None if padding is None else padding[:, -injection.shape[1] :].unsqueeze(-1)
            weight = self.layer.weight

            def f(z):
                before = torch.cat([first, z], 1)[:, :-1]
                own = (z.unsqueeze(-2) * weight).sum(-1)
                fz = torch.tanh(own + 0.5 * before + injection)
                return fz if hidden is None else fz.masked_fill(hidden, 0.0)

            return f

    def __init__(self):
        super().__init__(12, 12)
        self.weight = nn.Parameter(torch.zeros(12, 12))

    def prepare(self, masks):
        return self.Prepared(self)


class Last:
    def __init__(self, state):
        self.state = state

    def rows(self, index):
        return Last(self.state[index])


class LooksAhead(Whole):
    class Prepared(Whole.Prepared):
        def bind(self, injection, context, padding=None, start=0):
            f = super().bind(injection, context, padding, start)
            return lambda z: f(z) + 0.1 * nn.functional.pad(z, (0, 0, 0, 1))[:, 1:]


class IgnoresLeftPadding(Whole):
    class Prepared(Whole.Prepared):
        def bind(self, injection, context, padding=None, start=0):
            return super().bind(injection, context, None, start)


class ForgetsContext(Whole):
    class Prepared(Whole.Prepared):
        def context(self, record, injection, context):
            return Last(torch.zeros_like(record[:, -1:]))


class WrongCache(Whole):
    class Prepared(Whole.Prepared):
        def new_cache(self, batch):
            cache = ContextCache(self)
            cache.reorder = lambda order: None
            return cache


class OrdinaryLinear(Layer):
    """A matrix product whose rounding depends on how many rows there are."""

    class Prepared(PreparedLayer):
        def __init__(self, layer):
            self.layer = layer

        def context(self, record, injection, context):
            return Last(record[:, -1:].clone())

        def bind(self, injection, context, padding=None, start=0):
            return lambda z: torch.tanh(self.layer.linear(z) + injection)

    def __init__(self):
        super().__init__(67, 67)
        self.linear = nn.Linear(67, 67)

    def prepare(self, masks):
        return self.Prepared(self)


class WrongShape(Gated):
    def forward(self, states, injection):
        return super().forward(states, injection)[:, :3].repeat(1, 2)


class WrongRestriction(Altered):
    @staticmethod
    def altered(f):
        return HoldsItself(f.segment)


class HoldsItself(BoundWindow):
    def restrict(self, z, positions, value=None):
        held = super().restrict(z, positions, value)(z.reshape(-1, z.shape[-1])[positions])
        return lambda rows: held


class WrongAdjoint(Altered):
    @staticmethod
    def altered(f):
        return NoTranspose(f.segment)


class NoTranspose(BoundWindow):
    def adjoint(self, z, grad):
        return lambda vector: vector + grad


PLANTED = [
    (LooksAhead, "causality", "comes later"),
    (MixesRows, "batch mates", "other rows"),
    (IgnoresLeftPadding, "left padding", "bind's `padding`"),
    (WrongCache, "decoding", "after `reorder`"),
    (InPlace, "nothing in place", "writes to the state"),
    (WrongGradient, "gradient", "of the state"),
    (WrongGradientOfWeights, "gradient", "convolution.weight"),
    (DropsInside, "dropout held", "instead of using nn.Dropout"),
    (ForgetsContext, "memory", "`context` must keep"),
    (OrdinaryLinear, "batch mates", "rowwise_linear"),
    (WrongShape, "shapes", "same shape"),
    (WrongRestriction, "some positions", "restrict"),
    (WrongAdjoint, "adjoint", "J^T"),
]


@pytest.mark.parametrize(("layer", "contract", "advice"), PLANTED, ids=lambda x: getattr(x, "__name__", ""))
def test_a_planted_mistake_is_found_and_its_sentence_says_what_to_change(layer, contract, advice):
    first = next(check for check in check_layer(layer) if check.fault)
    assert first.name == contract, first.fault
    assert advice in first.fault
    with pytest.raises(AssertionError, match=contract):
        assert_layer_is_sound(layer)


def _transformer(**options):
    sizes = {"dim": 12, "ffn_dim": 20, "heads": 2, "head_dim": 6, "pre_norm": False, "weight_norm": True}
    layer = TransformerLayer(
        **(sizes | {"dropout": 0.3, "attention_dropout": 0.3, "local_size": 0} | options)
    )
    draw_vectors(layer)
    return layer


def _trellis():
    return TrellisLayer(8, 4, kernel_size=3, weight_norm=True, dropout=0.3, weight_dropout=0.3)


SOUND = {
    "window": Gated,
    "window, dropout": lambda: Dropped(),
    "whole": Whole,
    "transformer": _transformer,
    "transformer, pre-norm, local": lambda: _transformer(pre_norm=True, local_size=4),
    **{f"transformer, {variant}": partial(_transformer, **variant) for variant in VARIANTS},
    "trellis": _trellis,
    "several transformers": lambda: Composition([_transformer(), _transformer(pre_norm=True)]),
    "several windows": lambda: Composition([Gated(12, 2), Gated(12, 4)]),
}


class Dropped(Gated):
    def __init__(self):
        super().__init__(12, 3)
        self.state_dropout = 0.4


@pytest.mark.parametrize("make", SOUND.values(), ids=SOUND)
def test_the_layers_of_the_package_are_sound(make):
    assert_layer_is_sound(make)


def test_the_command_prints_each_contract_and_fails_with_a_fault(capsys):
    assert main([f"{__file__}:Gated", "taps=4"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 12
    assert all(line.startswith("ok") for line in printed)
    assert main([f"{__file__}:LooksAhead"]) == 1
    assert "FAULT causality: position" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["Gated"], "must name a module or file and a class"),
        (["nowhere.py:Gated"], "there is no file nowhere.py"),
        (["no_such_module:Gated"], "No module named"),
        ([f"{__file__}:Missing"], "has no subclass of Layer called 'Missing'; it has: Gated"),
        ([f"{__file__}:Gated", "width=3"], "with a name out of dim, taps"),
    ],
)
def test_a_mistake_in_the_command_is_one_sentence(arguments, sentence, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert sentence in printed[0]


def test_it_runs_as_a_module_and_needs_no_fairseq_itself():
    code = "import sys, fairseq_deq.check_layer; assert 'fairseq' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
