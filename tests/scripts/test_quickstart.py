"""scripts/quickstart.sh: its options, its care for folders, and (slow) the whole way in miniature."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from matplotlib import image

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "quickstart.sh"
TEXT = ROOT / "tests" / "data" / "text"


def run(*arguments, cwd=ROOT, **env):
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_help_names_every_option_and_variable():
    status, output = run("--help")
    assert status == 0
    text = SCRIPT.read_text(encoding="utf-8")
    for variable in set(re.findall(r"\$\{([A-Z_]+):-", text)) - {"OMP_WAIT_POLICY"}:
        assert variable in output
    assert "--clean" in output


@pytest.mark.parametrize(
    ("arguments", "env", "sentence"),
    [
        (["--fast"], {}, "unknown option --fast; the options are --clean and --help."),
        ([], {"MAX_UPDATE": "many"}, "PRETRAIN_STEPS and MAX_UPDATE must be whole numbers, not 'many'."),
        ([], {"PRETRAIN_STEPS": "-1"}, "PRETRAIN_STEPS and MAX_UPDATE must be whole numbers, not '-1'."),
        ([], {"MAX_UPDATE": "0"}, "MAX_UPDATE must be at least 1."),
        ([], {"PROMPTS": "/nowhere/prompts"}, "the file of prompts /nowhere/prompts is missing or empty."),
    ],
)
def test_bad_input_is_one_sentence(arguments, env, sentence, tmp_path):
    status, output = run(*arguments, QUICKSTART_DIR=str(tmp_path / "out"), **env)
    assert status == 1
    assert output == f"quickstart.sh: {sentence}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["--clean"]])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path, arguments):
    (tmp_path / "thesis.tex").write_text("mine")
    status, output = run(*arguments, cwd=tmp_path.parent, QUICKSTART_DIR=tmp_path.name)
    assert status == 1
    assert "was not made by this script" in output
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_the_whole_way_in_miniature(tmp_path):
    """Real text, a few updates; again, which repeats nothing; then with a spoilt and a missing result."""
    out = tmp_path / "out"
    env = {
        "QUICKSTART_DIR": "out",
        "TEXT_OPTIONS": " ".join(f"--{split} {TEXT}/{split}.txt" for split in ("train", "valid", "test"))
        + " --vocab-size 200",
        "PRETRAIN_STEPS": "3",
        "MAX_UPDATE": "6",
        "OMP_NUM_THREADS": "1",
    }
    status, output = run(cwd=tmp_path, **env)
    assert status == 0, output
    results = output[output.index("Results, after") :]
    perplexities = re.findall(r"perplexity +([0-9.]+) per token", results)
    assert len(perplexities) == 2
    assert all(1 < float(perplexity) < 1000 for perplexity in perplexities)
    # Both numbers are over the same tokens.
    tokens = re.findall(r"(?:over|Evaluated) ([0-9,]+) tokens", output)
    assert len(tokens) == 2
    assert tokens[0] == tokens[1]
    assert re.findall(r"^  - (.*)$", results, re.M)[1].startswith("We must work together to")
    assert re.search(
        r"first phase +[0-9.]+ applied once, as it was trained, [0-9.]+ applied 16 times", results
    )
    assert re.search(r"equilibrium +[0-9.]+ after 1 evaluation, [0-9.]+ after 4, [0-9.]+ after 16", results)
    assert re.search(r"Continuations, at [0-9]+ tokens per second", results)
    for picture in ("training", "anytime"):
        assert image.imread(out / f"{picture}.png").ndim == 3
    # Every command is shown as it can be typed.
    shown = re.findall(r"^\$ (\S+ ?\S*)", output, re.M)
    for command in ("fairseq-preprocess", "fairseq-train", "fairseq-eval-lm", "fairseq-interactive"):
        assert any(line.startswith(command) for line in shown)

    files = {path: path.stat().st_mtime_ns for path in (out / "checkpoints").iterdir()}
    status, again = run(cwd=tmp_path, **env)
    assert status == 0, again
    assert again.count("Done before") == 10
    assert again[again.index("Test perplexity") :] == output[output.index("Test perplexity") :]
    assert files == {path: path.stat().st_mtime_ns for path in (out / "checkpoints").iterdir()}

    # As a kill would leave it: the evaluation has its file, but never ended well.
    (out / "done" / "evaluate").unlink()
    (out / "logs" / "evaluate.log").write_text("Loss (base 2): 0.0, Perplexity: 1.00")
    (out / "training.png").unlink()
    status, mended = run(cwd=tmp_path, **env)
    assert status == 0, mended
    assert mended.count("Done before") == 8
    assert mended[mended.index("Test perplexity") :] == output[output.index("Test perplexity") :]
    assert (out / "training.png").exists()

    # Another length is another training: it and what follows are done again, what comes before is not.
    status, longer = run(cwd=tmp_path, **env | {"MAX_UPDATE": "8"})
    assert status == 0, longer
    assert longer.count("Done before") == 2
    assert "num_updates 8" in longer

    status, output = run("--clean", cwd=tmp_path, **env | {"TEXT_OPTIONS": "--input no.txt"})
    assert status == 1
    assert "no.txt does not exist" in output
    assert not (out / "checkpoints").exists()
