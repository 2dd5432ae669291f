"""fairseq-deq-anytime: perplexity against the budget, and the words that need most of it."""

import json
import math
import re

import pytest
import torch
from matplotlib import image

from fairseq_deq.tools import anytime


@pytest.fixture
def options(data_bin, deq_checkpoint):
    """What evaluates the tiny model on the test text."""
    return (
        *(str(data_bin), "--path", str(deq_checkpoint), "--gen-subset", "test"),
        *("--tokens-per-sample", "32", "--batch-size", "8", "--num-workers", "0", "--cpu"),
    )


def test_budgets_double_up_to_the_last():
    assert anytime.budgets_up_to(30) == [1, 2, 4, 8, 16, 30]
    assert anytime.budgets_up_to(8) == [1, 2, 4, 8]
    assert anytime.budgets_up_to(1) == [1]


def test_the_table_is_that_of_fairseq_eval_lm(options, in_process, capsys, tmp_path):
    numbers, picture = tmp_path / "anytime.json", tmp_path / "anytime.png"
    assert anytime.main([*options, "--json", str(numbers), "--plot", str(picture), "--words", "4"]) == 0
    printed = capsys.readouterr().out
    table = json.loads(numbers.read_text())
    assert [line["budget"] for line in table["budgets"]] == [1, 2, 4, 8]
    for line in table["budgets"]:
        overrides = f"{{'f_thres': {line['budget']}}}"
        log = in_process("fairseq-eval-lm", *options, "--model-overrides", overrides).checked().text
        (perplexity,) = re.findall(r"Perplexity: ([\d.]+)", log)
        assert line["perplexity"] == pytest.approx(float(perplexity), abs=0.006)
        assert f"{line['perplexity']:.2f}" in printed
        assert line["evaluations"] <= line["budget"]
    residuals = [line["residual"] for line in table["budgets"]]
    assert residuals[0] == 1.0  # the only evaluation is at z = 0
    assert residuals[-1] < 0.2
    evaluations = [word["evaluations"] for word in table["words"]]
    assert len(evaluations) == 4
    assert evaluations == sorted(evaluations, reverse=True)
    assert all(word["count"] >= 5 for word in table["words"])
    assert image.imread(picture).ndim == 3


def test_words_are_ranked_by_their_mean(data_bin):
    from fairseq.data import Dictionary

    words = Dictionary()
    for name in "abc":
        words.add_symbol(name)
    a, b, c = (words.index(name) for name in "abc")
    source = torch.tensor([a, a, b, b, c])
    evaluations = torch.tensor([3, 5, 9, 7, 30])
    loss, residual = torch.tensor([1.0, 3, 2, 2, 9]), torch.full((5,), math.inf)
    none = torch.zeros(5, 0)
    solves = (residual, evaluations, evaluations < 9, evaluations.byte())
    passed = anytime.Evaluation(30, source, loss, *solves, none, none)
    ranked = anytime.hardest(passed, words, count=5, at_least=2)
    assert [(word.word, word.count, word.evaluations, word.loss) for word in ranked] == [
        ("b", 2, 8.0, 2.0),
        ("a", 2, 4.0, 2.0),
    ]
    assert anytime.hardest(passed, words, count=1, at_least=1)[0].word == "c"
    assert passed.summary()["residual"] == 1.0
    assert passed.perplexity == pytest.approx(math.exp(17 / 5))


def test_the_first_point_does_not_flatten_the_others():
    assert anytime.axis_top([1e4, 220.0, 210.0, 208.0]) == pytest.approx(221.8)
    assert anytime.axis_top([232.0, 231.0, 224.0, 223.7]) is None
    assert anytime.axis_top([1e4, 210.0]) is None
    top = anytime.axis_top([1e4, 210.0, 210.0, 210.0])
    assert top is not None
    assert 210 < top < 211


def test_the_picture_says_its_conditions_and_what_the_first_point_is(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (figures.append(figure), path.touch()))
    none, empty = torch.zeros(2, dtype=torch.bool), torch.zeros(2, 0)
    passes = [
        anytime.Evaluation(
            budget,
            none.long(),
            torch.full((2,), loss),
            none + 0.1,
            none.long(),
            none,
            none.byte(),
            empty,
            empty,
        )
        for budget, loss in ((1, 9.0), (2, 5.0), (4, 4.9), (8, 4.88))
    ]
    found = {"checkpoint": "a.pt", "data": "bin", "subset": "test", "tokens": 1234, "tokens_per_sample": 64}
    found |= {"task": "language_modeling", "solver": "anderson", "rtol": 1e-3, "atol": 0.0}
    anytime.draw(passes, anytime.sentence_of(found), tmp_path / "x.png")
    (figure,) = figures
    assert "a.pt, test text of bin" in figure._suptitle.get_text()
    assert "1,234 tokens in blocks of 64" in figure._suptitle.get_text()
    assert "tolerance 0.001 relative" in figure._suptitle.get_text()
    left = figure.axes[0]
    assert 148.4 < left.get_ylim()[1] < 160  # the second point is at exp(5)
    assert [text.get_text() for text in left.texts] == ["↑ 8,103"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--budgets", "0,4"), "--budgets must be numbers of at least 1 with commas between, like 1,2,4,30"),
        (("--budgets", "few"), "--budgets must be numbers of at least 1 with commas between, like 1,2,4,30"),
        (("--plot", "curve.pdf"), "--plot curve.pdf: the picture is a PNG, so its name must end in .png"),
        (("--context-window", "8"), "fairseq-deq-anytime has no --context-window"),
        (("--model-overrides", "{'gradient': 'unroll'}"), "is a stack of layers, not an equilibrium"),
        (("--model-overrides", "{'pretrain_steps': 9}"), "is a stack of layers, not an equilibrium"),
    ],
)
def test_bad_input_is_one_sentence(options, more, sentence, capsys):
    assert anytime.main([*options, *more]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("fairseq-deq-anytime: ")
    assert sentence in error[-1]


def test_a_model_without_a_solver_is_refused(options, tiny_checkpoint, capsys):
    assert anytime.main([*options, "--path", str(tiny_checkpoint)]) == 1
    assert "is a TransformerLanguageModel, which has no solver" in capsys.readouterr().err
