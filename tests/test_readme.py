"""What the README, and those of the examples, tell people to type is understood by what they type it into."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

import pytest
from documents import README as DOCUMENT
from documents import RECIPES, ROOT, commands
from fairseq import options
from runs import load_script

import fairseq_deq  # noqa: F401  (registers)
from fairseq_deq.tools import entry
from fairseq_deq.tools.import_weights.command import parse as import_options

README = DOCUMENT.read_text(encoding="utf-8")
PARSERS = {
    "fairseq-preprocess": options.get_preprocessing_parser,
    "fairseq-train": options.get_training_parser,
    "fairseq-validate": options.get_validation_parser,
    "fairseq-eval-lm": options.get_eval_lm_parser,
    "fairseq-interactive": options.get_interactive_generation_parser,
}
COMMANDS = [command for document in (DOCUMENT, *RECIPES) for command in commands(document)]


class _Parsed(Exception):
    """The arguments of a script were understood."""


@pytest.mark.parametrize("document", [DOCUMENT, *RECIPES], ids=lambda path: path.parent.name)
def test_every_document_trains_something_and_looks_at_it(document):
    tools = [command.tool for command in commands(document)]
    assert "fairseq-train" in tools
    assert any(command.value("--path") for command in commands(document))


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.tool in PARSERS], ids=str)
def test_each_command_is_understood(command, monkeypatch):
    arguments = list(command.arguments)
    parser = PARSERS[command.tool]()
    if command.tool == "fairseq-preprocess":
        assert parser.parse_args(arguments).only_source
        return
    folder = arguments.index("--user-dir") + 1
    assert arguments[folder] == "fairseq_deq" or (ROOT / arguments[folder]).is_dir()
    arguments[folder] = str(ROOT / arguments[folder])
    monkeypatch.setattr(sys, "argv", [command.tool, *arguments])
    parsed = options.parse_args_and_arch(parser)
    if command.tool == "fairseq-train":
        assert parsed.criterion == "deq_lm_loss"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.tool.startswith("fairseq-deq-")], ids=str)
def test_each_tool_of_ours_understands_its_arguments(command):
    tool = entry.TOOLS[command.tool.removeprefix("fairseq-deq-")]
    arguments = list(command.arguments)
    if "--user-dir" in arguments:
        arguments[arguments.index("--user-dir") + 1] = str(ROOT / "fairseq_deq")
    assert importlib.import_module(f"fairseq_deq.tools.{tool}").parse(arguments)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.tool.endswith(".py")], ids=str)
def test_each_script_understands_its_arguments(command, monkeypatch):
    module = load_script(ROOT / command.tool)
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self, *given, **named):
        raise _Parsed(parse_args(self, *given, **named))

    monkeypatch.setattr(sys, "argv", [command.tool, *command.arguments])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(_Parsed):
        module.main()


def test_every_command_is_looked_at():
    others = [c.tool for c in COMMANDS if c.tool not in PARSERS and not c.tool.endswith(".py")]
    assert [tool for tool in others if tool.removeprefix("fairseq-deq-") not in entry.TOOLS] == []


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.value("--path")], ids=str)
def test_what_is_evaluated_was_trained_in_the_same_document(command):
    trained = {c.value("--save-dir") for c in commands(command.document) if c.tool == "fairseq-train"}
    trained.add("quickstart/checkpoints")  # by scripts/quickstart.sh
    imported = [c for c in commands(command.document) if c.tool == "fairseq-deq-import"]
    trained |= {str(import_options(list(c.arguments)).out.parent) for c in imported}
    assert str(Path(command.value("--path")).parent) in trained


OWN_LAYER = (DOCUMENT.parent / "examples" / "own-layer" / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README + OWN_LAYER, re.DOTALL)


# Those that need a trained model are run where there is one, in generation/test_readme.py.
@pytest.mark.parametrize("code", [code for code in EXAMPLES if "from_pretrained" not in code])
def test_each_python_example_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    assert "print(" not in code or "CONVERGED" in capsys.readouterr().out


def test_every_option_of_the_table_exists():
    from fairseq_deq.models.deq_transformer_lm import DEQTransformerConfig

    ours = {f"--{name.replace('_', '-')}" for name in DEQTransformerConfig.__dataclass_fields__}
    page = (ROOT / "examples" / "wikitext-103" / "README.md").read_text(encoding="utf-8")
    table = page[page.index("| [locuslab/deq]") :].split("\n\n", 1)[0]
    rows = [row.split("|")[2:4] for row in table.splitlines()[2:]]
    named = {
        option
        for cell, remark in rows
        if "fairseq's" not in remark
        for option in re.findall(r"`(--[\w-]+)`", cell)
    }
    assert named
    assert named <= ours


def test_the_readme_is_short_enough_to_read():
    assert len(README.splitlines()) < 250
