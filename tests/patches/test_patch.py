"""Replacing functions: once for each patch, and all patches of one function together."""

import types

import pytest
from fairseq import checkpoint_utils, utils
from fairseq.data import data_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.tasks.fairseq_task import FairseqTask

from fairseq_deq.patches import install
from fairseq_deq.patches._patch import replace


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
    owners = {
        checkpoint_utils: ("load_checkpoint_to_cpu", "load_checkpoint", "load_model_ensemble_and_task"),
        distributed_utils: ("call_main", "_broadcast_object_slow"),
        FairseqTask: ("optimizer_step", "filter_indices_by_size"),
        data_utils: ("batch_by_size", "load_indexed_dataset"),
        utils: ("import_user_module",),
    }
    functions = [getattr(owner, name) for owner, names in owners.items() for name in names]
    install()
    assert [getattr(owner, name) for owner, names in owners.items() for name in names] == functions
    assert all(depth(function) > 0 for function in functions)


def test_every_wrap_of_the_entry_point_is_there_from_the_inside_out():
    names = []
    function = distributed_utils.call_main
    while hasattr(function, "__wrapped__"):
        names.insert(0, function.__code__.co_qualname if hasattr(function.__code__, "co_qualname") else "")
        function = function.__wrapped__
    assert [name.split(".")[0] for name in names] == [
        "_with_processes_as_asked",
        "_without_sharded_equilibria",
        "_with_precision_checked",
        "_with_overrides_checked",
        "_in_one_sentence",
    ]
