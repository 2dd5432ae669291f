"""The file of the reference code's weights, read as data, and its tensors one after another."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...checkpoint_file import what_is_wrong
from ...errors import OptionError

_HOW_TO_SAVE = (
    "the reference saves them beside it as model_state_dict.pth; its own Python, where you trust it, does so "
    "by torch.save(torch.load({!r}, weights_only=False).state_dict(), 'weights.pth')"
)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read named tensors; nothing in the file is called.

    Args:
        path: what `torch.save(model.state_dict(), path)` wrote.
    Raises:
        OptionError: it is something else, is damaged, or holds NaN or infinity.
    """
    if not os.path.isfile(path):
        raise OptionError(f"there is no file {path}")
    with open(path, "rb") as file:
        wrong = what_is_wrong(file)
        if wrong is not None:
            raise OptionError(f"{path} is not a state_dict: it is {wrong}")
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise OptionError(_refusal(path, error)) from error
        except Exception as error:  # a file of another kind can fail in any way
            raise OptionError(f"{path} is not a state_dict: torch cannot read it ({_line(error)})") from error
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping) and "cfg" in state:
        raise OptionError(
            f"{path} is a checkpoint of fairseq already; --from-transformer-lm begins a training with one"
        )
    if not isinstance(state, Mapping) or not state or not all(map(_is_named_tensor, state.items())):
        raise OptionError(
            f"{path} is not a state_dict, which is a dictionary of named tensors, but holds a "
            f"{type(state).__name__}; save model.state_dict()"
        )
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise OptionError(f"{path} holds NaN or infinity in {name}: its training had diverged")
    return dict(state)


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _refusal(path: Any, error: Exception) -> str:
    _, _, named = str(error).partition("GLOBAL ")
    if not named:
        return f"{path} is not a state_dict: torch cannot read it ({_line(error)})"
    return (
        f"{path} is not a state_dict: it holds more than weights ({named.split()[0]}), and loading it would "
        f"run code; take the weights alone: {_HOW_TO_SAVE.format(str(path))}"
    )


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(". ")[:120]


class Tensors:
    """Named tensors, each to be taken once and in float32, so that none is left out unnoticed.

    Args:
        state: all of them.
        path: of their file, for the sentences.
    """

    def __init__(self, state: Mapping[str, Tensor], path: Any) -> None:
        self._left, self.path = dict(state), path

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, *shape: int | None) -> Tensor:
        """The tensor of a name, without the window of a convolution over one position.

        Args:
            name: of the tensor.
            shape: that it must have; None stands for any size.
        Raises:
            OptionError: there is none, or it has another shape.
        """
        tensor = self._left.pop(name, None)
        if tensor is None:
            raise OptionError(
                f"{self.path} has no {name}: it is not of the reference's DEQ-Transformer of version 2.0"
            )
        if tensor.dim() == len(shape) + 1 and tensor.shape[-1] == 1:
            tensor = tensor.squeeze(-1)
        if tensor.dim() != len(shape) or any(
            wanted not in (None, found) for wanted, found in zip(shape, tensor.shape)
        ):
            sizes = " x ".join("any" if wanted is None else str(wanted) for wanted in shape)
            raise OptionError(
                f"{self.path}: {name} is {' x '.join(map(str, tensor.shape)) or 'a number'}, where the other "
                f"weights need {sizes}"
            )
        return tensor.to(torch.float32)

    def finish(self) -> None:
        """Refuse what nobody has taken.

        Raises:
            OptionError: there is something.
        """
        if self._left:
            names = ", ".join(sorted(self._left)[:3])
            raise OptionError(
                f"{self.path} has weights that the reference's DEQ-Transformer of version 2.0 has not "
                f"({names}; {len(self._left)} in all)"
            )
