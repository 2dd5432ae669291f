"""The commands of examples/import run in miniature, one after another, as they are typed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from documents import ROOT, commands
from tools.original import DIM, FFN, HEAD_DIM, HEADS, random_state

from fairseq_deq.tools.import_weights.command import main

DOCUMENT = ROOT / "examples" / "import" / "README.md"
TRAIN = "--max-update 3 --warmup-updates 1 --cpu --batch-size 4 --tokens-per-sample 16 --num-workers 0"
EVALUATE = "--tokens-per-sample 16 --num-workers 0 --cpu"
# The sizes of what is imported; they follow the options of the document, and the last ones given hold.
RELEASED = (
    f"--decoder-embed-dim {DIM} --decoder-ffn-embed-dim {FFN} --decoder-attention-heads {HEADS} "
    f"--decoder-head-dim {HEAD_DIM} --adaptive-input-cutoff 42,92,152 --adaptive-softmax-cutoff 42,92,152 "
    "--adaptive-input-factor 2 --adaptive-softmax-factor 2"
)
STARTED = "--decoder-ffn-embed-dim 16 --decoder-attention-heads 2"
SIZES = {
    "checkpoints/imported": RELEASED,
    "checkpoints/stock": f"--decoder-embed-dim 16 --decoder-input-dim 16 --decoder-output-dim 16 {STARTED}",
    "checkpoints/started": f"--decoder-embed-dim 16 {STARTED}",
}


@pytest.fixture
def place(tmp_path, text, data_bin, monkeypatch):
    """A working directory with what the document begins with, small."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wikitext-103").mkdir()
    train = (text / "train.txt").read_text(encoding="utf-8").replace(" of ", " <unk> ")
    known = train.split()
    for split in ("train", "valid", "test"):  # all words are known, as in the reference
        lines = (text / f"{split}.txt").read_text(encoding="utf-8").splitlines()
        kept = [" ".join(w if w in known else "<unk>" for w in line.split()) for line in lines]
        content = train if split == "train" else "\n".join(kept) + "\n"
        (tmp_path / "wikitext-103" / f"wiki.{split}.tokens").write_text(content, encoding="utf-8")
    torch.save(random_state(1, len(set(known)) + 1, (40, 90, 150), 2), tmp_path / "model_state_dict.pth")
    (tmp_path / "data-bin").mkdir()
    (tmp_path / "data-bin" / "wikitext-2").symlink_to(data_bin)
    return tmp_path


def test_the_commands_run_one_after_another(place, in_process, capsys):
    done = []
    for command in commands(DOCUMENT):
        words = list(command.arguments)
        if "--user-dir" in words:
            at = words.index("--user-dir")
            del words[at : at + 2]
        done.append(command.tool)
        if command.tool == "fairseq-deq-import":
            starts = "--from-transformer-lm" in words
            if starts:
                words += STARTED.split()
            assert main(words) == 0
            out = Path(words[words.index("--from-transformer-lm") + 2] if starts else words[2])
            assert out.is_file()
            assert (out.parent / "dict.txt").is_file()
            printed = capsys.readouterr().out
            if not starts:  # the document has the options that the command prints
                options = printed.split("--finetune-from-model imported/checkpoint.pt ")[1].split()
                typed = next(
                    c for c in commands(DOCUMENT) if c.value("--finetune-from-model") == str(out)
                ).arguments
                assert {o for o in options if o.startswith("--")} <= set(typed)
        elif command.tool == "fairseq-preprocess":
            in_process("fairseq-preprocess", *words, "--workers", "1").checked()
        elif command.tool == "fairseq-train":
            small = f"{SIZES[command.value('--save-dir')]} {TRAIN} --log-format json --max-epoch 1"
            log = in_process("fairseq-train", *words, *small.split()).checked().text
            assert 'num_updates": "3"' in log
            if command.value("--finetune-from-model"):
                assert "loading pretrained model from" in log
        elif command.tool == "fairseq-eval-lm":
            log = in_process("fairseq-eval-lm", *words, *EVALUATE.split()).checked().text
            assert "Perplexity: " in log
        else:
            raise AssertionError(command.tool)
    assert done.count("fairseq-deq-import") == 2
    assert done.count("fairseq-train") == done.count("fairseq-eval-lm") == 3
