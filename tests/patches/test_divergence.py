"""A run that cannot go on says so; one that can, goes on."""

import json
import math

import torch


def _options(deq_training, folder, *options):
    return (*deq_training, "--save-dir", folder, "--disable-validation", *options)


def test_a_diverged_run_ends_in_advice(refused, deq_training, tmp_path):
    sentence = refused("fairseq-train", *_options(deq_training, tmp_path, "--lr", "1e38")).text
    assert "training diverged at update 2" in sentence
    assert "lower --lr" in sentence
    assert (tmp_path / "crash.pt").exists()


def test_an_exploding_solve_is_contained_and_training_goes_on(in_process, deq_training, tmp_path):
    options = ("--init-std", "30", "--clip-norm", "0.1", "--log-format", "json", "--log-interval", "1")
    log = in_process("fairseq-train", *_options(deq_training, tmp_path, *options)).text
    lines = [json.loads(line[line.index("{") :]) for line in log.splitlines() if '"f_conv"' in line]
    assert len(lines) >= 3
    assert max(float(line["f_conv"]) for line in lines) < 0.5  # or nothing needed to be contained
    assert all(math.isfinite(float(line["loss"])) for line in lines)
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    assert state["optimizer_history"][-1]["num_updates"] == 3
    assert all(torch.isfinite(weight).all() for weight in state["model"].values())
