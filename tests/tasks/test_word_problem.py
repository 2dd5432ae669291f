"""The word problem multiplies as permutation matrices do, and reports which answers are right."""

import re

import numpy as np
import pytest
import torch
from runs import json_lines

from fairseq_deq.errors import OptionError
from fairseq_deq.tasks.word_problem import (
    GENERATORS,
    WordProblemConfig,
    WordProblemTask,
    elements,
    generate,
    multiplication_table,
)

TINY = (
    *("--task", "word_problem", "--group", "Z2", "--word-len", "8", "--train-size", "64"),
    *("--valid-size", "24", "--criterion", "deq_lm_loss", "--optimizer", "adam", "--lr", "0.01"),
    *("--batch-size", "8", "--required-batch-size-multiple", "1", "--num-workers", "0", "--cpu"),
    *("--log-format", "json"),
)
DEQ = (
    *("--arch", "deq_transformer_lm", "--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "16"),
    *("--decoder-attention-heads", "2", "--init-std", "0.1"),
)
LSTM = (
    *("--arch", "lstm_lm", "--dropout", "0", "--decoder-embed-dim", "16", "--decoder-hidden-size", "16"),
    *("--decoder-out-embed-dim", "16"),
)


def _matrices(group):
    """The elements as matrices that move unit vector i to that of place i, (G, n, n)."""
    identity = np.eye(len(elements(group)[0]), dtype=int)
    return np.stack([identity[:, list(element)] for element in elements(group)]).astype(np.float32)


@pytest.mark.parametrize(("group", "order"), [("Z2", 2), ("S3", 6), ("A5", 60), ("Z60", 60), ("A4xZ5", 60)])
def test_the_table_is_that_of_the_group(group, order):
    matrices, table = _matrices(group), multiplication_table(group).numpy()
    assert len(set(elements(group))) == order
    assert table.shape == (order, order)
    side_by_side = matrices.transpose(1, 0, 2).reshape(matrices.shape[1], -1)
    products = (matrices @ side_by_side).reshape(order, -1, order, matrices.shape[2])
    assert (products.transpose(0, 2, 1, 3) == matrices[table]).all()
    assert (table[0] == np.arange(order)).all()  # 0 is the identity
    assert (np.sort(table, 0) == np.arange(order)[:, None]).all()  # every element has its inverse
    assert (table == table.T).all() == group.startswith("Z")


def _commutators(table):
    """The subgroup that the elements a b a^-1 b^-1 generate, over the numbers that `table` multiplies."""
    inverse = (table == 0).argmax(1)

    def of(group):
        found = {int(table[table[a, b], inverse[table[b, a]]]) for a in group for b in group}
        while len(more := found | {int(table[a, b]) for a in found for b in found}) > len(found):
            found = more
        return found

    return of


@pytest.mark.parametrize("group", GENERATORS)
def test_only_a5_is_not_solvable(group):
    of = _commutators(multiplication_table(group).numpy())
    whole = set(range(len(elements(group))))
    assert len(of(of(of(whole)))) == (60 if group == "A5" else 1)


def test_the_elements_of_a5_are_the_even_permutations():
    assert {round(float(np.linalg.det(matrix))) for matrix in _matrices("A5")} == {1}


@pytest.mark.parametrize("group", ["S3", "A5"])
def test_each_target_is_the_product_of_the_elements_up_to_there(group):
    x, y = generate(20, 9, group, seed=3)
    matrices = _matrices(group)
    assert x.shape == y.shape == (20, 9)
    for word, products in zip(x.tolist(), y.tolist(), strict=True):
        state = np.eye(matrices.shape[1], dtype=int)
        for element, right in zip(word, products, strict=True):
            state = state @ matrices[element]
            assert (state == matrices[right]).all()


def test_elements_are_drawn_uniformly_and_reproducibly():
    x, _ = generate(2000, 30, "S3", seed=3)
    shares = torch.bincount(x.flatten(), minlength=6) / x.numel()
    assert shares.sub(1 / 6).abs().max() < 0.01
    # A change of platform or library must not change the data behind a published number.
    assert x[0, :8].tolist() == [2, 0, 1, 3, 0, 0, 0, 5]
    assert not torch.equal(x, generate(2000, 30, "S3", seed=4)[0])


def _task(**options):
    return WordProblemTask.setup_task(WordProblemConfig(**options))


def test_splits_differ_and_do_not_depend_on_the_size_of_the_others():
    small, large = (_task(group="A5", train_size=size, valid_size=5) for size in (10, 30))
    for task in (small, large):
        for split in ("train", "valid", "test"):
            task.load_dataset(split)
    assert torch.equal(small.dataset("valid").x, large.dataset("valid").x)
    assert torch.equal(small.dataset("train").x, large.dataset("train").x[:10])
    words = [tuple(word) for split in ("train", "valid", "test") for word in large.dataset(split).x.tolist()]
    assert len(set(words)) == 30 + 5 + 5


def test_a_batch_holds_elements_of_the_dictionary():
    task = _task(group="A5", train_size=4, word_len=6)
    task.load_dataset("train")
    dataset = task.dataset("train")
    batch = dataset.collater([dataset[2], dataset[0]])
    x, y = generate(4, 6, "A5", 3333)
    for tensor, numbers in ((batch["net_input"]["src_tokens"], x), (batch["target"], y)):
        assert task.source_dictionary.string(tensor[0]) == " ".join(map(str, numbers[2].tolist()))
    assert len(task.source_dictionary) == 64


def test_right_answers_are_counted_over_all_positions_and_over_the_last_quarter():
    task = _task(group="Z2", word_len=8)
    target = torch.tensor([[4, 4, 4, 4, 4, 4, 4, 5], [5, 5, 5, 5, 4, 4, 4, 4]])
    scores = torch.zeros(2, 8, 6)
    scores[..., 4] = 1.0  # the answer is always the first element
    counted = task.counts(scores, target)
    assert {name: int(number) for name, number in counted.items()} == {
        "right_sum": 11,
        "last_right_sum": 3,
        "last_sum": 4,
    }
    assert int(_task(word_len=2).counts(scores[:, :2], target[:, :2])["last_sum"]) == 2


def test_training_and_validation_report_the_share_of_right_answers(in_process, tmp_path):
    options = (*TINY, *DEQ, "--max-update", "2", "--best-checkpoint-metric", "last_accuracy")
    log = in_process(
        "fairseq-train", *options, "--maximize-best-checkpoint-metric", "--save-dir", tmp_path
    ).checked()
    (valid,) = [line for line in json_lines(log.text) if line.get("valid_num_updates") == "2"]
    assert (tmp_path / "checkpoint_best.pt").is_file()
    checked = in_process(
        *("fairseq-validate", "--task", "word_problem", "--path", tmp_path / "checkpoint_last.pt"),
        *("--batch-size", "5", "--required-batch-size-multiple", "1", "--num-workers", "0", "--cpu"),
    ).checked()
    for column in ("accuracy", "last_accuracy"):
        again = float(checked.text.split(f"| {column} ")[-1].split()[0])
        assert again == pytest.approx(float(valid[f"valid_{column}"]), abs=1e-4)
        assert again in [pytest.approx(right / 24 / 8, abs=1e-4) for right in range(24 * 8 + 1)]


def test_fairseqs_own_lstm_trains_on_it(in_process):
    log = in_process("fairseq-train", *TINY, *LSTM, "--max-update", "2", "--no-save").checked()
    assert "valid_last_accuracy" in log.text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"word_len": 0}, "--word-len must be in [1, 100000], got 0"),
        ({"group": "S4"}, "--group must be one of Z2, S3, A5, Z60, A4xZ5; got 'S4'"),
        ({"train_size": 0}, "--train-size must be at least 1, got 0"),
        ({"valid_size": -3}, "--valid-size must be at least 1, got -3"),
        ({"data_seed": -1}, "--data-seed must be in [0, 1000000000], got -1"),
        ({"tokens_per_sample": 64}, "--tokens-per-sample is --word-len = 16 here, or 0; got 64"),
        ({"max_target_positions": 0}, "--max-target-positions must be at least 1, got 0"),
        ({"add_bos_token": True}, "--add-bos-token does not work with --task word_problem; leave it out"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options, sentence):
    with pytest.raises(OptionError, match=re.escape(sentence)):
        _task(**options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--word-len 0", "--word-len must be in [1, 100000], got 0"),
        ("--group S4", "invalid choice: 'S4'"),
        ("--valid-subset dev", "word_problem has the splits train, valid, test, not 'dev'"),
    ],
)
def test_bad_input_is_one_sentence(options, sentence, refused):
    words = ("fairseq-train", *TINY, *DEQ, "--max-update", "1", "--no-save", *options.split())
    assert sentence in refused(*words).text
