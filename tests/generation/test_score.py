"""The command that scores raw text."""

from __future__ import annotations

import io
import json
import math
import sys

import pytest

from fairseq_deq import score

LINES = ["the people of the United States", "", "xyzzy people"]


def _run(monkeypatch, capsys, data, checkpoint, text, *options):
    arguments = [str(data), "--path", str(checkpoint), "--input", str(text), "--cpu", *options]
    monkeypatch.setattr(sys, "argv", ["score", *arguments])
    score.cli_main()
    return capsys.readouterr().out


@pytest.fixture
def lines(tmp_path):
    """Sentences, one a line."""
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


def test_it_prints_sentences_and_words_and_what_they_add_up_to(
    monkeypatch, capsys, deq_checkpoint, data_bin, lines
):
    rows = [
        line.split("\t") for line in _run(monkeypatch, capsys, data_bin, deq_checkpoint, lines).splitlines()
    ]
    sentences = {row[0][2:]: row for row in rows if row[0].startswith("S-")}
    assert [row[4] for row in sentences.values()] == LINES
    for name, row in sentences.items():
        words = [cells for cells in rows if cells[0] == f"W-{name}"]
        assert sum(float(cells[1]) for cells in words) == pytest.approx(float(row[1]), abs=1e-2)
        assert [cells[2] for cells in words] == [*LINES[int(name)].split(), "</s>"]
        assert float(row[3]) == pytest.approx(math.exp(-float(row[1]) / int(row[2])), rel=1e-3)
    total = rows[-1]
    assert total[0] == "T"
    assert int(total[2]) == 7 + 1 + 3
    assert float(total[1]) == pytest.approx(sum(float(row[1]) for row in sentences.values()), abs=1e-2)


@pytest.mark.parametrize("bpe", ["sentencepiece", "subword_nmt"])
def test_pieces_are_joined_to_words(monkeypatch, capsys, pieces, lines, bpe):
    trained = pieces(bpe)
    output = _run(monkeypatch, capsys, trained.data, trained.checkpoint, lines, *trained.options, "--json")
    rows = [json.loads(line) for line in output.splitlines()]
    assert [row["sentence"] for row in rows[:-1]] == LINES
    first = rows[0]
    assert [word for word, _ in first["words"]] == [*LINES[0].split(), "</s>"]
    assert [piece for piece, _ in first["pieces"]][:-1] == trained.encode(LINES[0]).split()
    assert sum(value for _, value in first["words"]) == pytest.approx(first["log_prob"], abs=1e-4)
    total = rows[-1]
    assert total["words"] < total["tokens"]
    assert total["word_perplexity"] == pytest.approx(math.exp(-total["log_prob"] / total["words"]))


def test_the_perplexity_is_that_of_fairseq_eval_lm_over_sentences(
    monkeypatch, capsys, deq_checkpoint, data_bin, text, in_process
):
    output = _run(monkeypatch, capsys, data_bin, deq_checkpoint, text / "valid.txt", "--json")
    total = json.loads(output.splitlines()[-1])
    log = (
        in_process(
            "fairseq-eval-lm",
            data_bin,
            *("--path", deq_checkpoint, "--gen-subset", "valid", "--sample-break-mode", "eos"),
            *("--batch-size", "4", "--num-workers", "0", "--cpu"),
        )
        .checked()
        .text
    )
    evaluated = log[log.index("Evaluated ") :].split()
    assert total["tokens"] == int(evaluated[1].replace(",", ""))
    loss = float(log.split("Loss (base 2): ")[1].split(",")[0])
    assert math.log2(total["perplexity"]) == pytest.approx(loss, abs=2e-3)


def test_sentences_come_from_standard_input_and_their_end_can_be_left_out(
    monkeypatch, capsys, deq_checkpoint, data_bin
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the people\n"))
    output = _run(monkeypatch, capsys, data_bin, deq_checkpoint, "-", "--no-eos")
    assert [line.split("\t")[0] for line in output.splitlines()] == ["S-0", "W-0", "W-0", "T"]


def test_what_is_missing_is_said_in_a_sentence(monkeypatch, capsys, deq_checkpoint, data_bin, tmp_path):
    with pytest.raises(SystemExit, match="there is no text"):
        _run(monkeypatch, capsys, data_bin, deq_checkpoint, tmp_path / "nowhere.txt")
    with pytest.raises(SystemExit, match="no checkpoint"):
        _run(monkeypatch, capsys, data_bin, tmp_path / "nothing.pt", tmp_path / "nowhere.txt")
