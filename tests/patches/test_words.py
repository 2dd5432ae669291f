"""The perplexity per word is that of the whole text, however it is cut into blocks."""

import logging
import math
import re

import fairseq_cli.eval_lm
import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from models.builders import VOCABULARY, build

from fairseq_deq.tasks._streams import StreamBatches, StreamText

TOTAL = 61


def pieces(scheme):
    """A dictionary of 48 pieces, of which every other one begins (sentencepiece) or ends a word."""
    words = Dictionary()
    for i in range(VOCABULARY - 4):
        plain = f"p{i}"
        words.add_symbol(
            plain if i % 2 else {"sentencepiece": f"\u2581{plain}", "subword_nmt": f"{plain}@@"}[scheme]
        )
    return words


def text():
    tokens = torch.randint(4, VOCABULARY, (TOTAL,), generator=torch.Generator().manual_seed(5))
    tokens[[20, 60]] = 2  # ends of lines
    return StreamText("made up", [tokens], np.array([TOTAL]), 2, 1)


def evaluate(model, dictionary, caplog, block, streams, **options):
    batches = StreamBatches(text(), streams, 0, streams, block, whole_blocks=False)
    with caplog.at_level(logging.INFO):
        results = fairseq_cli.eval_lm.eval_lm(
            [model], dictionary, [batches[k] for k in range(len(batches))], **options
        )
    said = re.search(
        r"([\d,]+) words in ([\d,]+) pieces \((\w+)\): .* word-level perplexity ([\d.]+)", caplog.text
    )
    return results, said


def total_score(model, block, streams):
    batches = StreamBatches(text(), streams, 0, streams, block, whole_blocks=False)
    total = 0.0
    for k in range(len(batches)):
        batch = batches[k]
        log_probs = model(**batch["net_input"])[0].log_softmax(-1)
        kept = batch["target"] != 1
        total += log_probs.gather(-1, batch["target"].unsqueeze(-1)).squeeze(-1)[kept].sum().item()
    return total


def words_of(scheme):
    tokens = text().span(0, TOTAL).tolist()
    symbols = [token for token in tokens if token != 2]
    marked = sum(token % 2 == 0 for token in symbols)  # the dictionary begins at 4
    return 2 + (marked if scheme == "sentencepiece" else len(symbols) - marked)


@pytest.mark.parametrize("scheme", ["sentencepiece", "subword_nmt"])
@pytest.mark.parametrize(("block", "streams"), [(61, 1), (7, 1), (5, 4)])
def test_score_of_the_text_over_its_number_of_words(scheme, block, streams, caplog):
    model, dictionary = build(f_thres=12, f_eps=1e-3, dtype=torch.float32), pieces(scheme)
    with torch.no_grad():
        expected = math.exp(-total_score(model, block, streams) / words_of(scheme))
        results, said = evaluate(model, dictionary, caplog, block, streams, post_process=scheme)
    assert results["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert said.group(1, 2, 3) == (str(words_of(scheme)), str(TOTAL), scheme)
    assert float(said.group(4)) == pytest.approx(expected, rel=1e-4)


def test_without_post_process_the_perplexity_stays_a_piece(caplog):
    model = build(f_thres=12, f_eps=1e-3, dtype=torch.float32)
    with torch.no_grad():
        expected = math.exp(-total_score(model, 7, 1) / TOTAL)
        results, said = evaluate(model, pieces("sentencepiece"), caplog, 7, 1)
    assert results["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert said is not None


def test_a_text_of_words_has_no_second_perplexity(caplog):
    words = Dictionary()
    for i in range(VOCABULARY - 4):
        words.add_symbol(f"@{i}@")
    with torch.no_grad():
        _, said = evaluate(build(f_thres=12, f_eps=1e-3, dtype=torch.float32), words, caplog, 7, 1)
    assert said is None
