"""Exports in fresh environments with torch, transformers and safetensors, and no fairseq."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from documents import ROOT
from export.small import ADAPTIVE, CONFIGS, EXACT, SOLVE, TIED, VARIANT, save, small
from models.builders import tokens

from fairseq_deq.generation.text import TextEncoder
from fairseq_deq.tools.export import main

pytest.importorskip("safetensors")
pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
DOCUMENT = ROOT / "examples" / "export" / "README.md"
TORCH = f"torch=={torch.__version__.split('+')[0]}"
# The newest release before 5, and the newest one.
TRANSFORMERS = ("4.57.6", "5.24.0")

# Nearly what float32 can reach, so that a text with its cache goes the same way as without.
# Where a position does not converge, the two may differ; so the weights are such that all do.
REACHED = {"f_eps": 2e-6}
EXPORTS = {
    "words": (
        "transformer",
        {"teach": True, "share_decoder_input_output_embed": "true", "wnorm": "true", "init_std": 0.1},
    ),
    "pre-norm": (
        "transformer",
        TIED | {"tie_adaptive_proj": "true", "decoder_normalize_before": "true", "local_size": 5},
    ),
    "two-layers": ("transformer", {"decoder_layers": 2, "init_std": 0.1, "teach": True}),
    "variant": (
        "transformer",
        VARIANT
        | {
            "decoder_normalize_before": "true",
            "decoder_positions": "rotary",
            "share_decoder_input_output_embed": "true",
        },
    ),
    "trellisnet": ("trellisnet", TIED | {"teach": True, "ksize": 3}),
    "side-by-side": ("trellisnet", ADAPTIVE | {"solver_scope": "position", "init_std": 0.05, "f_thres": 400}),
}


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """By the version of transformers: a Python that has it.

    `FAIRSEQ_DEQ_TRANSFORMERS` names a folder where environments are kept for the next time.
    """

    def get(version: str) -> Path:
        kept = os.environ.get("FAIRSEQ_DEQ_TRANSFORMERS")
        folder = (Path(kept) if kept else tmp_path_factory.getbasetemp()) / f"transformers-{version}"
        python = folder / "bin" / "python"
        if not (folder / "complete").exists():
            venv.create(folder, with_pip=True, clear=True)
            packages = (TORCH, f"transformers=={version}", "safetensors", "numpy", "sentencepiece")
            subprocess.run([python, "-I", "-m", "pip", "install", "-q", *packages], check=True, timeout=1800)
            (folder / "complete").touch()
        return python

    return get


@pytest.fixture(scope="session")
def exports(tmp_path_factory) -> list[Path]:
    """Exports of small models, each with what the package says of it."""
    folder = tmp_path_factory.mktemp("exports")
    made = []
    for name, (family, options) in EXPORTS.items():
        place = folder / "checkpoints" / name
        place.mkdir(parents=True)
        made.append(_exported(small(place, family, **REACHED | options), folder / name, place))
    made.append(_of_pieces(folder))
    return made


def _exported(one, out: Path, data: Path, *options: str, begin: int = 2, encode=None) -> Path:
    assert main([str(one.path), str(out), "--data", str(data), *options]) == 0
    source = tokens(3, 21)
    source[:, 0] = 2
    expected = one.log_probs(source)
    with torch.no_grad():
        (equilibrium,) = one.model(source)[1]["equilibria"]
    types = len(one.model.decoder.dictionary)
    cut = TextEncoder(one.model.decoder.dictionary, encode)
    texts = []
    for text in ("word3 word7", "word1 unheard-of word2", "word40", "word5  word6\tword9"):
        numbers = cut(text, end=False).tokens.tolist()
        words = [one.model.decoder.dictionary[n] for n in numbers]
        decoded = " ".join(words) if encode is None else "".join(words).replace("\u2581", " ").strip()
        texts.append((text, [begin, *numbers], decoded))
    one.model.bfloat16()
    distance = float((one.log_probs(source).float() - expected).abs().mean())
    figures = {"bfloat16": distance, "converged": float(equilibrium.result.converged.float().mean())}
    values = {"tokens": source, "log_probs": expected, "types": types, "texts": texts}
    torch.save(values | figures, out / "expected.pt")
    return out


def _of_pieces(folder: Path) -> Path:
    """A model whose text is cut into pieces, and begins with `<s>`."""
    sentencepiece = pytest.importorskip("sentencepiece")
    place = folder / "checkpoints" / "pieces"
    place.mkdir(parents=True)
    lines = [" ".join(f"word{i * j % 48}" for j in range(1, 12)) for i in range(1, 40)]
    (place / "text").write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(place / "text"),
        model_prefix=str(place / "sp"),
        vocab_size=51,
        minloglevel=2,
        model_type="bpe",
        hard_vocab_limit=False,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(place / "sp.model"))
    one = small(place, "transformer", **REACHED)
    # In another order than the pieces have, and without some of them.
    known = [pieces.id_to_piece(i) for i in range(3, pieces.get_piece_size())][::-1][:-2]
    known += [f"madeupword{i:04d}" for i in range(48 - len(known))]
    (place / "dict.txt").write_text("".join(f"{piece} 1\n" for piece in known), encoding="utf-8")
    dictionary = one.model.decoder.dictionary
    dictionary.symbols[4:], dictionary.indices = known, {}
    dictionary.indices = {symbol: i for i, symbol in enumerate(dictionary.symbols)}
    name, config, sizes, _ = CONFIGS["transformer"]
    cfg = config(**(EXACT | sizes | SOLVE | REACHED | {"max_update": 9}))
    save(one.path, one.model, name, cfg)
    state = torch.load(one.path, weights_only=True)
    state["cfg"]["task"] |= {"add_bos_token": True}
    torch.save(state, one.path)
    return _exported(
        one,
        folder / "pieces",
        place,
        "--sentencepiece-model",
        str(place / "sp.model"),
        begin=0,
        encode=lambda text: " ".join(pieces.encode(text, out_type=str)),
    )


def run_alone(python: Path, *arguments: str | Path, home: Path, folder: Path | None = None) -> str:
    """What another Python prints, which sees nothing of this one's packages."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HOME")}
    done = subprocess.run(
        [python, "-I", *arguments],
        cwd=folder,
        env={**variables, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("version", TRANSFORMERS)
def test_exports_load_score_and_generate_without_fairseq(version, environment, exports, tmp_path):
    output = run_alone(environment(version), HERE / "in_transformers.py", *exports, home=tmp_path)
    figures = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [figure["export"] for figure in figures] == [path.name for path in exports]
    assert {figure["transformers"] for figure in figures} == {version}
    assert max(figure["parity"] for figure in figures) < 1e-4
    sys.stdout.writelines(f"{figure}\n" for figure in figures)


def test_the_three_commands_of_the_document(environment, exports, tmp_path, monkeypatch):
    """Export, an environment, a sample; where an environment is kept, the second command is not run again."""
    checkpoints = exports[0].parent / "checkpoints" / "pieces"
    quickstart = tmp_path / "quickstart"
    for part, file, name in (
        ("checkpoints", "checkpoint.pt", "checkpoint_last.pt"),
        ("text", "sp.model", "sentencepiece.model"),
        ("bin", "dict.txt", "dict.txt"),
    ):
        (quickstart / part).mkdir(parents=True)
        (quickstart / part / name).symlink_to(checkpoints / file)
    text = DOCUMENT.read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    text = re.sub(r" \\\n +", " ", text)
    export, make, sample = re.findall(
        r"^    (fairseq-deq-export quickstart.*)\n    (.*)\n    (.*)$", text, re.M
    )[0]
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(export)[1:]) == 0
    assert make.startswith("python -m venv elsewhere && elsewhere/bin/pip install torch transformers ")
    python = environment(TRANSFORMERS[-1])
    words = shlex.split(sample.replace("The people of the United States", "word3 word5"))
    assert words[:2] == ["elsewhere/bin/python", "-c"]
    written = run_alone(python, *words[1:], home=tmp_path / "home", folder=tmp_path)
    assert "\nword3 word5" in f"\n{written}"
    written = run_alone(python, "-c", example, home=tmp_path / "home", folder=tmp_path)
    assert "tensor(1.)" in written
