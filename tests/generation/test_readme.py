"""What the README says about raw text works with what the quick start leaves."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fairseq_deq.tools import score

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def quickstart(pieces, tmp_path, monkeypatch):
    """The folders of the quick start, with a tiny model in them."""
    trained = pieces("sentencepiece")
    folder = tmp_path / "quickstart"
    for part in ("checkpoints", "text"):
        (folder / part).mkdir(parents=True)
    (folder / "bin").symlink_to(trained.data)
    (folder / "checkpoints" / "checkpoint_last.pt").symlink_to(trained.checkpoint)
    (folder / "text" / "sentencepiece.model").symlink_to(trained.overrides["sentencepiece_model"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_example_is_ten_lines_and_runs(quickstart, capsys):
    (code,) = (
        code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "from_pretrained" in code
    )
    assert len([line for line in code.splitlines() if line]) <= 10
    exec(compile(code, "README.md", "exec"), {})
    sample, *words, perplexity = capsys.readouterr().out.splitlines()
    assert sample.startswith("The people of the United States")
    assert [line.split()[1] for line in words] == ["We", "must", "work", "together.", "</s>"]
    assert all(float(line.split()[0]) < 0 for line in words)
    assert float(perplexity) > 1


def test_the_command_that_scores_text_runs(quickstart, capsys):
    (command,) = re.findall(r"    fairseq-deq-score (.*)", README.replace(" \\\n       ", ""))
    (quickstart / "text.txt").write_text("We must work together.\n", encoding="utf-8")
    assert score.main([*shlex.split(command), "--cpu"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[2] for line in lines[1:-1]] == ["We", "must", "work", "together.", "</s>"]
