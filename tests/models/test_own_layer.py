"""A layer of one's own becomes a model of fairseq, with its sizes as options."""

from __future__ import annotations

import itertools

import pytest
import torch
from fairseq.models import MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
from models.builders import EXACT, decode, features, task, taught, tokens
from torch import nn

from fairseq_deq.errors import OptionError
from fairseq_deq.layers.composition import Composition
from fairseq_deq.layers.layer import Layer
from fairseq_deq.layers.window import WindowLayer
from fairseq_deq.models.own_layer import register_layer

_NAMES = (f"own_layer_{i}" for i in itertools.count())


class Gated(WindowLayer):
    """A layer with an argument of every kind."""

    def __init__(
        self, dim: int, taps: int = 3, scale: float = 1.0, bias: bool = True, kind: str = "tanh", dropout=0.0
    ) -> None:
        if kind not in ("tanh", "sigmoid"):
            raise ValueError(f"kind must be tanh or sigmoid, got {kind!r}")
        super().__init__(dim, dim, window=taps, dropout=dropout)
        self.scale, self.kind = scale, kind
        self.linear = nn.Linear(taps * dim, dim, bias=bias)

    def forward(self, states, injection):
        return getattr(torch, self.kind)(self.linear(self.scale * states.flatten(1)) + injection)


def _registered(layer: type[Layer] = Gated) -> str:
    name = next(_NAMES)
    assert register_layer(name)(layer) is layer
    return name


def _build(name: str, **options):
    config = MODEL_DATACLASS_REGISTRY[name](**(EXACT | {"init_std": 0.1} | options))
    torch.manual_seed(0)
    return MODEL_REGISTRY[name].build_model(config, task())


def test_arguments_become_options_with_their_defaults():
    config = MODEL_DATACLASS_REGISTRY[_registered()]()
    found = {
        name: getattr(config, name) for name in ("taps", "scale", "bias", "kind", "dropout", "decoder_layers")
    }
    assert found == {
        "taps": 3,
        "scale": 1.0,
        "bias": "true",
        "kind": "tanh",
        "dropout": 0.0,
        "decoder_layers": 1,
    }
    assert not hasattr(config, "dim")


def test_options_reach_the_layer():
    model = _build(
        _registered(), taps=2, scale=0.5, bias="false", kind="sigmoid", dropout=0.25, decoder_layers=2
    )
    layer = model.decoder.layer
    assert isinstance(layer, Composition)
    for part in layer.parts:
        assert (part.window, part.scale, part.kind) == (2, 0.5, "sigmoid")
        assert (part.state_dim, part.state_dropout, part.linear.bias) == (16, 0.25, None)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kind": "relu"}, "Gated: kind must be tanh or sigmoid, got 'relu'"),
        ({"taps": 0}, "Gated: window of a layer must be at least 1, got 0"),
        ({"taps": 2.5}, "--taps must be a whole number"),
        ({"bias": "maybe"}, "--bias must be true or false"),
        ({"decoder_layers": 0}, "--decoder-layers must be in"),
        ({"solver_scope": "recurrence"}, "recurrence"),
    ],
    ids=str,
)
def test_a_value_that_cannot_work_is_refused_in_a_sentence(options, sentence):
    with pytest.raises(OptionError, match=sentence):
        _build(_registered(), **options)


class NoDefault(Gated):
    def __init__(self, dim: int, taps: int) -> None:
        super().__init__(dim, taps)


class Swallows(Gated):
    def __init__(self, dim: int, **rest) -> None:
        super().__init__(dim, **rest)


class ListDefault(Gated):
    def __init__(self, dim: int, sizes=(1, 2)) -> None:
        super().__init__(dim)


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (NoDefault, "taps needs a default"),
        (Swallows, r"has \*rest: name its arguments"),
        (ListDefault, "sizes needs a default that is a bool, int, float or str"),
        (nn.Linear, "is for a subclass of Layer"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_layer_whose_arguments_cannot_become_options_is_refused(layer, sentence):
    with pytest.raises(TypeError, match=sentence):
        register_layer(next(_NAMES))(layer)


@pytest.mark.parametrize("options", [{}, {"taps": 5}, {"decoder_layers": 2}], ids=str)
def test_decoding_memory_and_a_learned_solve_are_those_of_the_whole_text(options):
    model = taught(_build(_registered(), mem_len=8, f_eps=1e-8, **options).double())
    source = tokens(3, 14)
    with torch.no_grad():
        whole, _ = model(source)
        first, extra = model(source[:, :6])
        second, _ = model(source[:, 6:], memory=extra["memory"])
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-6)
    assert torch.allclose(decode(model, source, steps_at_once=4)[0], whole[:, 3:], atol=1e-6)


@pytest.mark.parametrize("budget", [1, 3, 40])
def test_causality_and_batch_mates_are_bitwise(budget):
    model = _build(_registered(), f_thres=budget, f_eps=1e-4, f_solver="anderson").float().eval()
    source = tokens(3, 20)
    whole = features(model, source)
    changed = source.clone()
    changed[:, 9] = (changed[:, 9] - 3) % 48 + 4
    assert torch.equal(features(model, changed)[:, :9], whole[:, :9])
    assert torch.equal(features(model, source[1:2]), whole[1:2])


def test_left_padding_changes_nothing():
    model = _build(_registered(), f_eps=1e-8).double().eval()
    source = tokens(3, 20)
    padded = torch.nn.functional.pad(source, (4, 0), value=1)
    assert torch.allclose(features(model, padded)[:, 4:], features(model, source), atol=1e-6)


def test_a_softmax_that_shares_the_embeddings_needs_features_of_their_width():
    class Wide(Gated):
        def __init__(self, dim: int) -> None:
            super().__init__(dim)
            self.output_dim = 2 * dim

    with pytest.raises(OptionError, match="--share-decoder-input-output-embed"):
        _build(_registered(Wide), share_decoder_input_output_embed="true")
