"""examples/options.md is what the dataclasses say."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT
from fairseq import options

from fairseq_deq.tools.option_reference import main, page

REFERENCE = (ROOT / "examples" / "options.md").read_text(encoding="utf-8")


def rows(heading):
    """option -> default, valid, meaning, of the table under a heading."""
    section = REFERENCE.split(f"# {heading}\n", 1)[1].split("\n#", 1)[0]
    found = re.findall(r"^\| `--([\w-]+)` \| (.*?) \| (.*?) \| (.*) \|$", section, re.M)
    return {name: (default, valid, meaning) for name, default, valid, meaning in found}


def test_the_file_is_what_the_command_writes(tmp_path):
    assert page() == REFERENCE, "python -m fairseq_deq.tools option-reference --out examples/options.md"
    assert main(["--out", str(tmp_path / "options.md")]) == 0
    assert (tmp_path / "options.md").read_text(encoding="utf-8") == REFERENCE


def test_it_says_defaults_valid_values_and_conditions():
    shared = rows("All models")
    assert shared["f-eps"] == ("0.001", "in (0, 1)", "tolerance of the forward solve")
    assert shared["wnorm"][:2] == ("false", "true, false")
    assert shared["gradient"][:2] == ("ift", "ift, shine, phantom, jfb, unroll")
    assert shared["phantom-steps"][2].endswith("(only with --gradient phantom)")
    assert "decoder-ffn-embed-dim" not in shared
    assert rows("`--arch deq_trellisnet_lm`")["solver-scope"][0] == "recurrence"
    assert "`deq_transformer_lm_wt103` | `--decoder-embed-dim 700`, `--dropout 0.05`" in REFERENCE


def test_every_option_of_a_model_that_can_be_typed_is_there_once(capsys):
    words = ["--task", "copy_memory", "--arch", "deq_transformer_lm", "--criterion", "deq_lm_loss", "--help"]
    with pytest.raises(SystemExit):
        options.parse_args_and_arch(options.get_training_parser(), words)
    text = capsys.readouterr().out
    group = text.partition("Model-specific configuration:\n")[2].split("\n\n", 1)[0]
    typed = re.findall(r"^  --([\w-]+)", group, re.M)
    listed = [*rows("All models"), *rows("`--arch deq_transformer_lm`")]
    assert sorted(listed) == sorted(typed)
