"""python -m fairseq_deq.check_layer MODULE:CLASS: check a layer of your own."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import OptionError
from .layers.check import check_layer
from .layers.layer import Layer

_EXAMPLES = """examples:
  python -m fairseq_deq.check_layer my_layers/gated.py:GatedConvolution
  python -m fairseq_deq.check_layer my_layers.gated:GatedConvolution taps=4 dim=24
"""


def main(arguments: list[str] | None = None) -> int:
    """Print the result of each check.

    Returns:
        0 if every check passed, 1 if one did not.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fairseq_deq.check_layer",
        description="Check that a layer works in a language model: causality, independent rows, padding, "
        "memory, decoding, gradients.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "layer", metavar="MODULE:CLASS", help="a module or a file, and the name of a subclass of Layer in it"
    )
    parser.add_argument(
        "sizes", nargs="*", metavar="NAME=VALUE", help="arguments of its __init__ (default: dim=12)"
    )
    args = parser.parse_args(arguments)
    try:
        layer_class = _find(args.layer)
        values = _values(layer_class, args.sizes)
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    checks = check_layer(lambda: layer_class(**values))
    for check in checks:
        print(f"{'FAULT' if check.fault else 'ok':<6}{check.name}{': ' if check.fault else ''}{check.fault}")
    return int(any(check.fault for check in checks))


def _find(text: str) -> type[Layer]:
    module_name, _, class_name = text.rpartition(":")
    if not module_name or not class_name:
        raise OptionError(f"MODULE:CLASS must name a module or file and a class, got {text!r}")
    module = _module(module_name)
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Layer)):
        layers = [
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, Layer) and value.__module__ == module.__name__
        ]
        raise OptionError(
            f"{module_name} has no subclass of Layer called {class_name!r}; "
            f"it has: {', '.join(layers) or 'none'}"
        )
    return found


def _module(name: str) -> ModuleType:
    path = Path(name)
    if path.suffix == ".py" or path.is_dir():
        path = path / "__init__.py" if path.is_dir() else path
        if not path.is_file():
            raise OptionError(f"MODULE:CLASS: there is no file {path}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise OptionError(f"MODULE:CLASS: {error}") from None


def _values(layer_class: type[Layer], sizes: list[str]) -> dict[str, Any]:
    """The arguments that the command line gives, and 12 for `dim`."""
    arguments = inspect.signature(layer_class).parameters
    values: dict[str, Any] = {"dim": 12} if "dim" in arguments else {}
    for size in sizes:
        name, sign, value = size.partition("=")
        if not sign or name not in arguments:
            raise OptionError(f"{size!r} must be NAME=VALUE, with a name out of {', '.join(arguments)}")
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name] = value
    missing = [n for n, one in arguments.items() if one.default is one.empty and n not in values]
    if missing:
        raise OptionError(f"{layer_class.__name__} needs {missing[0]}=VALUE")
    return values


if __name__ == "__main__":
    sys.exit(main())
