"""The tensors that a map holds, and the same map with other tensors in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

# Instances of a class that is written in Python take no more, beside their attributes; others may hide some.
_PYTHON_SIZE = object.__basicsize__ + 16
# What holds no tensor, and is the same as another if it equals it.
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)


class Opaque(TypeError):
    """A thing that may hold tensors which cannot be found."""


@dataclass(frozen=True)
class Held:
    """What a thing is made of.

    Attributes:
        tensors: its tensors, each once; parameters of modules, and views of them, are not among them.
        key: everything else: the types, attributes and values, the shapes and types of the tensors, and which
            parameters. Two things of equal keys differ in the values of their tensors only.
        thing: a copy of it with the same tensors, which gets no attribute that the original gets later.
    """

    tensors: list[Tensor]
    key: Hashable
    thing: Any


def held(thing: Any) -> Held:
    """What `thing` is made of: of tensors, numbers, lists, functions of torch, and objects of those.

    Raises:
        Opaque: it holds something else, for instance a module or a closure.
    """
    tensors: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    made, key = _Walk(keep).go(thing)
    return Held(tensors, key, made)


def with_tensors(thing: Any, tensors: Sequence[Tensor]) -> Any:
    """A copy of `thing` with other tensors, in the order of `Held.tensors`; it shares no object with it that
    an evaluation could change.

    Raises:
        Opaque: as `held`.
    """
    remaining = iter(tensors)
    return _Walk(lambda tensor: next(remaining)).go(thing)[0]


class _Walk:
    """Goes through a thing, and makes a copy and a key of it.

    Args:
        change: the tensor of the copy, for each tensor.
    """

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change
        self.seen: dict[int, tuple[Any, int]] = {}  # by identity: the copy, and its number
        self.begun = 0
        self.within: set[int] = set()  # what is being gone through

    def go(self, thing: Any) -> tuple[Any, Hashable]:
        """The copy and the key."""
        if isinstance(thing, _PLAIN):
            return thing, (type(thing), thing)
        if isinstance(thing, type) or _is_plain_function(thing):
            return thing, thing
        parameter = thing._base if isinstance(thing, Tensor) and thing._base is not None else thing
        if isinstance(parameter, nn.Parameter):  # it stays where it is, and is updated in place
            layout = thing.storage_offset(), thing.shape, thing.stride()
            return thing, ("parameter", id(parameter), parameter.data_ptr(), *layout)
        known = self.seen.get(id(thing))
        if known is not None:
            return known[0], ("again", known[1])
        if id(thing) in self.within:
            raise Opaque(f"{type(thing).__name__} holds itself")
        self.begun, number = self.begun + 1, self.begun
        self.within.add(id(thing))
        made, key = self._tensor(thing) if type(thing) is Tensor else self._made_of_parts(thing)
        self.within.remove(id(thing))
        self.seen[id(thing)] = made, number
        return made, key

    def _tensor(self, tensor: Tensor) -> tuple[Tensor, Hashable]:
        return self.change(tensor), ("tensor", tensor.shape, tensor.dtype, tensor.device)

    def _made_of_parts(self, thing: Any) -> tuple[Any, Hashable]:
        if isinstance(thing, MethodType):
            owner, key = self.go(thing.__self__)
            return MethodType(thing.__func__, owner), ("method", thing.__func__, key)
        if type(thing) in (list, tuple):
            parts = [self.go(part) for part in thing]
            return type(thing)(part for part, _ in parts), (type(thing), *(key for _, key in parts))
        if type(thing) is dict and all(isinstance(name, _PLAIN) for name in thing):
            return self._attributes(dict, thing)
        kinds = type(thing).__mro__
        hides = type(thing).__basicsize__ > _PYTHON_SIZE or any(vars(kind).get("__slots__") for kind in kinds)
        if hides or isinstance(thing, (nn.Module, FunctionType)) or not hasattr(thing, "__dict__"):
            raise Opaque(f"the tensors of {type(thing).__name__} cannot be found")
        made = copy.copy(thing)
        attributes, key = self._attributes(type(thing), vars(thing))
        vars(made).update(attributes)
        return made, key

    def _attributes(self, kind: type, named: dict[Any, Any]) -> tuple[dict[Any, Any], Hashable]:
        parts = {name: self.go(part) for name, part in named.items()}
        copies = {name: part for name, (part, _) in parts.items()}
        return copies, (kind, *((name, key) for name, (_, key) in parts.items()))


def _is_plain_function(thing: Any) -> bool:
    """Whether it is a function of torch, which reads no tensor but its arguments."""
    if isinstance(thing, BuiltinFunctionType):  # or a method of something
        return isinstance(thing.__self__, (ModuleType, type(None)))
    return isinstance(thing, FunctionType) and thing.__module__.startswith("torch.")
