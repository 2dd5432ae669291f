"""What the tests share: a small corpus, its binarised form, a tiny trained model and fairseq's tools."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

# Before torch is imported: with tensors this small, a second thread costs more than it computes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from quick_hydra import make_hydra_quick

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fairseq_deq"
TEXT = Path(__file__).resolve().parent / "data" / "text"

# A stock fairseq model, small enough to train in a second.
TINY_TRANSFORMER_LM = (
    *("--task", "language_modeling", "--arch", "transformer_lm"),
    *("--decoder-layers", "1", "--decoder-attention-heads", "2"),
    *("--decoder-embed-dim", "16", "--decoder-input-dim", "16", "--decoder-output-dim", "16"),
    *("--decoder-ffn-embed-dim", "16", "--tokens-per-sample", "32"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cuda", choices=("cuda", "cpu"), help="where the tests of tests/gpu run"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available() or config.getoption("--device") == "cpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, or --device cpu"))


def pytest_collection_finish() -> None:
    """Make the many runs of fairseq's tools in one process cheaper."""
    make_hydra_quick()
    # What is imported stays to the end: the collector need not go through it again and again.
    gc.freeze()


# The same for ours.
TINY_DEQ = (
    *("--task", "language_modeling", "--arch", "deq_transformer_lm_tiny", "--criterion", "deq_lm_loss"),
    *("--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "32", "--decoder-attention-heads", "2"),
    *("--f-thres", "8", "--b-thres", "8", "--tokens-per-sample", "32"),
)

TRAINING = (
    *("--optimizer", "adam", "--lr", "0.01", "--batch-size", "8", "--max-update", "3"),
    *("--num-workers", "0", "--cpu", "--log-format", "simple"),
)


@dataclass(frozen=True)
class Output:
    """What a tool printed and logged, and its exit status."""

    text: str
    status: int

    def checked(self) -> Output:
        """Return itself, or fail with the whole text if the status is not 0."""
        assert self.status == 0, self.text
        return self


def run_command(
    tool: str, *arguments: str | Path, stdin: str = "", plugin: bool = True, **env: str
) -> Output:
    """Run a fairseq tool as a user does, in a process of its own.

    Args:
        tool: its name, such as "fairseq-train".
        arguments: what follows on the command line.
        stdin: what it reads.
        plugin: whether to add `--user-dir`.
        env: variables added to the environment.

    Returns:
        What it printed on both streams, and its status.
    """
    user_dir = ["--user-dir", str(PACKAGE)] if plugin else []
    script = Path(sys.executable).with_name(tool)
    done = subprocess.run(
        [str(script), *map(str, arguments), *user_dir],
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        timeout=600,
        check=False,
    )
    return Output(done.stdout, done.returncode)


def run_in_process(tool: str, *arguments: str | Path, stdin: str = "", plugin: bool = True) -> Output:
    """Run a fairseq tool in this process, which saves the 5 seconds of a start.

    Args:
        tool: its name, such as "fairseq-train".
        arguments: what follows on the command line.
        stdin: what it reads.
        plugin: whether to add `--user-dir`.

    Returns:
        What it printed and logged; the status is 0, since errors are raised.
    """
    stream = io.StringIO()
    with patch.object(sys, "stdin", io.StringIO(stdin)):
        _call_in_process(tool, arguments, plugin, stream)
    return Output(stream.getvalue(), 0)


def run_refused(tool: str, *arguments: str | Path, plugin: bool = True) -> Output:
    """Run a fairseq tool in this process that is to refuse its arguments in one sentence.

    Args:
        tool: its name, such as "fairseq-train".
        arguments: what follows on the command line.
        plugin: whether to add `--user-dir`.

    Returns:
        The sentence alone, and the status; the test fails where the tool ends in another way.
    """
    stream = io.StringIO()
    with pytest.raises(SystemExit) as ending:
        _call_in_process(tool, arguments, plugin, stream)
    code = ending.value.code
    # Python prints a text and exits with 1; argparse has printed it and exits with 2.
    is_text = isinstance(code, str)
    sentence = code if is_text else stream.getvalue().strip().splitlines()[-1]
    status = 1 if is_text else int(code or 0)
    assert "error: " in sentence, sentence
    assert "\n" not in sentence, sentence
    assert status != 0, sentence
    return Output(sentence, status)


def _call_in_process(tool: str, arguments: tuple[str | Path, ...], plugin: bool, stream: io.StringIO) -> None:
    from fairseq import checkpoint_utils
    from fairseq.logging import progress_bar

    from fairseq_deq.registration import register

    module: Any = importlib.import_module(tool.replace("fairseq-", "fairseq_cli.").replace("-", "_"))
    user_dir = ["--user-dir", str(PACKAGE)] if plugin else []
    if plugin:
        # Where a test has imported fairseq and then the solvers alone, --user-dir finds the package imported.
        register()
    # fairseq keeps the best score of a run on its functions, and open files of TensorBoard in a module, where
    # the next run would find them.
    progress_bar._tensorboard_writers.clear()
    for function in (checkpoint_utils.save_checkpoint, getattr(module, "should_stop_early", None)):
        if hasattr(function, "best"):
            del function.best
    with _everything_into(stream), _command_line(tool, *map(str, arguments), *user_dir):
        module.cli_main()


@contextlib.contextmanager
def _everything_into(stream: io.StringIO) -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = [*handlers, logging.StreamHandler(stream)]
    root.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            yield
    finally:
        root.handlers = handlers
        root.setLevel(level)


@contextlib.contextmanager
def _command_line(*arguments: str) -> Iterator[None]:
    before = sys.argv
    sys.argv = list(arguments)
    try:
        yield
    finally:
        sys.argv = before


@pytest.fixture
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether the case is one of the slow ones, which try everything that they loop over."""
    return request.node.get_closest_marker("slow") is not None


@pytest.fixture(scope="session")
def command() -> Callable[..., Output]:
    """The function `run_command`: a fairseq tool in a process of its own."""
    return run_command


@pytest.fixture(scope="session")
def in_process() -> Callable[..., Output]:
    """The function `run_in_process`: a fairseq tool in this process."""
    return run_in_process


@pytest.fixture(scope="session")
def refused() -> Callable[..., Output]:
    """The function `run_refused`: a fairseq tool in this process, which ends in one sentence."""
    return run_refused


@pytest.fixture(scope="session")
def text() -> Path:
    """The folder with train.txt, valid.txt and test.txt: some 3,000 words of English in the public domain."""
    return TEXT


@pytest.fixture(scope="session")
def data_bin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text after fairseq-preprocess; tests only read it."""
    folder = tmp_path_factory.mktemp("data") / "data-bin"
    splits = [
        word for split in ("train", "valid", "test") for word in (f"--{split}pref", TEXT / f"{split}.txt")
    ]
    arguments = ("--only-source", *splits, "--destdir", folder, "--workers", "1")
    run_in_process("fairseq-preprocess", *arguments, plugin=False)
    return folder


@pytest.fixture(scope="session")
def tiny_training(data_bin: Path) -> tuple[str, ...]:
    """Arguments of fairseq-train for a tiny transformer_lm and 3 updates; `--save-dir` is to be added."""
    return (str(data_bin), *TINY_TRANSFORMER_LM, *TRAINING)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_training: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a tiny transformer_lm trained for 3 updates; tests only read it."""
    folder = tmp_path_factory.mktemp("tiny")
    run_in_process("fairseq-train", *tiny_training, "--save-dir", folder)
    return folder / "checkpoint_last.pt"


@pytest.fixture(scope="session")
def deq_training(data_bin: Path) -> tuple[str, ...]:
    """Arguments of fairseq-train for a tiny DEQ-Transformer and 3 updates; `--save-dir` is to be added."""
    return (str(data_bin), *TINY_DEQ, *TRAINING)


@pytest.fixture(scope="session")
def deq_checkpoint(deq_training: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a tiny DEQ-Transformer trained for 3 updates; tests only read it."""
    folder = tmp_path_factory.mktemp("deq")
    run_in_process("fairseq-train", *deq_training, "--save-dir", folder)
    return folder / "checkpoint_last.pt"


@pytest.fixture(scope="session")
def evaluation() -> tuple[str, ...]:
    """Arguments of fairseq-eval-lm and its like for both checkpoints, without data and `--path`."""
    return ("--task", "language_modeling", "--tokens-per-sample", "32", "--num-workers", "0", "--cpu")
