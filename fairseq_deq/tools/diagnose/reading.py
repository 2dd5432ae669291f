"""The text itself, coloured, with what is known of each position."""

from __future__ import annotations

import json
import math
from html import escape
from typing import Any

import torch

from ...solvers import Status
from .measure import Measured
from .subject import Subject

# Tokens that the page shows: the first blocks of the first rows.
_SHOWN = 1536


def reading(subject: Subject, m: Measured, other: Measured | None = None) -> str:
    """The text as HTML, with the data behind it and its switch.

    Args:
        subject: the model, for its words.
        m: what was measured.
        other: the same of another model at the same tokens; None: there is none.
    """
    rows, length, _ = m.shape
    places = _places(rows, length, len(m.passed.loss))
    kinds = [("e", "evaluations"), ("l", "loss")]
    if other is not None:
        kinds += [("d", "difference in loss")]
    switch = "".join(
        f"<label><input type=radio name=by value={key}{' checked' if key == 'e' else ''}> {name}</label>"
        for key, name in kinds
    )
    data, text, row = [], [], -1
    for index, (at_row, place) in enumerate(places):
        if at_row != row:
            text.append(("</p>" if row >= 0 else "") + f"<p class=row><b>row {at_row + 1}</b> ")
            row = at_row
        word = _word(subject, int(m.passed.source[place]))
        data.append(_datum(subject, m, place, other))
        text.append(f"<span class=w data-i={index}>{word}</span>")
    facts = {
        "cap": m.budget,
        "loss": 2 * math.log(10.0),
        "statuses": [status.name for status in Status],
        "tokens": data,
    }
    packed = json.dumps(facts, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    return (
        f"<fieldset class=switch><legend>Coloured by</legend>{switch}</fieldset>"
        "<p class=scale><span>low</span><i></i><span>high</span></p>"
        "<p class=hint>Point at a word, touch it, or move with the arrow keys; the loss is that of the word "
        "after it.</p>"
        f"<div id=text tabindex=0 role=application aria-label='The text, a word at a time'>{''.join(text)}"
        "</p></div><div id=tip role=status hidden></div>"
        f"<script type=application/json id=data>{packed}</script>"
    )


def _places(rows: int, length: int, count: int) -> list[tuple[int, int]]:
    """Row and place in the pass of the positions to show: whole rows, as many as there is room for."""
    blocks = count // (rows * length)
    shown = max(1, min(rows, _SHOWN // max(blocks * length, 1)))
    of_a_row = min(blocks, max(1, _SHOWN // length))
    return [
        (row, (block * rows + row) * length + t)
        for row in range(shown)
        for block in range(of_a_row)
        for t in range(length)
    ]


def _word(subject: Subject, token: int) -> str:
    """A token as it is read."""
    if token == subject.dictionary.eos():
        return "¶ "
    piece = subject.dictionary[token]
    if "▁" in piece:
        return escape(piece.replace("▁", " "))
    return escape(piece[:-2]) if piece.endswith("@@") else escape(piece) + " "


def _datum(subject: Subject, m: Measured, place: int, other: Measured | None) -> list[Any]:
    """Evaluations, residual, status, loss, the word that followed, the likeliest ones; the other's loss."""
    passed = m.passed
    words = [
        [subject.dictionary[int(token)], round(100 * math.exp(float(log_prob)), 1)]
        for token, log_prob in zip(passed.likeliest[place], passed.log_probs[place])
    ]
    residual = float(torch.nan_to_num(passed.residual[place].float(), nan=1e9, posinf=1e9))
    loss = float(torch.nan_to_num(passed.loss[place].float(), nan=99.0, posinf=99.0))
    datum: list[Any] = [
        int(passed.evaluations[place]),
        float(f"{residual:.1e}"),
        int(passed.status[place]),
        round(loss, 3),
        words,
    ]
    if other is not None:
        datum += [round(float(other.passed.loss[place]), 3), int(other.passed.evaluations[place])]
    return datum
