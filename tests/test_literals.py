"""Strings are read as literals, and nothing is evaluated."""

import re
import sys
from pathlib import Path

import pytest
from fairseq import utils
from fairseq.models import ARCH_MODEL_REGISTRY

import fairseq_deq  # noqa: F401  (installs the patches)
from fairseq_deq.errors import OptionError
from fairseq_deq.literals import literal


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[1, 2]", [1, 2]),
        ("(0.9, 0.999)", (0.9, 0.999)),
        (" {'a': -1}", {"a": -1}),
        ("None", None),
        ("[(512, 3)] * 2 + [(4, 1)]", [(512, 3), (512, 3), (4, 1)]),
        ("2 * (1,)", (1, 1)),
    ],
)
def test_literals(text, value):
    assert literal(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "open('x', 'w')",
        "[open('x', 'w')]",
        "__import__('os')",
        "[1] + list(range(3))",
        "[0] * 10**9",
        "[0] * 1000000 * 1000000",
        "().__class__",
        "[x for x in (1,)]",
        "f'{1}'",
        "lambda: 1",
        "a",
        "1 +",
        "(" * 5000,
    ],
)
def test_what_is_no_literal_is_refused_in_a_sentence(text):
    with pytest.raises(OptionError, match="is not a literal") as refused:
        literal(text)
    assert len(str(refused.value)) < 300


def test_no_module_of_fairseq_evaluates(tmp_path):
    found = []
    for name, module in list(sys.modules.items()):
        path = Path(getattr(module, "__file__", None) or "")
        if name.split(".")[0] != "fairseq" or path.suffix != ".py":
            continue
        if re.search(r"(?<![\w.])eval\(", path.read_text(encoding="utf-8")):
            found.append(name)
            assert vars(module).get("eval") is literal, name
    assert {"fairseq.utils", "fairseq.models.fconv_lm", "fairseq.optim.adam"} <= set(found)
    place = tmp_path / "canary"
    with pytest.raises(OptionError):
        utils.eval_str_list(f"[open({str(place)!r}, 'w')]")
    with pytest.raises(OptionError):
        utils.eval_bool(f"open({str(place)!r}, 'w')")
    assert not place.exists()


def test_fairseq_still_reads_its_own_defaults():
    assert utils.eval_str_list("0.1,0.2") == [0.1, 0.2]
    assert utils.eval_bool("True") is True
    assert utils.eval_bool(None) is False
    assert "fconv_lm_dauphin_wikitext103" in ARCH_MODEL_REGISTRY
    layers = "[(850, 6)] * 3 + [(850, 1)] * 1 + [(850, 5)] * 4"
    assert len(literal(layers)) == 8
