"""What several tests ask of a run of fairseq's tools, and of a script of an example."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def load_script(path: Path) -> ModuleType:
    """The script as a module of its name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def json_lines(text: str) -> list[dict[str, str]]:
    """The figures that `--log-format json` wrote."""
    return [json.loads(line[line.index("{") :]) for line in text.splitlines() if '{"epoch"' in line]


def read_losses(text: str) -> list[float]:
    """The losses of training among them."""
    return [float(line["loss"]) for line in json_lines(text) if "loss" in line]


def read_perplexity(text: str) -> tuple[int, float]:
    """Number of tokens and perplexity that fairseq-eval-lm printed."""
    tokens = re.search(r"Evaluated ([\d,]+) tokens", text)
    found = re.search(r"Perplexity: ([\d.]+)", text)
    assert tokens, text
    assert found, text
    return int(tokens.group(1).replace(",", "")), float(found.group(1))


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, without the buffer that fairseq's adaptive modules leave unset."""
    state = torch.load(path, weights_only=False)["model"]
    return {name: tensor for name, tensor in state.items() if "_float_tensor" not in name}


def resumed_state(folder: Path, name: str = "checkpoint_last.pt") -> dict[str, Any]:
    """What the checkpoint of a resumed run must have in common with that of the uninterrupted one."""
    state = torch.load(folder / name, weights_only=False)
    history, extra = state["optimizer_history"][-1], state["extra_state"]
    return {
        "weights": read_weights(folder / name),
        "optimizer": state["last_optimizer_state"]["state"],
        "updates": history["num_updates"],
        "schedule": history["lr_scheduler_state"],
        "position": extra["train_iterator"],
        "memory": extra["DEQLanguageModelingTask"],
    }


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Where two such states are not equal, bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        return [d for key in a for d in differences(a[key], b[key], f"{at}/{key}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [at]


def continuations(command: Callable[..., Any], data_bin: Path, checkpoint: Path, prompts: str) -> str:
    """What fairseq-interactive prints for two prompts, of which each must get a longer continuation."""
    options = (
        "--task language_modeling --beam 2 --nbest 1 --max-len-a 1 --max-len-b 8 --buffer-size 2".split()
    )
    options += ["--batch-size", "2", "--cpu"]
    output = command("fairseq-interactive", data_bin, "--path", checkpoint, *options, stdin=prompts)
    text: str = output.checked().text
    found = re.findall(r"^D-(\d)\t-[\d.]+\t(.+)$", text, re.MULTILINE)
    assert [number for number, _ in found] == ["0", "1"]
    assert all(len(continued.split()) > 3 for _, continued in found)
    return text


def check_resuming(train: Callable[..., str], folder: Path, stop: int, end: int) -> None:
    """Train to `end` at once, and in two parts; the weights must be equal bit for bit.

    Args:
        train: (folder, option, ...) -> log of fairseq-train.
        folder: where to put the checkpoints.
        stop, end: numbers of updates.
    """
    train(folder / "whole", "--max-update", str(end))
    train(folder / "parts", "--max-update", str(stop))
    train(folder / "parts", "--max-update", str(end))
    whole, parts = (read_weights(folder / name / "checkpoint_last.pt") for name in ("whole", "parts"))
    assert differences(parts, whole) == []


def check_adaptive(
    in_process: Callable[..., Any], data_bin: Path, folder: Path, train: Callable[..., str]
) -> None:
    """With adaptive input and softmax the loss falls, and fairseq-eval-lm evaluates what was trained."""
    adaptive = (
        *("--share-decoder-input-output-embed", "false", "--adaptive-input", "--tie-adaptive-weights"),
        *("--tie-adaptive-proj", "--adaptive-input-cutoff", "50,200", "--adaptive-softmax-cutoff", "50,200"),
    )
    found = read_losses(train(folder, *adaptive, "--max-update", "12", "--disable-validation"))
    assert found[-1] < found[0]
    options = "--gen-subset test --tokens-per-sample 32 --num-workers 0 --cpu".split()
    output = in_process("fairseq-eval-lm", data_bin, "--path", folder / "checkpoint_last.pt", *options)
    assert 1 < read_perplexity(output.checked().text)[1] < 2 ** found[0]
