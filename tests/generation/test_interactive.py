"""fairseq-interactive and fairseq-generate, on real text as people type it."""

from __future__ import annotations

import re

import pytest
from models.builders import count_solves

PROMPTS = "the people of the United States\n\nwe\nour common Union , and the people\n"
SEARCH = ("--max-len-a", "1", "--max-len-b", "6", "--cpu", "--buffer-size", "4", "--batch-size", "4")


@pytest.fixture
def prompts(tmp_path):
    """A file of prompts of different lengths, one of them empty."""
    path = tmp_path / "prompts.txt"
    path.write_text(PROMPTS, encoding="utf-8")
    return path


def _continuations(output: str, kind: str = "D") -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for number, text in re.findall(rf"^{kind}-(\d+)\t-?[\d.a-z]+\t(.*)$", output, re.MULTILINE):
        found.setdefault(int(number), []).append(text)
    return found


def _interactive(in_process, data, checkpoint, prompts, *options):
    arguments = ("--task", "language_modeling", "--path", checkpoint, "--input", prompts)
    return in_process("fairseq-interactive", data, *arguments, *SEARCH, *options).checked().text


def test_a_batch_of_prompts_is_one_parallel_solve(monkeypatch, in_process, data_bin, deq_checkpoint, prompts):
    solves = count_solves(monkeypatch)
    output = _interactive(in_process, data_bin, deq_checkpoint, prompts, "--beam", "3", "--nbest", "3")
    longest = max(len(line.split()) for line in PROMPTS.splitlines())
    assert [shape for shape in solves if shape[1] > 1] == [(4, longest + 1)]
    for number, texts in _continuations(output).items():
        assert len(texts) == 3
        prompt = PROMPTS.splitlines()[number].split()
        for words in texts:
            assert len(words.split()) <= len(prompt) + 6
            known = [word if word in words else "<unk>" for word in prompt]
            assert words.split()[: len(prompt)] == known


@pytest.mark.parametrize(
    "options",
    [
        "--beam 1",
        "--beam 2 --nbest 2 --temperature 1.5 --no-repeat-ngram-size 2",
        "--beam 2 --nbest 2 --sampling --sampling-topk 5 --seed 3",
        "--beam 1 --sampling --sampling-topp 0.8 --temperature 0.7 --seed 3",
        "--diverse-beam-groups 2 --beam 4 --nbest 4",
    ],
)
def test_what_is_printed_does_not_depend_on_how_prompts_are_solved(
    monkeypatch, in_process, data_bin, unique_checkpoint, prompts, options
):
    exact = ("--model-overrides", "{'f_thres': 300, 'f_eps': 2e-6}")
    whole = _interactive(in_process, data_bin, unique_checkpoint, prompts, *options.split(), *exact)
    from fairseq_deq.models.deq_decoder import DEQDecoder
    from fairseq_deq.tasks import _careful

    monkeypatch.setattr(_careful, "is_prefillable", lambda models: True)
    monkeypatch.delattr(DEQDecoder, "prefill")
    one_by_one = _interactive(in_process, data_bin, unique_checkpoint, prompts, *options.split(), *exact)
    assert _continuations(whole, "H") == _continuations(one_by_one, "H")
    assert len(_continuations(whole, "H")) == 4

    def scores(output):
        lines = re.findall(r"^P-\d+\t(.*)$", output, re.MULTILINE)
        return [float(score) for line in lines for score in line.split()]

    assert scores(whole) == pytest.approx(scores(one_by_one), abs=5e-3)


def test_the_end_of_a_sentence_is_handled_as_for_any_language_model(
    in_process, data_bin, deq_checkpoint, tiny_checkpoint, prompts
):
    """Where only the end of the sentence can follow, both models print the prompts alone.

    fairseq counts the token before the prompt to it, and so lets one more follow the longest.
    """
    for checkpoint, more in ((deq_checkpoint, 0), (tiny_checkpoint, 1)):
        output = _interactive(
            in_process, data_bin, checkpoint, prompts, "--beam", "1", "--max-len-b", "0", "--min-len", "1"
        )
        texts = _continuations(output, "H")
        longest = max(range(4), key=lambda i: len(PROMPTS.splitlines()[i].split()))
        assert len(texts[longest][0].split()) == len(PROMPTS.splitlines()[longest].split()) + more
        assert all("</s>" not in text for rows in texts.values() for text in rows)


@pytest.mark.parametrize("bpe", ["sentencepiece", "subword_nmt"])
def test_pieces_go_in_and_words_come_out(in_process, pieces, prompts, bpe):
    trained = pieces(bpe)
    output = _interactive(
        in_process, trained.data, trained.checkpoint, prompts, "--beam", "1", *trained.options
    )
    texts = _continuations(output)
    for number, line in enumerate(PROMPTS.splitlines()):
        assert texts[number][0].startswith(line)
        assert "▁" not in texts[number][0]
        assert "@@" not in texts[number][0]
    assert "▁" in output or "@@" in output  # in the H lines, as for any model of pieces


def test_moses_takes_words_apart_and_puts_them_together(in_process, data_bin, deq_checkpoint, tmp_path):
    path = tmp_path / "raw.txt"
    path.write_text("the people, and the people's Union\n", encoding="utf-8")
    options = ("--tokenizer", "moses", "--moses-no-escape", "--batch-size", "1")
    output = _interactive(in_process, data_bin, deq_checkpoint, path, "--beam", "1", *options)
    assert "the people , and the people 's Union" in re.sub("<unk>", "'s", output)
    assert _continuations(output)[0][0].startswith("the people, and the people")


def test_fairseq_generate_goes_as_far_as_for_any_language_model(in_process, data_bin, deq_checkpoint):
    output = (
        in_process(
            "fairseq-generate",
            data_bin,
            *("--task", "language_modeling", "--path", deq_checkpoint, "--gen-subset", "valid"),
            *("--sample-break-mode", "eos", "--batch-size", "4", "--beam", "2", "--cpu"),
            *("--max-len-a", "1", "--max-len-b", "5", "--num-workers", "0"),
            *("--skip-invalid-size-inputs-valid-test", "--required-batch-size-multiple", "1"),
        )
        .checked()
        .text
    )
    sources = _sources(output)
    texts = _continuations(output, "H")
    assert len(texts) == len(sources) > 5
    for number, source in sources.items():
        assert texts[number][0].startswith(source)


def _sources(output: str) -> dict[int, str]:
    return {int(n): s for n, s in re.findall(r"^S-(\d+)\t(.*)$", output, re.MULTILINE)}
