"""What the commands have in common: their help, their progress, how they end, and how they write a file."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from ..errors import OptionError


def describe(parser: argparse.ArgumentParser, program: str, text: str | None) -> argparse.ArgumentParser:
    """Give a parser a name and a help, and let it refuse arguments by an `OptionError`.

    Args:
        parser: the parser, changed in place.
        program: the name of the command.
        text: the docstring of its module: one sentence, and after an empty line what follows the options.
    Returns:
        the parser.
    """

    def refuse(message: str) -> NoReturn:
        raise OptionError(f"{message}; {program} --help shows the options")

    description, _, details = (text or "").partition("\n\n")
    parser.prog, parser.description, parser.epilog = program, description, details
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = refuse  # type: ignore[method-assign]
    return parser


def describe_over_fairseqs(
    parser: argparse.ArgumentParser, program: str, text: str | None, usage: str
) -> Any:
    """`describe` for a parser of fairseq's: the help has the command's own options before its hundred.

    Args:
        parser, program, text: as for `describe`.
        usage: the arguments that are needed.
    Returns:
        the group of options for the command's own.
    """
    describe(parser, program, text)
    parser.usage = f"{program} {usage}"
    parser.description, parser.epilog = text, None
    ours = parser.add_argument_group(f"options of {program}; those of fairseq follow")
    parser._action_groups.insert(0, parser._action_groups.pop())  # argparse prints groups in this order
    return ours


def add_user_dir(parser: argparse.ArgumentParser) -> None:
    """Add `--user-dir`, of which `import_user_dir` makes use."""
    parser.add_argument(
        "--user-dir", metavar="DIR", help="folder that registers the model, if it is not one of this package"
    )


def import_user_dir(args: argparse.Namespace) -> None:
    """Import the plugin that `--user-dir` names, if it names one."""
    if args.user_dir:
        from fairseq.utils import import_user_module  # not every command needs fairseq

        import_user_module(args)


def command_line(
    program: str, run: Callable[[Sequence[str] | None], int | None], failure: int = 1
) -> Callable[[Sequence[str] | None], int]:
    """The `main` of a command.

    Args:
        program: the name of the command.
        run: what it does, from its arguments, those of the process if None, to its exit status, None for 0.
        failure: the exit status after one sentence that says what is wrong.
    Returns:
        from its arguments, None for those of the process, to its exit status.
    """

    def main(argv: Sequence[str] | None = None) -> int:
        with quiet():
            return ended(program, lambda: run(argv), failure)

    return main


def ended(program: str, run: Callable[[], int | None], failure: int = 1) -> int:
    """Run a command, and turn an error that has an explanation into one sentence on standard error.

    Args:
        program: the name of the command, which begins the sentence.
        run: what it does; returns its exit status, None for 0.
        failure: the exit status after a sentence.
    Returns:
        the exit status.
    Raises:
        Exception: what has no explanation, as it is.
    """
    try:
        return run() or 0
    except OptionError as error:
        sentence: str | None = str(error)
    except SystemExit as ending:
        if not isinstance(ending.code, str):
            raise
        sentence = ending.code.removeprefix("error: ")  # how fairseq's parts end
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            sentence = f"{error.filename}: {error.strerror}"
        else:
            from ..patches.sentences import explain  # imports torch, which not every command needs

            sentence = explain(error)
        if sentence is None:
            raise
    print(f"{program}: {sentence}", file=sys.stderr)
    return failure


def progress(steps: Iterable[Any], what: str, total: int | None = None) -> tqdm[Any]:
    """The steps, with a bar on a terminal's standard error while they are gone through.

    Args:
        steps: anything to go through.
        what: what is done, for the bar.
        total: their number where it cannot be asked for.
    """
    return tqdm(steps, desc=what, total=total, leave=False, disable=None, file=sys.stderr)


def tell(line: str) -> None:
    """Print a line of a result above the bar, at once."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name to write a file under, which becomes `path` when all is written; a failure leaves nothing.

    Args:
        path: the file; its folder is made if it is not there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def quiet() -> Iterator[None]:
    """No news of fairseq's beside what a command prints; warnings of its log go to standard error."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    root.handlers = [handler]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers = handlers
        root.setLevel(level)
