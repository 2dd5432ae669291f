"""Fields of the dataclasses from which fairseq makes its command line, and the values that they may have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, field, fields
from enum import Enum
from typing import Any

from .errors import OptionError


@dataclass(frozen=True)
class Range:
    """Finite numbers between two bounds.

    Attributes:
        interval: as in mathematics, for example `[0, 1)` or `(0, inf)`.
        also: a number outside that is valid too, None for none.
    """

    interval: str
    also: float | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """The lower and the upper bound."""
        low, high = self.interval[1:-1].split(",")
        return float(low), float(high)

    def holds(self, value: Any, whole: bool) -> bool:
        """Whether `value` is a number of the range, and a whole one if `whole`."""
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            return False
        if value == self.also:
            return True
        low, high = self.bounds
        above = value > low if self.interval[0] == "(" else value >= low
        below = value < high if self.interval[-1] == ")" else value <= high
        return above and below and math.isfinite(value)

    def check(self, name: str, value: Any, whole: bool) -> None:
        """Refuse what is not such a number.

        Args:
            name: of the option.
            value: its value.
            whole: whether it must be a whole number.
        Raises:
            OptionError: with the option's name and the valid values.
        """
        if self.holds(value, whole):
            return
        is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        kind = "" if is_number else "a whole number " if whole else "a number "
        raise OptionError(f"{flag(name)} must be {kind}{self}, got {value!r}")

    def __str__(self) -> str:
        low, high = self.bounds
        if high < math.inf:
            text = f"in {self.interval}"
        elif low == -math.inf:
            text = "finite"
        else:
            text = f"{'above' if self.interval[0] == '(' else 'at least'} {low:g}"
        return text if self.also is None else f"{text}, or {self.also:g}"


def option(default: Any, text: str, valid: str | None = None, **counts_with: str) -> Any:
    """A dataclass field with the help text that fairseq shows.

    Args:
        default: its value where none is given.
        text: help.
        valid: the interval of a number, as for `Range`; a number needs one.
        counts_with: other options, each with the values (separated by commas) with which alone this one
            has an effect; `*` is any value that turns the other on.
    """
    metadata: dict[str, Any] = {"help": text, "counts_with": counts_with}
    if valid is not None:
        metadata["valid"] = Range(valid)
    return field(default=default, metadata=metadata)


def switch(default: bool, text: str, **counts_with: str) -> Any:
    """A field that is on as `--name` or `--name true`, and off as `--name false`.

    fairseq turns a plain bool that is on by default into a flag that turns it off.
    """
    metadata = {"help": f"{text} (true or false)", "argparse_const": "true", "counts_with": counts_with}
    return field(default="true" if default else "false", metadata=metadata)


def named_size(**defaults: Any) -> Callable[[type], type]:
    """Make a dataclass of options that differs from its base in these defaults alone; help texts stay.

    Args:
        defaults: for each option that differs its default; true or false for a switch.
    Raises:
        TypeError: the base has no such option.
    """

    def decorate(cls: type) -> type:
        base = {one.name: one for one in fields(cls.__mro__[1])}
        for name, default in defaults.items():
            if name not in base:
                raise TypeError(f"{cls.__name__}: {cls.__mro__[1].__name__} has no option {name}")
            value = str(default).lower() if isinstance(default, bool) else default
            setattr(cls, name, field(default=value, metadata=base[name].metadata))
            cls.__annotations__[name] = base[name].type
        return dataclass(cls)

    return decorate


def is_on(cfg: Any, name: str) -> bool:
    """Whether the switch `name` of `cfg` is on; from YAML it may come as a bool.

    Raises:
        OptionError: it is neither true nor false.
    """
    value = str(getattr(cfg, name)).lower()
    if value not in ("true", "false"):
        raise OptionError(f"{flag(name)} must be true or false, or stand alone; got {value!r}")
    return value == "true"


def flag(name: str) -> str:
    """The option as it is typed."""
    return f"--{name.replace('_', '-')}"


def check_values(cfg: Any, dataclass_of_options: type) -> None:
    """Check every option that the dataclass gives a range, choices or a switch.

    Args:
        cfg: the options.
        dataclass_of_options: their dataclass.
    Raises:
        OptionError: a value is not valid; the sentence names the option and the valid values.
    """
    for one in fields(dataclass_of_options):
        value = getattr(cfg, one.name, None)
        if value is None:
            continue
        valid = _metadata(dataclass_of_options, one.name, "valid")
        if valid is not None:
            valid.check(one.name, value, one.type in (int, "int"))
        elif isinstance(one.type, type) and issubclass(one.type, Enum):
            choices = [choice.value for choice in one.type]
            if str(getattr(value, "value", value)) not in choices:
                raise OptionError(f"{flag(one.name)} must be one of {', '.join(choices)}; got {str(value)!r}")
        elif one.metadata.get("argparse_const") == "true":
            is_on(cfg, one.name)


def ignored(cfg: Any, dataclass_of_options: type) -> Iterator[tuple[str, str]]:
    """The options that differ from their defaults but have no effect, and why.

    Args:
        cfg: the options.
        dataclass_of_options: their dataclass.
    Returns:
        pairs of an option's name and what it needs to have an effect.
    """
    for one in fields(dataclass_of_options):
        conditions = _metadata(dataclass_of_options, one.name, "counts_with") or {}
        for other, values in conditions.items():
            found = str(getattr(cfg, other))
            counts = found not in _OFF if values == "*" else found in values.split(",")
            if not counts and _differs(getattr(cfg, one.name), one):
                needed = values.replace(",", " or ") if values != "*" else "on"
                yield one.name, f"{flag(other)} {needed}, and {flag(other)} is {found}"
                break


def valid_values(dataclass_of_options: type, one: Field[Any]) -> str:
    """What `check_values` accepts for a field, in words; empty where any text may be valid.

    Args:
        dataclass_of_options: the dataclass that has the field.
        one: the field.
    """
    valid = _metadata(dataclass_of_options, one.name, "valid")
    if valid is not None:
        return f"{'whole, ' if one.type in (int, 'int') else ''}{valid}"
    if isinstance(one.type, type) and issubclass(one.type, Enum):
        return ", ".join(str(choice.value) for choice in one.type)
    return "true, false" if _metadata(dataclass_of_options, one.name, "argparse_const") == "true" else ""


def meaning(dataclass_of_options: type, one: Field[Any]) -> str:
    """The help of a field, and the other options without which it has no effect.

    Args:
        dataclass_of_options: the dataclass that has the field.
        one: the field.
    """
    text = str(_metadata(dataclass_of_options, one.name, "help") or "").removesuffix(" (true or false)")
    conditions = _metadata(dataclass_of_options, one.name, "counts_with") or {}
    needed = [
        f"{flag(other)}{'' if values == '*' else ' ' + values.replace(',', ' or ')}"
        for other, values in conditions.items()
    ]
    return f"{text} (only with {' and '.join(needed)})" if needed else text


def _metadata(dataclass_of_options: type, name: str, key: str) -> Any:
    """What a field says; where a named size gives it another default, what the field before said."""
    for owner in dataclass_of_options.__mro__:
        found = owner.__dict__.get("__dataclass_fields__", {}).get(name)
        if found is not None and found.metadata.get(key):
            return found.metadata[key]
    return None


_OFF = ("None", "", "0", "0.0", "false", "False")


def _differs(value: Any, one: Field[Any]) -> bool:
    default = one.default
    value, default = (getattr(v, "value", v) for v in (value, default))
    return str(value).lower() != str(default).lower() and value != default
