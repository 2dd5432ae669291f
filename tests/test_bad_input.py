"""What cannot work ends in one clear sentence, and leaves nothing in the way of the next run.

`test_mistakes.py` has the mistakes that a command line alone shows.
"""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import PACKAGE
from selection import few_of


@pytest.fixture
def save_dir(tmp_path):
    """A folder for checkpoints that must stay without one."""
    folder = tmp_path / "save"
    yield folder
    assert not folder.exists() or list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def binarise(in_process, data_bin, tmp_path_factory):
    """Makes a data folder of the texts given, with the dictionary of the small corpus or one of their own."""

    def make(train, valid="the people", own_dictionary=False):
        folder = tmp_path_factory.mktemp("bad")
        (folder / "train.txt").write_text(train)
        (folder / "valid.txt").write_text(valid)
        texts = (
            *("--trainpref", folder / "train.txt", "--validpref", folder / "valid.txt"),
            *("--testpref", folder / "valid.txt"),
        )
        dictionary = () if own_dictionary else ("--srcdict", data_bin / "dict.txt")
        in_process(
            *("fairseq-preprocess", "--only-source", *texts, *dictionary),
            *("--destdir", folder / "data-bin", "--workers", "1"),
            plugin=False,
        )
        return folder / "data-bin"

    return make


# ---------------------------------------------------------------------- options

WRONG_OPTIONS = [
    ("--f-solver newton", "--f-solver must be one of anderson, broyden, picard; got 'newton'"),
    ("--f-solver gmres", "--f-solver must be one of anderson, broyden, picard; got 'gmres'"),
    ("--gradient shine --shine-refine -1", "--shine-refine must be in [0, 100000], got -1"),
    ("--jac-loss-weight -1", "--jac-loss-weight must be at least 0, got -1.0"),
    (
        "--jac-loss-weight 1 --gradient unroll",
        "--jac-loss-weight needs an equilibrium, which --gradient unroll does not solve for: choose "
        "--gradient ift, shine, phantom or jfb",
    ),
    ("--b-solver newton", "--b-solver must be one of anderson, broyden, picard, gmres; got 'newton'"),
    (
        "--gradient bptt",
        "--gradient: invalid choice: 'bptt' (choose from 'ift', 'shine', 'phantom', 'jfb', 'unroll')",
    ),
    ("--stop-mode max", "--stop-mode: invalid choice: 'max' (choose from 'rel', 'abs')"),
    ("--f-eps -1", "--f-eps must be in (0, 1), got -1.0"),
    ("--f-eps 0", "--f-eps must be in (0, 1), got 0.0"),
    ("--b-eps 0", "--b-eps must be in (0, 1), got 0.0"),
    ("--f-thres 0", "--f-thres must be in [1, 100000], got 0"),
    ("--f-thres many", "--f-thres: invalid int value: 'many'"),
    ("--subseq-forget", "--subseq-forget true needs --subseq-len on, and --subseq-len is 0"),
    ("--ddp-backend fully_sharded", "--ddp-backend fully_sharded does not work with --arch"),
    ("--f-damping 1.5", "--f-damping must be in (0, 1], got 1.5"),
    ("--gradient phantom --phantom-steps 0", "--phantom-steps must be in [1, 100000], got 0"),
    ("--gradient phantom --phantom-damping 0", "--phantom-damping must be in (0, 1], got 0.0"),
    ("--pretrain-steps 1 --pretrain-layers 0", "--pretrain-layers must be in [1, 10000], got 0"),
    ("--pretrain-steps -1", "--pretrain-steps must be at least 0, got -1"),
    ("--dropout 1.5", "--dropout must be in [0, 1), got 1.5"),
    (
        "--decoder-attention-heads 3",
        "--decoder-embed-dim 16 is not a multiple of --decoder-attention-heads 3",
    ),
    ("--wnorm maybe", "--wnorm must be true or false, or stand alone; got 'maybe'"),
    ("--adaptive-softmax-cutoff 100,9000", "--adaptive-softmax-cutoff 100,9000 goes beyond the dictionary"),
    ("--adaptive-softmax-cutoff 200,100", "--adaptive-softmax-cutoff must be increasing positive numbers"),
    ("--adaptive-softmax-cutoff a,b", "--adaptive-softmax-cutoff must be increasing positive numbers"),
    ("--adaptive-input", "--adaptive-input needs --adaptive-input-cutoff"),
    ("--tie-adaptive-weights", "--tie-adaptive-weights needs --adaptive-input"),
    ("--tie-adaptive-proj", "--tie-adaptive-proj needs --tie-adaptive-weights"),
]


@pytest.mark.parametrize(("options", "reason"), WRONG_OPTIONS, ids=[options for options, _ in WRONG_OPTIONS])
def test_a_wrong_option_is_named_with_the_valid_values(refused, deq_training, save_dir, options, reason):
    training = (*deq_training, *options.split(), "--save-dir", save_dir)
    assert reason in refused("fairseq-train", *training).text


def test_a_run_follows_in_the_folder_of_a_refused_one(refused, in_process, deq_training, tmp_path):
    training = (*deq_training, "--disable-validation", "--save-dir", tmp_path)
    refused("fairseq-train", *training, "--f-eps", "-1")
    in_process("fairseq-train", *training)
    assert (tmp_path / "checkpoint_last.pt").exists()


# ---------------------------------------------------------------------- text


def test_training_on_a_folder_that_is_not_binarised(refused, deq_training, text, save_dir):
    training = (text, *deq_training[1:], "--save-dir", save_dir)
    assert "has no dict.txt" in refused("fairseq-train", *training).text


@pytest.mark.parametrize(("split", "texts"), [("train", ("", "the people")), ("valid", ("the people", ""))])
def test_training_on_an_empty_text(refused, deq_training, binarise, save_dir, split, texts):
    training = (binarise(*texts), *deq_training[1:], "--save-dir", save_dir)
    assert f"the text '{split}' in " in refused("fairseq-train", *training).text


def test_evaluation_of_an_empty_text(refused, binarise, deq_checkpoint, evaluation):
    sentence = refused("fairseq-eval-lm", binarise("the", ""), "--path", deq_checkpoint, *evaluation).text
    assert "the text 'test' in " in sentence
    assert "is empty" in sentence


def test_one_word_is_a_text(in_process, binarise, deq_training, evaluation, tmp_path):
    data = binarise("people", "people")
    in_process("fairseq-train", data, *deq_training[1:], "--max-update", "1", "--save-dir", tmp_path)
    output = in_process("fairseq-eval-lm", data, "--path", tmp_path / "checkpoint_last.pt", *evaluation)
    assert "Evaluated 2 tokens" in output.text  # the word and the end of its sentence


# ---------------------------------------------------------------------- dictionaries


def test_evaluation_with_another_dictionary(refused, binarise, deq_checkpoint, evaluation):
    other = binarise("a text of other words", own_dictionary=True)
    sentence = refused("fairseq-eval-lm", other, "--path", deq_checkpoint, *evaluation).text
    assert "was trained with a dictionary of 792 types" in sentence
    assert "fairseq-preprocess --srcdict" in sentence


def test_evaluation_with_another_dictionary_of_a_checkpoint_that_does_not_know_its_own(
    refused, binarise, deq_checkpoint, evaluation, tmp_path
):
    state = torch.load(deq_checkpoint, weights_only=False)
    state["task_state"] = {}
    torch.save(state, tmp_path / "older.pt")
    other = binarise("a text of other words", own_dictionary=True)
    sentence = refused("fairseq-eval-lm", other, "--path", tmp_path / "older.pt", *evaluation).text
    assert "do not fit the model" in sentence
    assert "decoder.embed_tokens.weight" in sentence


# ---------------------------------------------------------------------- checkpoints


READERS = ("fairseq-eval-lm", "fairseq-interactive", "fairseq-train")


@pytest.mark.parametrize(("tool", "size"), few_of((tool, size) for tool in READERS for size in (0, 5000)))
def test_a_truncated_checkpoint(
    refused, data_bin, deq_training, deq_checkpoint, evaluation, tmp_path, tool, size
):
    path = tmp_path / "checkpoint_last.pt"
    path.write_bytes(deq_checkpoint.read_bytes()[:size])
    options = (*deq_training, "--save-dir", tmp_path)
    if tool != "fairseq-train":
        options = (data_bin, "--path", path, *evaluation)
    assert f"{path} is not a whole fairseq checkpoint" in refused(tool, *options).text
    assert path.stat().st_size == size


def test_training_goes_on_from_another_checkpoint_where_the_last_is_truncated(
    in_process, deq_training, deq_checkpoint, tmp_path
):
    (tmp_path / "checkpoint_last.pt").write_bytes(b"")
    whole = shutil.copy(deq_checkpoint, tmp_path / "checkpoint_1_3.pt")
    training = (*deq_training, "--save-dir", tmp_path, "--restore-file", whole, "--max-update", "4")
    in_process("fairseq-train", *training, "--disable-validation")
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    assert state["optimizer_history"][-1]["num_updates"] == 4


def test_a_file_that_is_no_checkpoint_of_fairseq(refused, data_bin, evaluation, tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    sentence = refused("fairseq-eval-lm", data_bin, "--path", tmp_path / "other.pt", *evaluation).text
    assert "is not a whole fairseq checkpoint" in sentence


OTHER_MODELS = {
    "another architecture": ("--arch", "transformer_lm", "--criterion", "cross_entropy"),
    "another width": ("--decoder-ffn-embed-dim", "64"),
}


@pytest.mark.parametrize("options", OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_training_does_not_resume_from_another_model(
    refused, tiny_training, deq_training, deq_checkpoint, options
):
    before = deq_checkpoint.read_bytes()
    training = deq_training if "--arch" not in options else tiny_training
    resuming = (*training, *options, "--save-dir", deq_checkpoint.parent, "--max-update", "5")
    assert "holds another model than the options ask for" in refused("fairseq-train", *resuming).text
    assert deq_checkpoint.read_bytes() == before


def test_training_does_not_resume_with_another_optimizer(refused, deq_training, deq_checkpoint):
    resuming = (*deq_training, "--optimizer", "nag", "--save-dir", deq_checkpoint.parent, "--max-update", "5")
    assert "--reset-optimizer" in refused("fairseq-train", *resuming).text


# ---------------------------------------------------------------------- --user-dir


# Runs fairseq-train as a new process does, once with each folder, and prints the last line of what it says.
TRAIN_WITH_EACH = """
import sys, traceback
from fairseq_cli.train import cli_main

data, *folders = sys.argv[1:]
for folder in folders:
    sys.argv = ["fairseq-train", data, "--user-dir", folder]
    try:
        cli_main()
    except Exception as error:
        print(traceback.format_exception_only(error)[-1].strip())
"""


def test_a_user_dir_that_cannot_be_imported_is_named(data_bin, tmp_path):
    folders = (tmp_path / "none", PACKAGE / "models")
    arguments = [sys.executable, "-c", TRAIN_WITH_EACH, data_bin, *folders]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600, check=True)
    not_there, inside_the_package = done.stdout.splitlines()
    assert not_there == f"FileNotFoundError: {tmp_path}/none"
    assert f"type --user-dir {PACKAGE}" in inside_the_package
