"""Texts cut into pieces of words, with tiny models trained on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import TINY_DEQ, TRAINING


@dataclass(frozen=True)
class Trained:
    """A checkpoint, the folder of its dictionary, and the options that cut text as it was cut."""

    checkpoint: Path
    data: Path
    options: tuple[str, ...]
    overrides: dict[str, str]
    encode: Callable[[str], str]


@pytest.fixture(scope="session")
def pieces(tmp_path_factory, text, in_process) -> Callable[[str], Trained]:
    """By the name of a fairseq bpe: a model of pieces, trained once."""
    made: dict[str, Trained] = {}

    def get(name: str) -> Trained:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            options, overrides, encode = _learn(name, folder, text / "train.txt")
            for split in ("train", "valid"):
                lines = (text / f"{split}.txt").read_text(encoding="utf-8").splitlines()
                (folder / split).write_text("".join(encode(line) + "\n" for line in lines), encoding="utf-8")
            prefs = ("--trainpref", folder / "train", "--validpref", folder / "valid")
            data = folder / "bin"
            in_process("fairseq-preprocess", "--only-source", *prefs, "--destdir", data, plugin=False)
            saved = ("--save-dir", folder, "--disable-validation", "--max-update", "12")
            in_process("fairseq-train", data, *TINY_DEQ, *TRAINING, *saved)
            made[name] = Trained(folder / "checkpoint_last.pt", data, options, overrides, encode)
        return made[name]

    return get


def _learn(
    name: str, folder: Path, text: Path
) -> tuple[tuple[str, ...], dict[str, str], Callable[[str], str]]:
    if name == "sentencepiece":
        spm = pytest.importorskip("sentencepiece")
        spm.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(folder / "sp"), vocab_size=160, minloglevel=2
        )
        model = str(folder / "sp.model")
        processor = spm.SentencePieceProcessor(model_file=model)
        overrides = {"bpe": name, "sentencepiece_model": model}
        options = ("--bpe", name, "--sentencepiece-model", model)
        return options, overrides, lambda line: " ".join(processor.encode(line, out_type=str))
    learn = pytest.importorskip("subword_nmt.learn_bpe")
    apply = pytest.importorskip("subword_nmt.apply_bpe")
    codes = folder / "codes"
    with open(text, encoding="utf-8") as lines, open(codes, "w", encoding="utf-8") as out:
        learn.learn_bpe(lines, out, 60)
    with open(codes, encoding="utf-8") as learnt:
        bpe = apply.BPE(learnt)
    options = ("--bpe", name, "--bpe-codes", str(codes))
    return options, {"bpe": name, "bpe_codes": str(codes)}, bpe.process_line
