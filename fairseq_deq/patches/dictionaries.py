"""The fault: a checkpoint does not record the dictionary that it was trained with.

With a dictionary of another size, fairseq ends in a tensor size mismatch. With one of the same size but other
words, or another order of them, it prints a meaningless perplexity. Here checkpoints keep a hash of the
words, and a tool refuses to evaluate, generate or go on training with another dictionary. A checkpoint
without a hash is not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from ..data_folder import words_fingerprint
from ..errors import OptionError

_KEY = "fairseq_deq.dictionary"

# The task of the training that is being resumed; the function that reads the checkpoint does not get it.
_resuming: ContextVar[Any] = ContextVar("fairseq_deq_resuming", default=None)


def with_dictionary(state_dict: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Add the hash to the state of a task."""

    def wrapper(self: Any) -> dict[str, Any]:
        return {**(state_dict(self) or {}), _KEY: words_fingerprint(self.source_dictionary.symbols)}

    return wrapper


def after_checking_dictionary(load_state_dict: Callable[..., None]) -> Callable[..., None]:
    """Compare the hash in the state of a task with its dictionary before the state is loaded."""

    def wrapper(self: Any, state_dict: Mapping[str, Any]) -> None:
        _check(self, state_dict)
        load_state_dict(self, {key: value for key, value in state_dict.items() if key != _KEY})

    return wrapper


def _checking_resumed_dictionary(load: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        state = load(*args, **kwargs)
        task = _resuming.get()
        if task is not None:
            _check(task, state.get("task_state") or {})
        return state

    return wrapper


def _telling_its_task(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _resuming.set(self.task)
        try:
            return load_checkpoint(self, *args, **kwargs)
        finally:
            _resuming.reset(token)

    return wrapper


def _check(task: Any, state_dict: Mapping[str, Any]) -> None:
    trained = state_dict.get(_KEY)
    if trained is None or getattr(task, "source_dictionary", None) is None:
        return
    found = words_fingerprint(task.source_dictionary.symbols)
    if found == trained:
        return
    difference = f"has {found['types']}"
    if found["types"] == trained["types"]:
        difference = "has other words or another order"
    data = getattr(getattr(task, "cfg", None) or task.args, "data", "the data folder")
    raise OptionError(
        f"the checkpoint was trained with a dictionary of {trained['types']} types, and the one in {data} "
        f"{difference}; prepare the text with fairseq-preprocess --srcdict and the dict.txt of the training"
    )
