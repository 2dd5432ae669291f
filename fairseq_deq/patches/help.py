"""`--help` of fairseq's tools."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any

from .sentences import one_sentence


def with_help_of_everything(parse: Callable[..., Any]) -> Callable[..., Any]:
    """Show the options of the chosen model, task, criterion and optimizer as well.

    fairseq parses twice, and adds those options before the second time. It prints its help the first time.
    """

    def wrapper(
        parser: ArgumentParser,
        input_args: Sequence[str] | None = None,
        parse_known: bool = False,
        suppress_defaults: bool = False,
        modify_parser: Callable[[ArgumentParser], None] | None = None,
    ) -> Any:
        typed = list(sys.argv[1:] if input_args is None else input_args)
        options = {"parse_known": parse_known, "suppress_defaults": suppress_defaults}
        if not {"-h", "--help"} & set(typed):
            with one_sentence():
                return parse(parser, input_args, modify_parser=modify_parser, **options)
        calls = []

        def then_help(complete: ArgumentParser) -> None:
            if modify_parser is not None:
                modify_parser(complete)
            calls.append(complete)
            if len(calls) == 2:  # the second time all options have been added
                complete.print_help()
                complete.exit()

        rest = [word for word in typed if word not in ("-h", "--help")]
        return parse(parser, rest, modify_parser=then_help, **options)

    return wrapper
