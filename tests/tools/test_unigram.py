"""fairseq-deq-unigram: its number, against an independent count and against fairseq-eval-lm itself."""

import collections
import itertools
import json
import math
import re

import pytest
import torch
from fairseq import options, tasks
from fairseq.models import FairseqLanguageModel
from fairseq.models.fairseq_decoder import FairseqDecoder
from fairseq_cli import eval_lm, preprocess

from fairseq_deq.tools import unigram

# Jane Austen, Pride and Prejudice (1813), the beginning, tokenised by hand; test has words that train lacks.
TRAIN = """\
It is a truth universally acknowledged , that a single man in possession of a good fortune , must be
in want of a wife . However little known the feelings or views of such a man may be on his first
entering a neighbourhood , this truth is so well fixed in the minds of the surrounding families ,
that he is considered as the rightful property of some one or other of their daughters .
"""
TEST = """\
“ My dear Mr. Bennet , ” said his lady to him one day , “ have you heard that a house in the
neighbourhood is let at last ? ”
Mr. Bennet replied that he had not .
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The texts after fairseq-preprocess."""
    folder = tmp_path_factory.mktemp("text")
    for split, text in {"train": TRAIN, "valid": TEST, "test": TEST}.items():
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")
    arguments = ["--only-source", "--destdir", str(folder / "bin"), "--workers", "1"]
    for split in ("train", "valid", "test"):
        arguments += [f"--{split}pref", str(folder / f"{split}.txt")]
    preprocess.main(options.get_preprocessing_parser().parse_args(arguments))
    return folder / "bin"


def independent_bits(alpha):
    """The same loss from the raw lines: no index, no fairseq."""
    train = [[*line.split(), "</s>"] for line in TRAIN.splitlines()]
    known = {word for line in train for word in line} | {"<s>", "<pad>", "<unk>"}
    # fairseq fills the dictionary up to a multiple of 8 with words that do not occur.
    size = math.ceil(len(known) / 8) * 8
    counts = collections.Counter(itertools.chain.from_iterable(train))
    total = counts.total()
    bits = []
    for line in TEST.splitlines():
        for word in [*line.split(), "</s>"]:
            word = word if word in known else "<unk>"
            bits.append(-math.log2((counts[word] + alpha) / (total + alpha * size)))
    return bits


@pytest.mark.parametrize("alpha", [1.0, 0.1, 25.0])
def test_loss_is_that_of_an_independent_count(data, alpha):
    bits = independent_bits(alpha)
    result = unigram.evaluate(data, "train", "test", alpha)
    assert result["tokens"] == len(bits)
    assert result["loss"] == pytest.approx(sum(bits) / len(bits), rel=1e-12)
    assert result["perplexity"] == pytest.approx(2 ** (sum(bits) / len(bits)), rel=1e-12)
    assert result["eos"] == TEST.count("\n")
    words = set(TRAIN.split())
    assert result["unk"] == sum(word not in words for word in TEST.split()) > 0


class FixedDecoder(FairseqDecoder):
    """A decoder that gives every position the same distribution."""

    def __init__(self, dictionary, log_probabilities):
        super().__init__(dictionary)
        self.log_probabilities = log_probabilities

    def forward(self, prev_output_tokens, **kwargs):
        shape = (*prev_output_tokens.shape, -1)
        return self.log_probabilities.expand(shape), {"attn": None}

    def max_positions(self):
        return 10_000


@pytest.mark.parametrize("tokens_per_sample", [5, 1000])
def test_fairseq_eval_lm_gives_the_unigram_model_the_same_number(data, tokens_per_sample):
    """The unigram distribution, scored by the code of fairseq-eval-lm: same tokens, same base, same loss."""
    parser = options.get_eval_lm_parser(default_task="language_modeling")
    arguments = [str(data), "--path", "none", "--tokens-per-sample", str(tokens_per_sample), "--cpu"]
    args = options.parse_args_and_arch(parser, arguments)
    task = tasks.setup_task(args)
    task.load_dataset("test")

    train = unigram.count_tokens(data, "train", task.source_dictionary)
    probabilities = torch.tensor(train, dtype=torch.float64) + 1.0
    log_probabilities = (probabilities / probabilities.sum()).log().float()
    model = FairseqLanguageModel(FixedDecoder(task.source_dictionary, log_probabilities))
    batches = task.eval_lm_dataloader(
        task.dataset("test"), max_tokens=36000, batch_size=3, max_positions=10_000, num_workers=0
    )
    expected = eval_lm.eval_lm(
        models=[model],
        source_dictionary=task.source_dictionary,
        batch_iterator=batches,
        target_dictionary=task.target_dictionary,
        device=torch.device("cpu"),
    )
    result = unigram.evaluate(data, "train", "test", 1.0)
    assert result["loss"] == pytest.approx(float(expected["loss"]), rel=1e-5)
    assert result["perplexity"] == pytest.approx(float(expected["perplexity"]), rel=1e-5)


def test_every_token_of_the_dictionary_has_its_share(data):
    """The probabilities of the whole dictionary sum to 1, also of tokens that never occur."""
    train = [3, 0, 5, 0]
    losses = [unigram.unigram_loss(train, [int(i == token) for i in range(4)], 0.5) for token in range(4)]
    assert sum(2**-loss for loss in losses) == pytest.approx(1.0, rel=1e-12)


def test_without_smoothing_an_unseen_token_is_impossible():
    assert unigram.unigram_loss([3, 0], [1, 1], alpha=0) == math.inf
    assert unigram.unigram_loss([3, 1], [1, 1], alpha=0) == pytest.approx((-math.log2(3 / 4) + 2) / 2)


def test_command_line_prints_the_number(data, capsys):
    assert unigram.main([str(data)]) == 0
    bits = independent_bits(1.0)
    line = capsys.readouterr().out
    assert re.search(r"loss \(base 2\): ([0-9.]+), Perplexity: ([0-9.]+)", line).groups() == (
        f"{sum(bits) / len(bits):.4f}",
        f"{2 ** (sum(bits) / len(bits)):.2f}",
    )
    assert unigram.main([str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == unigram.evaluate(data, "train", "test", 1.0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{tmp}"], "There is no {tmp}/dict.txt"),
        (["{data}", "--gen-subset", "test7"], "There is no {data}/test7.idx"),
        (["{data}", "--alpha", "-1"], "--alpha must be 0 or more, not -1"),
        (["{data}", "--alpha", "nan"], "--alpha must be 0 or more, not nan"),
    ],
)
def test_bad_input_is_one_sentence(data, tmp_path, capsys, arguments, sentence):
    assert unigram.main([argument.format(tmp=tmp_path, data=data) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert sentence.format(tmp=tmp_path, data=data) in captured.err


def test_a_dictionary_of_another_text_is_noticed(data, tmp_path, capsys):
    for file in data.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "dict.txt").write_text("a 2\nman 1\n")
    assert unigram.main([str(tmp_path)]) == 1
    assert "binarised with another dictionary" in capsys.readouterr().err
