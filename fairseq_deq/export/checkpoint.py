"""Reads a fairseq checkpoint as the options and weights of an exported model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ..checkpoint_file import options_in, read_checkpoint_at
from ..errors import OptionError
from ..options import flag, is_on
from .remote.options_deq import ModelOptions
from .weights import Weights, exported_weights

# The model options that an export uses, each with its value in a checkpoint that does not have it.
SHARED: dict[str, Any] = {
    "decoder_embed_dim": 256,
    "wnorm": "false",
    "share_decoder_input_output_embed": "false",
    "adaptive_input": "false",
    "adaptive_input_cutoff": None,
    "adaptive_input_factor": 4.0,
    "adaptive_softmax_cutoff": None,
    "adaptive_softmax_factor": 4.0,
    "adaptive_softmax_projection": "false",
    "output_bias": "false",
    "tie_adaptive_weights": "false",
    "tie_adaptive_proj": "false",
    "f_solver": "anderson",
    "f_thres": 60,
    "f_eps": 1e-3,
    "stop_mode": "rel",
    "solver_scope": "position",
    "f_memory": 0,
    "f_damping": 1.0,
    "preconditioner_rank": 32,
    "learned_start": "true",
    "solver_policy": "best",
    "gradient": "ift",
    "pretrain_steps": 0,
    "subseq_len": 0,
    "subseq_forget": "false",
}
TRANSFORMER: dict[str, Any] = SHARED | {
    "decoder_ffn_embed_dim": 1024,
    "decoder_attention_heads": 8,
    "decoder_head_dim": 0,
    "decoder_normalize_before": "false",
    "decoder_closing_norm": "true",
    "activation_fn": "relu",
    "decoder_gated_ffn": "false",
    "decoder_norm": "layer",
    "decoder_norm_affine": "false",
    "decoder_input_residual": "false",
    "decoder_positions": "relative",
    "decoder_layers": 1,
    "local_size": 0,
}
TRELLISNET: dict[str, Any] = SHARED | {
    "nhid": 256,
    "nout": 0,
    "ksize": 2,
    "wnorm": "true",
    "solver_scope": "recurrence",
}
FAMILIES = {
    "deq_transformer_lm": ("transformer", TRANSFORMER),
    "deq_trellisnet_lm": ("trellisnet", TRELLISNET),
}


@dataclass(frozen=True)
class Exported:
    """A model, ready to be written to a folder.

    Attributes:
        options: the options of the exported model.
        weights: its tensors by name, float32.
        data: the data folder that the checkpoint names; empty: it names none.
        begins_with_bos: whether its texts begin with `<s>`; otherwise they begin with `</s>`.
        updates: number of finished updates of the training.
    """

    options: ModelOptions
    weights: Weights
    data: str
    begins_with_bos: bool
    updates: int


def read_model(path: str | os.PathLike[str], overrides: Mapping[str, Any]) -> Exported:
    """Read a checkpoint; nothing in the file is called or evaluated.

    Args:
        path: of the checkpoint.
        overrides: options of the model to change, by name.
    Returns:
        the model to write.
    Raises:
        OptionError: it is no checkpoint of these models, or has an option that cannot be exported.
    """
    state = read_checkpoint_at(path)
    model, task = options_in(state, "model"), options_in(state, "task")
    name = str(model.get("_name") or model.get("arch"))
    family, table = next(
        (known for prefix, known in FAMILIES.items() if name.startswith(prefix)), ("", SHARED)
    )
    if not family:
        raise OptionError(
            f"{path} is a checkpoint of {name}; what can be exported is {' and '.join(FAMILIES)}"
        )
    unknown = sorted(set(overrides) - set(table))
    if unknown:
        raise OptionError(
            f"--model-overrides has no option {', '.join(unknown)} that has an effect in an export; "
            "those that have one: "
            f"{', '.join(sorted(table))}"
        )
    values = {option: model.get(option, default) for option, default in table.items()} | dict(overrides)
    chosen = SimpleNamespace(**values)
    history = state.get("optimizer_history") or [{}]
    updates = int(history[-1].get("num_updates") or 0)
    _refuse(chosen, path, updates)
    weights = exported_weights(state["model"], chosen, family, path)
    return Exported(
        options=_options(chosen, family, weights),
        weights=weights,
        data=str(task.get("data") or "").split(os.pathsep)[0],
        begins_with_bos=bool(task.get("add_bos_token")),
        updates=updates,
    )


def _refuse(chosen: SimpleNamespace, path: Any, updates: int) -> None:
    """Refuse options with which an export would not compute what the package computes."""
    if chosen.pretrain_steps and updates <= chosen.pretrain_steps:
        raise OptionError(
            f"{path} is still a stack of tied layers (update {updates} of --pretrain-steps "
            f"{chosen.pretrain_steps}) and has no equilibrium yet; train on, and export a later checkpoint"
        )
    for option, kept, reason, instead in (
        ("f_solver", ("anderson", "picard"), "exports have anderson and picard", "'anderson'"),
        ("solver_scope", ("position", "recurrence"), "it is not causal until it has converged", "'position'"),
        ("solver_policy", ("best",), "exports keep the best state and say what converged", "'best'"),
        ("gradient", ("ift", "shine", "phantom", "jfb"), "an unrolled model is not at an equilibrium", ""),
    ):
        value = str(getattr(chosen, option))
        if value not in kept:
            advice = f"; --model-overrides \"{{'{option}': {instead}}}\" changes it" if instead else ""
            raise OptionError(f"{flag(option)} {value} cannot be exported: {reason}{advice}")
    if is_on(chosen, "subseq_forget"):
        raise OptionError(
            "--subseq-forget cannot be exported: generation sees the whole text before a token; "
            "--model-overrides \"{'subseq_forget': 'false'}\" lets scores do so too"
        )


def _options(chosen: SimpleNamespace, family: str, weights: Weights) -> ModelOptions:
    dim, scope = int(chosen.decoder_embed_dim), str(chosen.solver_scope)
    own: dict[str, Any]
    if family == "transformer":
        heads = int(chosen.decoder_attention_heads)
        own = {
            "embed_scale": dim**0.5,
            "ffn_dim": chosen.decoder_ffn_embed_dim,
            "heads": heads,
            "head_dim": chosen.decoder_head_dim or dim // heads,
            "pre_norm": is_on(chosen, "decoder_normalize_before"),
            "closing_norm": is_on(chosen, "decoder_closing_norm"),
            "activation": str(chosen.activation_fn),
            "gated_ffn": is_on(chosen, "decoder_gated_ffn"),
            "norm": str(chosen.decoder_norm),
            "norm_affine": is_on(chosen, "decoder_norm_affine"),
            "input_residual": is_on(chosen, "decoder_input_residual"),
            "positions": str(chosen.decoder_positions),
            "local_size": chosen.local_size,
            "layers": chosen.decoder_layers,
        }
    else:
        output = chosen.nout or dim
        own = {
            "window": chosen.ksize,
            "hidden_dim": chosen.nhid + output,
            "output_dim": output,
            "kernel_size": chosen.ksize,
        }
    input_cutoff = cutoffs(chosen.adaptive_input_cutoff) if is_on(chosen, "adaptive_input") else ()
    softmax_cutoff = cutoffs(chosen.adaptive_softmax_cutoff)
    tied = "tie_adaptive_weights" if softmax_cutoff else "share_decoder_input_output_embed"
    options = ModelOptions(
        family=family,
        vocab_size=weights.types,
        embed_dim=dim,
        adaptive_input_cutoff=input_cutoff,
        adaptive_input_factor=chosen.adaptive_input_factor,
        adaptive_softmax_cutoff=softmax_cutoff,
        adaptive_softmax_factor=chosen.adaptive_softmax_factor,
        tie_softmax=is_on(chosen, tied),
        tie_projections=bool(softmax_cutoff) and is_on(chosen, "tie_adaptive_proj"),
        output_bias=is_on(chosen, "output_bias"),
        softmax_projection=bool(softmax_cutoff) and is_on(chosen, "adaptive_softmax_projection"),
        preconditioner_rank=weights.rank,
        learned_start="start.weight" in weights.tensors,
        f_solver=str(chosen.f_solver),
        f_thres=chosen.f_thres,
        f_eps=chosen.f_eps,
        stop_mode=str(chosen.stop_mode),
        f_memory=chosen.f_memory or (2 if scope == "recurrence" else 5),
        f_damping=chosen.f_damping,
        solver_scope=scope,
        subseq_len=chosen.subseq_len,
        **own,
    )
    try:
        _ = options.solve
    except (TypeError, ValueError) as error:
        raise OptionError(str(error)) from None
    return options


def cutoffs(text: str | None) -> tuple[int, ...]:
    """The numbers of a cut-off option, which is a text with commas between; () if there is none."""
    return tuple(int(number) for number in text.split(",")) if text else ()
