"""A stranger's checkpoint runs no code, whichever component it names and whichever tool reads it."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch
from conftest import run_in_process
from selection import covering, slow_unless

from fairseq_deq.errors import OptionError
from fairseq_deq.models.deq_transformer_lm import DEQTransformerLanguageModel
from fairseq_deq.tools import anytime, score


class Calls:
    """Pickles as a call of a function with arguments."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def _evaluating(component, name, option, **others):
    """Names a component whose option fairseq would evaluate, where the others have these values."""

    def change(state, canary):
        code = f"[__import__('pathlib').Path({str(canary)!r}).touch()]"
        before = state["cfg"][component] if component == "model" else {}
        state["cfg"][component] = {**before, "_name": name, **others, option: code}

    return change


def _calling(section, function, arguments):
    """Holds an object that is made by a call."""

    def change(state, canary):
        call = Calls(function, *(str(canary) if a == "CANARY" else a for a in arguments))
        (state["cfg"] if section == "cfg" else state[section])["made"] = call

    return change


def _looked_up(state, canary):
    state["cfg"]["bpe"] = {"_name": "sentencepiece", "sentencepiece_model": "http://localhost/${oc.env:HOME}"}


STRANGERS = {
    "adaptive input": _evaluating("model", "transformer_lm", "adaptive_input_cutoff", adaptive_input=True),
    "adaptive softmax": _evaluating("model", "transformer_lm", "adaptive_softmax_cutoff"),
    "characters": _evaluating("model", "transformer_lm", "character_filters", character_embeddings=True),
    "convolutions": _evaluating("model", "fconv_lm", "decoder_layers"),
    "speech": _evaluating("model", "wav2vec", "conv_feature_layers"),
    "criterion": _evaluating("criterion", "ctc", "wer_args"),
    "optimizer": _evaluating("optimizer", "adam", "adam_betas"),
    "a call in the options": _calling("cfg", os.mkdir, ("CANARY",)),
    "a call in the state": _calling("extra_state", open, ("CANARY", "w")),
    "an array": _calling("extra_state", np.ndarray, ((1,), np.dtype("O"), b"A" * 8)),
    "an interpolation": _looked_up,
}


def _cli(tool, *arguments):
    return lambda data, path, folder: run_in_process(tool, data, "--path", path, *arguments)


EVALUATION = ("--task", "language_modeling", "--tokens-per-sample", "32", "--num-workers", "0", "--cpu")


def _train(data, path, folder):
    model = ("--arch", "transformer_lm", "--decoder-layers", "1", "--decoder-attention-heads", "2")
    sizes = [
        word for name in ("embed", "input", "output", "ffn-embed") for word in (f"--decoder-{name}-dim", "16")
    ]
    options = ("--optimizer", "adam", "--lr", "0.01", "--batch-size", "8", "--max-update", "4")
    places = ("--restore-file", path, "--save-dir", folder, "--disable-validation")
    return run_in_process("fairseq-train", data, *EVALUATION, *model, *sizes, *options, *places)


def _score(data, path, folder):
    text = folder / "text.txt"
    text.write_text("the people\n")
    score.run([str(data), "--path", str(path), "--input", str(text), "--cpu"])


def _hub(data, path, folder):
    return DEQTransformerLanguageModel.from_pretrained(str(path.parent), path.name, str(data))


def _anytime(data, path, folder):
    arguments = [str(data), "--path", str(path), "--gen-subset", "valid", *EVALUATION]
    anytime.run(arguments)


SKIPPING = ("--batch-size", "4", "--skip-invalid-size-inputs-valid-test")
TOOLS = {
    "eval-lm": _cli("fairseq-eval-lm", *EVALUATION),
    "validate": _cli("fairseq-validate", *EVALUATION, "--batch-size", "8"),
    "generate": _cli("fairseq-generate", *EVALUATION, "--sample-break-mode", "eos", *SKIPPING),
    "interactive": _cli("fairseq-interactive", *EVALUATION, "--input", os.devnull),
    "train": _train,
    "score": _score,
    "from_pretrained": _hub,
    "anytime": _anytime,
}

# These name what the tools for language models do not look at: there is nothing to refuse.
HARMLESS = {("optimizer", tool) for tool in TOOLS if tool != "anytime"} | {
    ("criterion", tool) for tool in TOOLS if tool not in ("validate", "anytime")
}
TRAINS_WITH_ITS_OWN = ("adaptive input", "adaptive softmax", "characters", "convolutions", "speech")
HARMLESS |= {(stranger, "train") for stranger in TRAINS_WITH_ITS_OWN}

PAIRS = [(stranger, tool) for stranger in STRANGERS for tool in TOOLS]
DEFAULT = [
    *covering(pair for pair in PAIRS if pair not in HARMLESS),
    *covering(pair for pair in PAIRS if pair in HARMLESS),
]


@pytest.mark.parametrize(
    ("stranger", "tool"), [pytest.param(*pair, marks=slow_unless(pair in DEFAULT)) for pair in PAIRS]
)
def test_no_code_of_a_stranger_runs(monkeypatch, tiny_checkpoint, data_bin, tmp_path, stranger, tool):
    canary, path = tmp_path / "canary", tmp_path / "stranger.pt"
    state = torch.load(tiny_checkpoint, weights_only=False)
    STRANGERS[stranger](state, canary)
    torch.save(state, path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    if (stranger, tool) in HARMLESS:
        TOOLS[tool](data_bin, path, tmp_path)
    else:
        with pytest.raises((SystemExit, OptionError)) as refused:
            TOOLS[tool](data_bin, path, tmp_path)
        sentence = str(refused.value)
        assert "\n" not in sentence
        assert len(sentence) > 40
    assert not canary.exists()


def test_what_the_calls_would_do(tmp_path):
    """The canary sings where a file is loaded without care."""
    canary = tmp_path / "canary"
    state = {"cfg": {}, "extra_state": {}}  # type: ignore[var-annotated]
    STRANGERS["a call in the options"](state, canary)
    torch.save(state, tmp_path / "stranger.pt")
    torch.load(tmp_path / "stranger.pt", weights_only=False)
    assert canary.exists()
