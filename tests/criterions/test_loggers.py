"""What solves came to reaches whoever draws it: Weights & Biases, with the call that fairseq makes."""

from __future__ import annotations

from types import SimpleNamespace

from fairseq.logging import progress_bar


def test_weights_and_biases_get_the_columns_of_the_solves(in_process, deq_training, tmp_path, monkeypatch):
    logged, begun = [], []
    fake = SimpleNamespace(
        init=lambda **options: begun.append(options),
        log=lambda values, step: logged.append((step, values)),
        config=SimpleNamespace(update=lambda config: None),
    )
    monkeypatch.setattr(progress_bar, "wandb", fake)
    options = ("--wandb-project", "deq", "--log-interval", "1", "--save-dir", tmp_path)
    in_process("fairseq-train", *deq_training, *options)
    assert begun[0]["project"] == "deq"
    by_update = {step for step, values in logged if "train_inner/f_nfe" in values}
    assert by_update == {1, 2, 3}
    names = {name for _, values in logged for name in values}
    columns = (
        "loss",
        "ppl",
        "f_nfe",
        "f_lane_nfe",
        "f_res",
        "f_conv",
        "b_nfe",
        "b_lane_nfe",
        "b_res",
        "b_conv",
    )
    assert {f"train_inner/{column}" for column in columns} <= names
    assert {"valid/loss", "valid/f_nfe", "valid/f_conv"} <= names
