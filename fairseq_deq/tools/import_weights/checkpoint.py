"""Checkpoints as fairseq-train would save them, of weights that come from elsewhere."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fairseq import options as fairseq_options
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY, build_model
from omegaconf import OmegaConf
from torch import Tensor

from ...checkpoint_file import read_checkpoint
from ...errors import OptionError
from ...models.deq_language_model import DEQLanguageModel
from ..command import written_whole

_TASK = ("--task", "deq_language_modeling", "--criterion", "deq_lm_loss", "--optimizer", "adam")
# Where a training that goes on from the checkpoint begins in its data.
_BEGINNING = {"version": 2, "epoch": 1, "iterations_in_epoch": 0, "shuffle": True}


def configuration(data: Path, arguments: Sequence[str]) -> Any:
    """fairseq's configuration of a training with these arguments.

    Args:
        data: folder of the dictionary.
        arguments: options of fairseq-train.
    Raises:
        OptionError: fairseq does not understand them.
    """
    parser = fairseq_options.get_training_parser()

    def refuse(message: str) -> None:
        raise OptionError(f"{message}; fairseq-train --help shows the options")

    parser.error = refuse
    parsed = fairseq_options.parse_args_and_arch(parser, [str(data), *_TASK, *arguments])
    return convert_namespace_to_omegaconf(parsed)


def with_architecture(options: Sequence[str]) -> list[str]:
    """Options of a model with `--arch`, which is `deq_transformer_lm` where they have none.

    Args:
        options: of fairseq-train.
    Raises:
        OptionError: they are for a model of another kind.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--arch", "-a")
    name = parser.parse_known_args(list(options))[0].arch
    if name is None:
        return ["--arch", "deq_transformer_lm", *options]
    kind = MODEL_REGISTRY.get(name) or ARCH_MODEL_REGISTRY.get(name)
    if kind is not None and not issubclass(kind, DEQLanguageModel):
        raise OptionError(f"--arch must be a DEQ language model, got {name}")
    return list(options)


def model_of(cfg: Any, types: int) -> Any:
    """A new model of a configuration, for a dictionary of `types` types.

    Raises:
        OptionError: an option cannot work.
    """
    dictionary = Dictionary()
    for i in range(types - len(dictionary)):
        dictionary.add_symbol(f"word{i}")
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary, cfg=cfg.task)
    return build_model(cfg.model, task)


def with_weights(model: Any, weights: Mapping[str, Tensor], whole: bool) -> dict[str, Tensor]:
    """The model's tensors with others in the place of some.

    Args:
        model: what the checkpoint is of; it gets the weights.
        weights: by name.
        whole: whether they must be all parameters of the model.
    Raises:
        OptionError: one is not of the model, or of another shape.
    """
    state: dict[str, Tensor] = model.state_dict()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = sorted(parameters - set(weights)) if whole else []
    for name in (*missing, *weights):
        found, has = weights.get(name), state.get(name)
        if found is None or has is None or found.shape != has.shape:
            shapes = ["nothing" if t is None else " x ".join(map(str, t.shape)) for t in (found, has)]
            raise OptionError(f"{name} is {shapes[0]}, where the options make a model with {shapes[1]}")
    model.load_state_dict(state | dict(weights))
    loaded: dict[str, Tensor] = model.state_dict()  # in which tied weights are one
    return loaded


def write_checkpoint(path: Path, cfg: Any, weights: Mapping[str, Tensor], task_state: Any) -> None:
    """Write a checkpoint of a model with no updates yet.

    Args:
        path: of the file.
        cfg: fairseq's configuration.
        weights: of the model, by name.
        task_state: what the task keeps, with the fingerprint of the dictionary.
    """
    history = {
        "criterion_name": "DEQLanguageModelLoss",
        "optimizer_name": "FairseqAdam",
        "lr_scheduler_state": {"best": None},
        "num_updates": 0,
    }
    state = {
        "args": None,
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": dict(weights),
        "criterion": None,
        "optimizer_history": [history],
        "task_state": task_state,
        "extra_state": {"train_iterator": _BEGINNING, "val_loss": None, "previous_training_time": 0.0},
        "last_optimizer_state": None,
    }
    with written_whole(path) as partial:
        torch.save(state, partial)
        read_checkpoint(partial)


def write_dictionary(folder: Path, text: str) -> None:
    """Write fairseq's dict.txt; one of the same words may be there already.

    Raises:
        OptionError: there is another one.
    """
    path = folder / "dict.txt"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise OptionError(f"{path} already exists with other words; give OUT.pt a folder of its own")
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
