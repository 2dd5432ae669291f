"""Replacing functions: once for each patch, and all patches of one function together."""

import re
import types

import pytest
from fairseq.distributed import utils as distributed_utils
from forked import IMPORTED_BY_FAIRSEQ, run_forked

from fairseq_deq import patches
from fairseq_deq.patches import install
from fairseq_deq.patches._patch import Patch, _owners, replace
from fairseq_deq.patches.table import TABLE


def depth(function):
    """How often a function is wrapped."""
    count = 0
    while hasattr(function, "__wrapped__"):
        function, count = function.__wrapped__, count + 1
    return count


def adding(letter):
    return lambda original: lambda text: original(text + letter)


@pytest.fixture
def owner():
    return types.SimpleNamespace(function=lambda text: text)


def test_a_later_wrap_is_the_outer_one(owner):
    replace(owner, "function", adding("a"))
    replace(owner, "function", adding("b"))
    assert owner.function("") == "ba"


def test_the_same_wrap_is_applied_once(owner):
    a, b = adding("a"), adding("b")
    for wrap in (a, b, a, b):
        replace(owner, "function", wrap)
    assert owner.function("") == "ba"


def test_a_function_that_is_not_there_stays_away(owner):
    replace(owner, "other", adding("a"))
    assert not hasattr(owner, "other")


def test_the_original_stays_reachable_under_its_name(owner):
    original = owner.function
    replace(owner, "function", adding("a"))
    assert owner.function.__wrapped__ is original
    assert owner.function.__name__ == original.__name__


def test_static_methods_stay_static():
    class Owner:
        @staticmethod
        def function(text):
            return text

    replace(Owner, "function", adding("a"))
    assert Owner.function("") == Owner().function("") == "a"


def test_installing_again_changes_nothing():
    functions = [getattr(owner, name) for patch in TABLE for owner, name in _owners(patch.target)]
    install()
    assert [getattr(owner, name) for patch in TABLE for owner, name in _owners(patch.target)] == functions
    assert depth(distributed_utils.call_main) == 4


def test_replacements_of_the_entry_point_are_there_from_the_inside_out():
    names = []
    function = distributed_utils.call_main
    while hasattr(function, "__wrapped__"):
        names.insert(0, function.__code__.co_filename.rpartition("/")[2])
        function = function.__wrapped__
    assert names == ["distributed.py", "configuration.py", "noise.py", "sentences.py"]


# ---------------------------------------------------------------------- the table


def test_every_row_has_a_target_a_fault_in_one_sentence_and_versions():
    for patch in TABLE:
        assert _owners(patch.target), patch.target
        assert re.fullmatch(r"[^\n]+[.;][^\n]*", patch.fault)
        assert patch.fault.endswith(".")
        assert re.fullmatch(r"(fairseq >=|ve-fairseq )0\.12\.\d", patch.versions)


@pytest.fixture(scope="module")
def printed():
    """What `python -m fairseq_deq.patches` prints, for values of FAIRSEQ_DEQ_PATCHES."""
    values = ("", "off", "help, words", "helo")
    command = "runpy.run_module('fairseq_deq.patches', run_name='__main__')"
    programs = [
        f"import os, runpy\nos.environ['FAIRSEQ_DEQ_PATCHES'] = {value!r}\n{command}" for value in values
    ]
    return dict(zip(values, run_forked(IMPORTED_BY_FAIRSEQ, programs)))


def test_the_table_is_printed_with_what_is_active(printed):
    out = printed[""].checked().text
    for patch in TABLE:
        assert re.search(
            rf"^{patch.name} +(active|not needed) +\S+ \S+ +{re.escape(patch.target)}$", out, re.M
        )
    assert re.search(rf"^\d+ of {len(TABLE)} active; ", out, re.M)


def test_patches_can_be_switched_off(printed):
    assert f"0 of {len(TABLE)} active" in printed["off"].text
    lines = printed["help, words"].text.splitlines()
    assert [line.split()[0] for line in lines if "switched off  " in line] == ["words", "help"]


def test_a_patch_that_does_not_exist_cannot_be_switched_off(printed):
    output = printed["helo"]
    assert output.status == 1
    assert re.fullmatch(r"error: FAIRSEQ_DEQ_PATCHES names 'helo', which is no patch; [^\n]*\n", output.text)


@pytest.mark.parametrize(
    "target", ["fairseq.utils.no_such_function", "fairseq.no_such_module.f", "fairseq.trainer.Trainer.none"]
)
def test_a_target_that_has_vanished_is_a_warning(monkeypatch, caplog, target):
    row = Patch("gone", target, "A fault.", ">=0.12.2", adding("a"))
    monkeypatch.setattr(patches, "TABLE", (row,))
    monkeypatch.setattr(patches, "_states", [])
    assert [state for _, state in install()] == ["target is gone"]
    assert f"this fairseq has no {target}" in caplog.text
