"""The commands by name, and their entry points: each makes sure of what its tool needs, then imports it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from .._requirements import require_fairseq_or_exit
from ..errors import OptionError
from ..registration import register

# Name -> its module. The installed commands are called fairseq-deq-NAME.
TOOLS = {
    "anytime": "anytime",
    "average": "average",
    "benchmark": "benchmark.command",
    "benchmark-generation": "benchmark_generation.command",
    "convert": "convert_checkpoint",
    "diagnose": "diagnose.command",
    "export": "export",
    "import": "import_weights.command",
    "plot": "plot.command",
    "prepare": "prepare.command",
    "score": "score",
    "unigram": "unigram",
}
# For the development of the project; these are not installed.
DEVELOPMENT = {"gpu-check": "gpu_check.command", "option-reference": "option_reference"}
_WITHOUT_FAIRSEQ = ("average", "convert", "export", "gpu-check", "plot", "prepare")


def run(tool: str, argv: Sequence[str] | None = None) -> int:
    """Run a tool.

    Args:
        tool: its name in `TOOLS` or `DEVELOPMENT`.
        argv: its arguments; those of the process if None.
    Returns:
        its exit status.
    Raises:
        SystemExit: fairseq is missing, and the tool needs it.
    """
    if tool not in _WITHOUT_FAIRSEQ:
        require_fairseq_or_exit()
        try:
            register()
        except OptionError as error:
            raise SystemExit(f"error: {error}") from None
    module = importlib.import_module(f".{(TOOLS | DEVELOPMENT)[tool]}", __package__)
    status: int = module.main(argv)
    return status


def _entry(tool: str) -> Callable[[], None]:
    def start() -> None:
        sys.exit(run(tool))

    return start


anytime = _entry("anytime")
average = _entry("average")
benchmark = _entry("benchmark")
benchmark_generation = _entry("benchmark-generation")
convert = _entry("convert")
diagnose = _entry("diagnose")
export = _entry("export")
import_ = _entry("import")
plot = _entry("plot")
prepare = _entry("prepare")
score = _entry("score")
unigram = _entry("unigram")
