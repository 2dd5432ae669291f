"""What the README tells people to type is understood by what they type it into."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from fairseq import options

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PARSERS = {
    "fairseq-train": options.get_training_parser,
    "fairseq-eval-lm": options.get_eval_lm_parser,
    "fairseq-interactive": options.get_interactive_generation_parser,
}


def _commands() -> list[str]:
    indented = re.sub(r" \\\n +", " ", README)
    return [
        line.strip().rpartition(" | ")[2]
        for line in indented.splitlines()
        if re.match(r"    (echo .* \| )?fairseq-(train|eval-lm|interactive) (?!\.\.\.)", line)
    ]


def test_the_readme_has_a_command_for_each_tool():
    assert {command.split()[0] for command in _commands()} == set(PARSERS)


@pytest.mark.parametrize("command", _commands())
def test_each_command_is_understood(command, monkeypatch):
    tool, *arguments = shlex.split(command)
    arguments[arguments.index("--user-dir") + 1] = str(ROOT / "fairseq_deq")
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    parsed = options.parse_args_and_arch(PARSERS[tool]())
    assert parsed.user_dir == str(ROOT / "fairseq_deq")
    if tool == "fairseq-train":
        assert parsed.arch == "deq_transformer_lm_wt103"
        assert parsed.criterion == "deq_lm_loss"


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


# Those that need a trained model are run where there is one, in generation/test_readme.py.
@pytest.mark.parametrize("code", [code for code in EXAMPLES if "from_pretrained" not in code])
def test_each_python_example_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    assert "CONVERGED" in capsys.readouterr().out


def test_every_option_of_the_table_exists():
    from fairseq_deq.models.deq_transformer_lm import DEQTransformerConfig

    ours = {f"--{name.replace('_', '-')}" for name in DEQTransformerConfig.__dataclass_fields__}
    table = README[README.index("| [locuslab/deq]") :].split("\n\n", 1)[0]
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
