"""fairseq-hydra-train trains from the yaml of the example, and mistakes in it end in one sentence."""

import pytest
from conftest import PACKAGE, ROOT, run_command

EXAMPLE = ROOT / "examples" / "hydra"
SMALL = ("common.cpu=true", "optimization.max_update=1", "lr_scheduler.warmup_updates=0", "model.f_thres=4")


@pytest.fixture
def train(data_bin, tmp_path):
    """Runs the example in miniature with the changes given."""

    def run(*changes):
        fixed = ("--config-dir", EXAMPLE, "--config-name", "deq_lm", f"hydra.run.dir={tmp_path}/run")
        data = () if any("task.data" in change for change in changes) else (f"task.data={data_bin}",)
        return run_command("fairseq-hydra-train", *fixed, *data, *SMALL, *changes, plugin=False)

    return run


def test_the_example_trains(train, tmp_path):
    output = train().checked()
    assert "| ppl " in output.text
    assert (tmp_path / "run" / "checkpoints" / "checkpoint_last.pt").exists()


MISTAKES = [
    (("common.fp16=true",), "--fp16 needs a GPU"),
    (("task.data=data-bin",), "the data folder data-bin does not exist in "),
    (("+model.f_solver=newton",), "--f-solver must be one of anderson, broyden, picard; got 'newton'"),
    (("+model.gradient=bptt",), "Invalid value 'bptt', expected one of [ift, shine, phantom, jfb, unroll]"),
    (
        ("model._name=deq_transformer",),
        "--model deq_transformer does not exist (did you mean 'deq_transformer",
    ),
    (("checkpoint.save_dir=/proc/none",), "--save-dir /proc/none cannot be written to"),
]
# What begins as fairseq does it: the package is imported when the run has begun.
LATE = ("~hydra.callbacks.fairseq_deq", f"common.user_dir={PACKAGE}")


CASES = [
    # Each is a process of its own: the first two always, the others among the slow ones.
    pytest.param(*mistake, id=mistake[0][0], marks=[pytest.mark.slow] if i > 1 else [])
    for i, mistake in enumerate(MISTAKES)
]


@pytest.mark.parametrize(
    "late", [(), pytest.param(LATE, marks=pytest.mark.slow)], ids=["callback", "user_dir"]
)
@pytest.mark.parametrize(("changes", "sentence"), CASES)
def test_a_mistake_ends_in_one_sentence(train, changes, sentence, late):
    output = train(*changes, *late)
    assert output.status == 1
    last = output.text.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert sentence in last
    assert "Traceback" not in output.text
