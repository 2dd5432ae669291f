"""The command that scores raw text."""

from __future__ import annotations

import io
import json
import math
import sys

import pytest
import torch

from fairseq_deq.tools import score

LINES = ["the people of the United States", "", "xyzzy people"]


def _run(monkeypatch, capsys, data, checkpoint, text, *options):
    arguments = [str(data), "--path", str(checkpoint), "--input", str(text), "--cpu", *options]
    score.run(arguments)
    return capsys.readouterr().out


@pytest.fixture
def lines(tmp_path):
    """Sentences, one per line."""
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
    assert rows[0][0].startswith("# S: log_prob, tokens, perplexity, sentence, unknown")
    assert [row[5] for row in sentences.values()] == ["0", "0", "1"]
    assert [row[3] for row in rows if row[0] == "W-2"] == ["1", "0", "0"]
    assert total[0] == "T"
    assert total[6] == "1"
    assert 0 <= float(total[7]) < 0.99  # 8 evaluations are few
    assert 1e-3 < float(total[8]) < 1
    assert int(total[2]) == 7 + 1 + 3
    assert float(total[1]) == pytest.approx(sum(float(row[1]) for row in sentences.values()), abs=1e-2)


@pytest.mark.parametrize(("options", "ends"), [((), 3), (("--no-eos",), 0)])
def test_bits_per_byte_are_over_the_text_and_its_ends(
    monkeypatch, capsys, deq_checkpoint, data_bin, tmp_path, options, ends
):
    (tmp_path / "text.txt").write_text("the café\n\nwe people\n", encoding="utf-8")
    output = _run(monkeypatch, capsys, data_bin, deq_checkpoint, tmp_path / "text.txt", "--json", *options)
    total = json.loads(output.splitlines()[-1])
    assert total["bytes"] == len("the caf") + 2 + len("we people") + ends
    assert total["bits_per_byte"] == pytest.approx(-total["log_prob"] / math.log(2) / total["bytes"])
    row = _run(monkeypatch, capsys, data_bin, deq_checkpoint, tmp_path / "text.txt", *options).splitlines()[
        -1
    ]
    assert float(row.split("\t")[-1]) == pytest.approx(total["bits_per_byte"], abs=1e-4)


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
    assert [line.split("\t")[0] for line in output.splitlines()[1:]] == ["S-0", "W-0", "W-0", "T"]


def test_the_command_ends_in_one_sentence(deq_checkpoint, data_bin, capsys):
    words = [str(data_bin), "--path", str(deq_checkpoint), "--cpu", "--input"]
    assert score.main([*words, "nowhere.txt"]) == 1
    error = capsys.readouterr().err
    assert error == "fairseq-deq-score: --input: there is no text nowhere.txt\n"


@pytest.mark.parametrize(("text", "options"), [("", ()), ("\n\n", ("--no-eos",))])
def test_scoring_nothing_says_so(monkeypatch, capsys, deq_checkpoint, data_bin, tmp_path, text, options):
    (tmp_path / "empty.txt").write_text(text)
    with pytest.raises(SystemExit, match="has nothing to score"):
        _run(monkeypatch, capsys, data_bin, deq_checkpoint, tmp_path / "empty.txt", *options)


def test_lines_before_one_that_is_no_text_are_scored(monkeypatch, capsys, deq_checkpoint, data_bin, tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"the people\nwe\ncaf\xe9\nthe\n")
    with pytest.raises(SystemExit, match=r"line 3 of .*latin\.txt is not UTF-8"):
        _run(monkeypatch, capsys, data_bin, deq_checkpoint, path)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("\t")[4] for row in rows if row.startswith("S-")] == ["the people", "we"]
    assert not any(row.startswith("T\t") for row in rows)


def test_json_says_what_the_solves_came_to_and_which_words_are_unknown(
    monkeypatch, capsys, deq_checkpoint, data_bin, lines
):
    output = _run(monkeypatch, capsys, data_bin, deq_checkpoint, lines, "--json")
    *rows, total = (json.loads(line) for line in output.splitlines())
    assert [row["unknown"] for row in rows] == [[], [], ["xyzzy"]]
    assert total["unknown"] == 1
    assert 0 <= total["converged"] < 0.99
    assert total["residual"] > 1e-3


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_layer_that_is_not_finite_has_no_scores(
    monkeypatch, capsys, deq_checkpoint, data_bin, lines, tmp_path, options
):
    state = torch.load(deq_checkpoint, weights_only=False)
    for name, weight in state["model"].items():
        if "ffn" in name:
            weight.fill_(3e38)
    torch.save(state, tmp_path / "huge.pt")
    with pytest.raises(SystemExit, match="not finite"):
        _run(monkeypatch, capsys, data_bin, tmp_path / "huge.pt", lines, *options)


def test_texts_begin_as_in_the_training_of_the_checkpoint(
    monkeypatch, capsys, in_process, deq_training, data_bin, tmp_path
):
    in_process(
        "fairseq-train", *deq_training, "--add-bos-token", "--save-dir", tmp_path, "--disable-validation"
    )
    (tmp_path / "text.txt").write_text("the people\n")
    checkpoint = tmp_path / "checkpoint_last.pt"
    found = [
        _run(monkeypatch, capsys, data_bin, checkpoint, tmp_path / "text.txt", *options)
        for options in ((), ("--add-bos-token",))
    ]
    assert found[0] == found[1]
    state = torch.load(checkpoint, weights_only=False)
    state["cfg"]["task"]["add_bos_token"] = False
    torch.save(state, tmp_path / "other.pt")
    assert _run(monkeypatch, capsys, data_bin, tmp_path / "other.pt", tmp_path / "text.txt") != found[0]


def test_what_is_missing_is_said_in_a_sentence(monkeypatch, capsys, deq_checkpoint, data_bin, tmp_path):
    with pytest.raises(SystemExit, match="there is no text"):
        _run(monkeypatch, capsys, data_bin, deq_checkpoint, tmp_path / "nowhere.txt")
    with pytest.raises(SystemExit, match="no checkpoint"):
        _run(monkeypatch, capsys, data_bin, tmp_path / "nothing.pt", tmp_path / "nowhere.txt")
