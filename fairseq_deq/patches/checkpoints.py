"""Faults of fairseq in saving and loading checkpoints."""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import typing
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ._patch import replace


def load_checkpoints_with_safe_globals() -> None:
    """Load checkpoints that hold a configuration object or a numpy number.

    The fault: torch 2.6 made `torch.load` refuse everything but tensors and plain containers. fairseq's
    checkpoints hold an `argparse.Namespace` for every component without a dataclass (`--optimizer sgd`,
    older checkpoints) and whatever numbers a criterion logged, and so do not load any more. The list below
    is allowed while fairseq loads a checkpoint, and only then; arbitrary objects stay refused.
    """
    from fairseq import checkpoint_utils

    if _torch_loads_any_object():
        return
    replace(checkpoint_utils, "load_checkpoint_to_cpu", _with_safe_globals)
    replace(checkpoint_utils, "load_ema_from_checkpoint", _with_safe_globals)


def broadcast_checkpoints_with_safe_globals() -> None:
    """Resume a run of several processes.

    The fault: rank 0 loads the checkpoint and sends it to the others, which read it by a `torch.load` that
    since torch 2.6 refuses the omegaconf configuration in it; every resume of a multi-process run ends in
    an UnpicklingError.
    """
    from fairseq.distributed import utils as distributed_utils

    if _torch_loads_any_object():
        return
    replace(distributed_utils, "_broadcast_object_slow", _with_safe_globals)


def _torch_loads_any_object() -> bool:
    buffer = io.BytesIO()
    torch.save(argparse.Namespace(), buffer)
    buffer.seek(0)
    try:
        torch.load(buffer)
    except pickle.UnpicklingError:
        return False
    return True


def _with_safe_globals(load: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with torch.serialization.safe_globals(_safe_globals()):
            return load(*args, **kwargs)

    return wrapper


def _safe_globals() -> list[Any]:
    from fairseq.distributed import utils as distributed_utils
    from omegaconf import DictConfig, ListConfig, base, nodes

    nodes_of_config = [value for value in vars(nodes).values() if isinstance(value, type)]
    numpy_core = getattr(np, "_core", None) or np.core
    numpy_types = [np.dtype, np.ndarray, *(type(np.dtype(kind)) for kind in "?bhilqBHILQefd")]
    scalar, reconstruct = numpy_core.multiarray.scalar, numpy_core.multiarray._reconstruct
    # numpy 1 and numpy 2 name the same functions differently in what they pickle.
    numpy_functions: list[Any] = [
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for function, name in ((scalar, "scalar"), (reconstruct, "_reconstruct"))
    ]
    return [
        argparse.Namespace,
        collections.defaultdict,
        distributed_utils._TensorPlaceholder,  # stands for each tensor in what rank 0 sends
        DictConfig,
        ListConfig,
        base.ContainerMetadata,
        base.Metadata,
        *nodes_of_config,
        (typing.Any, "typing.Any"),
        *(bool, dict, float, int, list, set, str, tuple),
        *numpy_types,
        *numpy_functions,
    ]
