"""A layer of your own as a model of fairseq: the arguments of its `__init__` become options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field, make_dataclass
from typing import Any, TypeVar

from fairseq.models import register_model

from ..errors import OptionError
from ..layers.composition import compose
from ..layers.layer import Layer
from ..options import check_values, flag, is_on, option, switch
from .deq_config import DEQLanguageModelConfig
from .deq_decoder import DEQDecoder
from .deq_language_model import DEQLanguageModel
from .segment_decoder import InputOptions

OwnLayer = TypeVar("OwnLayer", bound=type[Layer])

# An argument of this name is the width of the model, `--decoder-embed-dim`.
_WIDTH = "dim"
_KINDS = (bool, int, float, str)


def register_layer(name: str) -> Callable[[OwnLayer], OwnLayer]:
    """Register a layer as the model that `--arch name` trains.

    The model is that of the package: embeddings, softmax, solves, memory, decoding. The arguments of the
        layer's
    `__init__` become options: `dim` is `--decoder-embed-dim`; an argument with the name of an option that
    every model has, such as `dropout`, takes its value; any other one has a default, a bool, int, float or
    str, and is an option of its own, so that `taps: int = 3` is `--taps`.

    Args:
        name: of the model; another `--user-dir` may hold the file.
    Returns:
        what decorates the class of the layer.
    Raises:
        TypeError: the layer is no `Layer`, or an argument cannot become an option.
    """

    def decorate(layer_class: OwnLayer) -> OwnLayer:
        if not (isinstance(layer_class, type) and issubclass(layer_class, Layer)):
            raise TypeError(f"register_layer({name!r}) is for a subclass of Layer, got {layer_class!r}")
        config = _config_of(layer_class)

        def build_model(cls: Any, cfg: Any, task: Any) -> Any:
            """A new model; `OptionError` where an option cannot work."""
            return _build(cls, layer_class, config, cfg, task)

        members = {
            "__doc__": f"A language model of the equilibrium of {layer_class.__name__}.",
            "__module__": layer_class.__module__,
            "build_model": classmethod(build_model),
        }
        model = type(f"{layer_class.__name__}LanguageModel", (DEQLanguageModel,), members)
        register_model(name, dataclass=config)(model)
        return layer_class

    return decorate


def _arguments(layer_class: type[Layer]) -> list[inspect.Parameter]:
    parameters = list(inspect.signature(layer_class.__init__).parameters.values())[1:]
    for one in parameters:
        if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
            raise TypeError(
                f"{layer_class.__name__}.__init__ has *{one.name}: name its arguments, so that they become "
                "options"
            )
    return parameters


def _config_of(layer_class: type[Layer]) -> type[DEQLanguageModelConfig]:
    """The options of every model, those of the layer, and the number of layers in f."""
    common = DEQLanguageModelConfig.__dataclass_fields__
    own: list[tuple[str, Any, Field[Any]]] = [
        ("decoder_layers", int, option(1, "layers that f is made of, each with its own weights", "[1, 1000]"))
    ]
    for one in _arguments(layer_class):
        if one.name == _WIDTH or one.name in common:
            continue
        default = one.default
        if default is one.empty or type(default) not in _KINDS:
            raise TypeError(
                f"{layer_class.__name__}.__init__: {one.name} needs a default that is a bool, int, float or "
                f"str, so that {flag(one.name)} becomes an option"
            )
        text = f"argument of {layer_class.__name__}"
        if isinstance(default, bool):
            own.append((one.name, str, switch(default, text)))
        else:
            valid = "(-inf, inf)" if isinstance(default, (int, float)) else None
            own.append((one.name, type(default), option(default, text, valid)))
    config = make_dataclass(f"{layer_class.__name__}Config", own, bases=(DEQLanguageModelConfig,))
    config.__module__, config.__doc__ = layer_class.__module__, f"Options of {layer_class.__name__}."
    return config


def _build(model_class: Any, layer_class: type[Layer], config: type, cfg: Any, task: Any) -> Any:
    check_values(cfg, config)
    values: dict[str, Any] = {}
    for one in _arguments(layer_class):
        name = "decoder_embed_dim" if one.name == _WIDTH else one.name
        switched = config.__dataclass_fields__[name].metadata.get("argparse_const") == "true"  # type: ignore[attr-defined]
        values[one.name] = is_on(cfg, name) if switched else getattr(cfg, name)
    try:
        layer = compose([layer_class(**values) for _ in range(cfg.decoder_layers)])
    except ValueError as error:
        raise OptionError(f"{layer_class.__name__}: {error}") from None
    inputs = InputOptions(scale=cfg.decoder_embed_dim**0.5, dropout=cfg.dropout)
    return model_class.of(DEQDecoder(cfg, task.source_dictionary, layer, inputs), cfg, task)
