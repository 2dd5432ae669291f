"""fairseq-hydra-train trains from the yaml of the example, and mistakes in it end in one sentence."""

from __future__ import annotations

import functools

import pytest
from conftest import PACKAGE, ROOT
from forked import run_forked
from selection import covering, slow_unless

TOOL = "from fairseq_cli.hydra_train import cli_main"
EXAMPLE = ("--config-dir", str(ROOT / "examples" / "hydra"), "--config-name", "deq_lm")
SMALL = ("common.cpu=true", "optimization.max_update=1", "lr_scheduler.warmup_updates=0", "model.f_thres=4")

MISTAKES = {
    "common.fp16=true": "--fp16 needs a GPU",
    "task.data=data-bin": "the data folder data-bin does not exist in ",
    "+model.f_solver=newton": "--f-solver must be one of anderson, broyden, picard; got 'newton'",
    "+model.gradient=bptt": "Invalid value 'bptt', expected one of [ift, shine, phantom, jfb, unroll]",
    "model._name=deq_transformer": "--model deq_transformer does not exist (did you mean 'deq_transformer",
    "checkpoint.save_dir=/proc/none": "--save-dir /proc/none cannot be written to",
}
# Who imports the package: the callback of the example, or fairseq itself, when the run has begun.
IMPORTING = {"callback": (), "user_dir": ("~hydra.callbacks.fairseq_deq", f"common.user_dir={PACKAGE}")}
PAIRS = [(mistake, by) for mistake in MISTAKES for by in IMPORTING]
DEFAULT = covering(PAIRS[:4])


@pytest.fixture(scope="module")
def runs(data_bin, tmp_path_factory):
    """The output and the folder of the example in miniature, without a mistake (None) and with each.

    As a function that tells whether for the default run or for the slow one.
    """

    @functools.cache
    def train(is_default):
        pairs = [None, *DEFAULT] if is_default else [pair for pair in PAIRS if pair not in DEFAULT]
        folders = [tmp_path_factory.mktemp("run") for _ in pairs]
        programs = []
        for pair, folder in zip(pairs, folders):
            changes = () if pair is None else (pair[0], *IMPORTING[pair[1]])
            data = f"task.data={data_bin}"  # unless a change comes after it
            arguments = [*EXAMPLE, f"hydra.run.dir={folder}", data, *SMALL, *changes]
            programs.append(f"import sys\nsys.argv[1:] = {arguments}\n{TOOL}\ncli_main()")
        return dict(zip(pairs, zip(run_forked(TOOL, programs), folders)))

    return train


def test_the_example_trains(runs):
    output, folder = runs(is_default=True)[None]
    assert "| ppl " in output.checked().text
    assert (folder / "checkpoints" / "checkpoint_last.pt").exists()


@pytest.mark.parametrize(
    "pair", [pytest.param(pair, id="-".join(pair), marks=slow_unless(pair in DEFAULT)) for pair in PAIRS]
)
def test_a_mistake_ends_in_one_sentence(runs, pair):
    output, _ = runs(is_default=pair in DEFAULT)[pair]
    assert output.status == 1
    last = output.text.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert MISTAKES[pair[0]] in last
    assert "Traceback" not in output.text
