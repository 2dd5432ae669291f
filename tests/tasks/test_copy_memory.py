"""The copy task draws what the papers describe, and reports the loss in their units."""

import json
import math

import pytest
import torch

from fairseq_deq.tasks.copy_memory import CopyMemoryConfig, CopyMemoryTask, generate, memoryless_loss

TINY = (
    *("--task", "copy_memory", "--blank-len", "6", "--copy-len", "2", "--train-size", "40"),
    *("--valid-size", "24", "--arch", "deq_transformer_lm", "--criterion", "deq_lm_loss"),
    *("--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "16", "--decoder-attention-heads", "2"),
    *("--init-std", "0.1", "--optimizer", "adam", "--lr", "0.01", "--batch-size", "8"),
    *("--required-batch-size-multiple", "1", "--num-workers", "0", "--cpu", "--log-format", "json"),
)


@pytest.mark.parametrize(("definition", "while_answering"), [("paper", 0), ("tcn", 9)])
def test_sequences_are_those_of_the_definition(definition, while_answering):
    x, y = generate(50, 400, 10, definition, seed=3)
    assert x.shape == y.shape == (50, 420)
    assert set(x[:, :10].flatten().tolist()) == set(range(1, 9))
    assert (x[:, 10:409] == 0).all()
    assert (x[:, 409] == 9).all()
    assert (x[:, 410:] == while_answering).all()
    assert (y[:, :410] == 0).all()
    assert torch.equal(y[:, 410:], x[:, :10])


def test_both_definitions_and_all_seeds_draw_reproducibly():
    x, _ = generate(20, 30, 5, "paper", seed=3)
    again, _ = generate(20, 30, 5, "tcn", seed=3)
    other, _ = generate(20, 30, 5, "paper", seed=4)
    assert torch.equal(x[:, :5], again[:, :5])
    assert not torch.equal(x[:, :5], other[:, :5])
    # A change of platform or library must not change the data behind a published number.
    assert x[0, :5].tolist() == [3, 1, 2, 4, 1]


def test_who_does_not_remember_has_the_loss_of_the_paper():
    """LSTM and GRU stand at 0.0501 and 0.0491 in the table of the paper."""
    assert memoryless_loss(400, 10) == pytest.approx(0.0495, abs=5e-5)


def _task(**options):
    return CopyMemoryTask.setup_task(CopyMemoryConfig(**options))


def test_splits_differ_and_do_not_depend_on_the_size_of_the_others():
    small, large = _task(train_size=10, valid_size=5), _task(train_size=30, valid_size=5)
    for task in (small, large):
        for split in ("train", "valid", "test"):
            task.load_dataset(split)
    assert torch.equal(small.dataset("valid").x, large.dataset("valid").x)
    assert torch.equal(small.dataset("train").x, large.dataset("train").x[:10])
    assert not torch.equal(small.dataset("valid").x, small.dataset("test").x)
    assert not torch.equal(small.dataset("valid").x, small.dataset("train").x[:5])


def test_a_batch_holds_digits_of_the_dictionary():
    task = _task(train_size=4, blank_len=7, copy_len=3)
    task.load_dataset("train")
    dataset = task.dataset("train")
    batch = dataset.collater([dataset[2], dataset[0]])
    assert batch["net_input"]["src_tokens"].shape == batch["target"].shape == (2, 13)
    assert batch["ntokens"] == 26
    words = task.source_dictionary.string(batch["target"][0]).split()
    assert words == ["0"] * 10 + [str(int(d)) for d in generate(4, 7, 3, "paper", 3333)[0][2, :3]]
    assert dataset.collater([]) == {}


def test_training_and_validation_report_nats_a_position(in_process, tmp_path):
    log = (
        in_process(
            *("fairseq-train", *TINY, "--max-update", "12", "--log-interval", "4", "--save-dir", tmp_path)
        )
        .checked()
        .text
    )
    lines = [json.loads(line[line.index("{") :]) for line in log.splitlines() if '{"epoch"' in line]
    inner = [line for line in lines if "copy_loss" in line]
    assert len(inner) == 3
    for line in inner:
        assert float(line["copy_loss"]) == pytest.approx(float(line["loss"]) * math.log(2), abs=5e-4)
    (valid,) = [line for line in lines if line.get("valid_num_updates") == "12"]
    checked = in_process(
        *("fairseq-validate", "--task", "copy_memory", "--path", tmp_path / "checkpoint_last.pt"),
        *("--batch-size", "5", "--required-batch-size-multiple", "1", "--num-workers", "0", "--cpu"),
        *("--valid-subset", "valid", "--blank-len", "6", "--copy-len", "2", "--valid-size", "24"),
    ).checked()
    again = float(checked.text.split("copy_loss ")[-1].split()[0])
    assert again == pytest.approx(float(valid["valid_copy_loss"]), rel=1e-3)


def test_fairseqs_own_transformer_trains_on_it(in_process, tmp_path):
    log = in_process(
        *("fairseq-train", "--task", "copy_memory", "--blank-len", "6", "--copy-len", "2"),
        *("--train-size", "16", "--valid-size", "8", "--arch", "transformer_lm", "--decoder-layers", "1"),
        *("--decoder-embed-dim", "16", "--decoder-input-dim", "16", "--decoder-output-dim", "16"),
        *("--decoder-ffn-embed-dim", "16", "--decoder-attention-heads", "2", "--optimizer", "adam"),
        *("--batch-size", "8", "--num-workers", "0", "--cpu", "--max-update", "2", "--no-save"),
    ).checked()
    assert "copy_loss" in log.text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--blank-len 0", "--blank-len must be at least 1, got 0"),
        ("--train-size 0", "--train-size must be at least 1, got 0"),
        ("--data-seed -1", "--data-seed must be in [0, 1000000000], got -1"),
        ("--tokens-per-sample 64", "--tokens-per-sample is --blank-len + 2 x --copy-len = 10 here"),
        ("--valid-subset dev", "copy_memory has the splits train, valid, test, not 'dev'"),
    ],
)
def test_bad_input_is_one_sentence(options, sentence, refused):
    assert (
        sentence in refused("fairseq-train", *TINY, "--max-update", "1", "--no-save", *options.split()).text
    )
