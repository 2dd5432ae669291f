"""Checks of `--model-overrides` and `--user-dir`, which fairseq uses unchecked."""

from __future__ import annotations

import ast
import difflib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import OptionError
from ..options import flag

logger = logging.getLogger(__name__)

_PACKAGE = __package__.split(".")[0]


def with_known_names(overwrite: Callable[..., None]) -> Callable[..., None]:
    """Refuse unknown names in `--model-overrides` for the models of this package.

    An option that the model has now, but an older checkpoint does not, is added, so that it can be
    overridden.
    """
    from omegaconf.errors import ValidationError

    def wrapper(cfg: Any, overrides: Mapping[str, Any]) -> None:
        model = cfg.get("model") if hasattr(cfg, "get") else None
        name = str(getattr(model, "_name", "") or "")
        if name.startswith("deq_"):
            _check_overrides(cfg, model, name, overrides)
        try:
            overwrite(cfg, overrides)
        except ValidationError as error:
            value = overrides.get(error.key, "")
            raise OptionError(
                f"--model-overrides: {flag(str(error.key))} cannot be {value!r} "
                f"({str(error).splitlines()[0]})"
            ) from None

    return wrapper


def _check_overrides(cfg: Any, model: Any, name: str, overrides: Mapping[str, Any]) -> None:
    from fairseq.models import MODEL_DATACLASS_REGISTRY
    from omegaconf import open_dict

    if "model_overrides" in overrides:  # fairseq-validate passes its whole command line as overrides
        overrides = ast.literal_eval(overrides["model_overrides"])
    nested = overrides.get("model")
    names = {key for key in overrides if key != "model"} | (
        set(nested) if isinstance(nested, Mapping) else set()
    )
    dataclass = MODEL_DATACLASS_REGISTRY.get(name)
    fields = getattr(dataclass, "__dataclass_fields__", {})
    own = sorted(field for field in {*fields, *model} if not field.startswith("_"))
    unknown = sorted(names - set(own) - set(_all_keys(cfg)) - set(_options_of_choices(overrides)))
    if unknown:
        close = difflib.get_close_matches(unknown[0], own, n=1)
        raise OptionError(
            f"--model-overrides names {unknown[0]!r}, which {name} does not have"
            + (f" (did you mean {close[0]!r}?)" if close else "")
            + f"; its options are: {', '.join(own)}"
        )
    with open_dict(model):
        for key in names:
            if key in fields and key not in model:
                model[key] = None  # fairseq overwrites only what is there


def _options_of_choices(overrides: Mapping[str, Any]) -> Iterable[str]:
    """The options that come with a choice in `overrides`, such as those of sentencepiece with bpe."""
    from fairseq.registry import REGISTRIES

    for key, choice in overrides.items():
        dataclass = REGISTRIES.get(key, {}).get("dataclass_registry", {}).get(str(choice))
        yield from getattr(dataclass, "__dataclass_fields__", {})


def _all_keys(cfg: Any) -> Iterable[str]:
    for key in cfg:
        yield key
        # "???" stands for a value that must be given, and reading it raises
        value = cfg._get_node(key) if hasattr(cfg, "_get_node") else None
        if hasattr(value, "keys"):
            yield from _all_keys(value)
        elif hasattr(value, "__dict__"):
            yield from vars(value)


def with_imported_copy(import_user_module: Callable[[Any], None]) -> Callable[[Any], None]:
    """Say what to type if `--user-dir` names another copy of this package than the imported one.

    `--user-dir fairseq_deq` in a folder that has no such folder means the imported copy.
    """

    def wrapper(args: Any) -> None:
        user_dir = getattr(args, "user_dir", None)
        imported = sys.modules.get(_PACKAGE)
        path = os.path.abspath(user_dir) if user_dir is not None else ""
        if imported is None or os.path.basename(path) != _PACKAGE or path in imported.__path__:
            import_user_module(args)
            return
        home = imported.__path__[0]
        if os.path.exists(path) and os.path.realpath(path) != os.path.realpath(home):
            raise OptionError(
                f"--user-dir {user_dir} is a second copy of {_PACKAGE}, and {home} is already imported; "
                f"type --user-dir {home}, or leave --user-dir out"
            )
        logger.info("--user-dir %s: using %s, which is already imported", user_dir, home)

    return wrapper
