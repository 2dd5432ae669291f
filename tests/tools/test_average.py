"""fairseq-deq-average: what is averaged, what is not, and what the result is good for."""

from __future__ import annotations

import re

import pytest
import torch
from runs import read_perplexity

from fairseq_deq.checkpoint_file import read_checkpoint
from fairseq_deq.tools.average import checkpoints_of, main

WEIGHT = "decoder.layer.qkv.weight_v"
LEARNED = "decoder.knowledge.learned_preconditioner.left"


@pytest.fixture(scope="module")
def trained(in_process, deq_training, tmp_path_factory):
    """A folder with checkpoints after 1, 2 and 3 updates."""
    folder = tmp_path_factory.mktemp("averaged")
    options = ("--save-interval-updates", "1", "--no-epoch-checkpoints", "--disable-validation")
    in_process("fairseq-train", *deq_training, *options, "--save-dir", folder)
    return folder


def paths(trained, *updates):
    return [trained / f"checkpoint_1_{update}.pt" for update in updates]


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_weights_are_the_mean_and_what_was_learned_is_the_newest(trained, tmp_path, capsys):
    def learn(state):
        state["model"][LEARNED].normal_()

    newest = changed(trained / "checkpoint_1_3.pt", tmp_path / "newest.pt", learn)
    inputs, out = [newest, *paths(trained, 1)], tmp_path / "out.pt"
    assert run(*inputs, "--out", out) == 0
    assert capsys.readouterr().out == f"{out}: the mean of {inputs[0]}, {inputs[1]}\n"
    three, one = (read_checkpoint(path) for path in inputs)
    found = read_checkpoint(out)
    weights = [name for name in three["model"] if ".knowledge." not in name]
    assert WEIGHT in weights
    for name in weights:
        mean = (three["model"][name].double() + one["model"][name].double()) / 2
        assert torch.equal(found["model"][name], mean.float()), name
    assert not torch.equal(found["model"][WEIGHT], three["model"][WEIGHT])
    assert found["model"].keys() == three["model"].keys()
    for name in three["model"].keys() - set(weights):
        assert torch.equal(found["model"][name], three["model"][name]), name
    assert not torch.equal(three["model"][LEARNED], one["model"][LEARNED])
    assert found["optimizer_history"] == three["optimizer_history"]
    assert found["last_optimizer_state"] is None
    assert out.stat().st_size < 0.6 * inputs[0].stat().st_size


def test_the_mean_of_one_checkpoint_is_itself(trained, tmp_path):
    (path,) = paths(trained, 2)
    assert run(path, path, path, "--out", tmp_path / "out.pt") == 0
    found, expected = read_checkpoint(tmp_path / "out.pt")["model"], read_checkpoint(path)["model"]
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_folder_stands_for_its_last_checkpoints(trained, tmp_path):
    assert checkpoints_of([trained], 2) == paths(trained, 2, 3)
    for name in ("checkpoint9.pt", "checkpoint10.pt", "checkpoint_last.pt", "checkpoint_2_99.pt"):
        (tmp_path / name).touch()
    assert checkpoints_of([tmp_path], 2) == [tmp_path / "checkpoint9.pt", tmp_path / "checkpoint10.pt"]


def test_the_result_is_evaluated_and_trained_on(
    trained, in_process, deq_training, data_bin, evaluation, tmp_path
):
    out = tmp_path / "averaged.pt"
    assert run(trained, "--last", 3, "--out", out) == 0
    output = in_process("fairseq-eval-lm", data_bin, "--path", out, "--gen-subset", "valid", *evaluation)
    assert 1 < read_perplexity(output.checked().text)[1] < 1e4
    options = ("--finetune-from-model", out, "--save-dir", tmp_path, "--disable-validation", "--lr", "1e-9")
    in_process("fairseq-train", *deq_training, *options)
    after = read_checkpoint(tmp_path / "checkpoint_last.pt")["model"][WEIGHT]
    torch.testing.assert_close(after, read_checkpoint(out)["model"][WEIGHT], rtol=0, atol=1e-6)


def test_a_stack_of_fairseqs_is_averaged_too(tiny_checkpoint, tmp_path):
    assert run(tiny_checkpoint, tiny_checkpoint, "--out", tmp_path / "out.pt") == 0
    found, expected = (read_checkpoint(p)["model"] for p in (tmp_path / "out.pt", tiny_checkpoint))
    assert all(torch.equal(found[n], w) for n, w in expected.items() if "_float_tensor" not in n)


def changed(path, out, change):
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, out)
    return out


def test_what_does_not_belong_together_is_one_sentence(trained, tiny_checkpoint, tmp_path, capsys):
    (path,) = paths(trained, 1)
    (tmp_path / "there.pt").write_bytes(b"here")

    def other_dictionary(state):
        state["task_state"] = {"fairseq_deq.dictionary": {"types": 1, "sha256": "0"}}

    def wider(state):
        state["model"][WEIGHT] = torch.zeros(1, 2)

    for inputs, sentence in [
        ([path, tiny_checkpoint], "are of different models: "),
        ([path, changed(path, tmp_path / "w.pt", wider)], f"different models: {WEIGHT} is .* and \\(1, 2\\)"),
        ([path, changed(path, tmp_path / "d.pt", other_dictionary)], "trained with different dictionaries"),
        ([tmp_path / "none.pt"], "there is no checkpoint"),
        ([trained, "--last", "4"], "--last 4: the folder .* has 3 checkpoints with a number"),
        ([trained, "--last", "0"], "--last must be at least 1, got 0"),
    ]:
        assert run(*inputs, "--out", tmp_path / "out.pt") == 1
        error = capsys.readouterr().err
        assert error.startswith("fairseq-deq-average: ")
        assert error.count("\n") == 1
        assert re.search(sentence, error), error
        assert not (tmp_path / "out.pt").exists()
    assert run(path, "--out", tmp_path / "there.pt") == 1
    assert "already exists" in capsys.readouterr().err
    assert (tmp_path / "there.pt").read_bytes() == b"here"
