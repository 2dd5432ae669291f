"""Fields of the dataclasses from which fairseq makes its command line."""

from dataclasses import field
from typing import Any

from .errors import OptionError


def option(default: Any, text: str) -> Any:
    """A dataclass field with the help text that fairseq shows."""
    return field(default=default, metadata={"help": text})


def switch(default: bool, text: str) -> Any:
    """A field that is on as `--name` or `--name true`, and off as `--name false`.

    fairseq turns a plain bool that is on by default into a flag that turns it off.
    """
    metadata = {"help": f"{text} (true or false)", "argparse_const": "true"}
    return field(default="true" if default else "false", metadata=metadata)


def is_on(cfg: Any, name: str) -> bool:
    """Whether the switch `name` of `cfg` is on; from YAML it may come as a bool.

    Raises:
        OptionError: it is neither true nor false.
    """
    value = str(getattr(cfg, name)).lower()
    if value not in ("true", "false"):
        raise OptionError(f"--{name.replace('_', '-')} must be true or false, or stand alone; got {value!r}")
    return value == "true"
