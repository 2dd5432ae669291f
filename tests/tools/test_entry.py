"""The commands as a whole: they are installed by name, explain themselves, and end in one sentence."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from keyword import iskeyword

import pytest
from conftest import ROOT

from fairseq_deq.errors import OptionError
from fairseq_deq.tools import command, entry


def tool_module(name):
    return importlib.import_module(f"fairseq_deq.tools.{entry.TOOLS[name]}")


def test_setup_installs_every_tool_under_its_name():
    names = re.findall(r"^TOOLS \+?= (.*)$", (ROOT / "setup.py").read_text(encoding="utf-8"), re.M)
    assert [name for line in names for name in eval(line)] == list(entry.TOOLS)
    for name in entry.TOOLS:
        assert callable(getattr(entry, name.replace("-", "_") + "_" * iskeyword(name)))
        assert f"fairseq-deq-{name}" == tool_module(name).PROGRAM


@pytest.mark.parametrize("name", entry.TOOLS)
def test_help_has_an_example_that_the_tool_understands(name, capsys):
    with pytest.raises(SystemExit) as ending:
        tool_module(name).main(["--help"])
    assert ending.value.code == 0
    text = capsys.readouterr().out
    examples = re.findall(rf"^    (?:echo .* \| )?fairseq-deq-{name} .*", text, re.M)
    assert examples
    assert "usage: fairseq-deq-" in text


@pytest.mark.parametrize("name", entry.TOOLS)
def test_an_unknown_option_is_one_sentence(name, capsys):
    assert tool_module(name).main(["--nonsense", "x", "y"]) == (2 if name == "diagnose" else 1)
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith(f"fairseq-deq-{name}: ")
    assert error.count("\n") == 1


def test_tools_run_from_a_checkout_that_is_not_installed():
    done = subprocess.run(
        [sys.executable, "-m", "fairseq_deq.tools"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert all(name in done.stderr for name in entry.TOOLS)
    done = subprocess.run(
        [sys.executable, "-m", "fairseq_deq.tools", "plot", "nowhere.log"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "fairseq-deq-plot: The run nowhere.log does not exist.\n")


def test_errors_with_an_explanation_end_in_it_and_others_are_raised(capsys, tmp_path):
    def fail(error):
        def run():
            raise error

        return run

    assert command.ended("tool", fail(OptionError("--x must be 1"))) == 1
    assert command.ended("tool", fail(MemoryError("big")), failure=2) == 2
    assert command.ended("tool", lambda: (tmp_path / "none").read_text()) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tool: --x must be 1"
    assert "out of memory" in lines[1]
    assert lines[2] == f"tool: {tmp_path}/none: No such file or directory"
    with pytest.raises(KeyError):
        command.ended("tool", fail(KeyError("fault")))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "x.txt"
    with command.written_whole(path) as partial:
        partial.write_text("first")
        assert not path.exists()

    def interrupted():
        with command.written_whole(path) as partial:
            partial.write_text("sec")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "first"
    assert [file.name for file in path.parent.iterdir()] == ["x.txt"]
