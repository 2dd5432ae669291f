"""Checks of options that contradict each other, made before the model is built."""

from __future__ import annotations

from ..errors import OptionError
from ..options import check_values, is_on
from .deq_config import DEQLanguageModelConfig


def check_options(cfg: DEQLanguageModelConfig, vocabulary: int) -> None:
    """Refuse what cannot work, before anything is built.

    Args:
        cfg: the options.
        vocabulary: number of types in the dictionary.
    Raises:
        ValueError: with the option's name, what is wrong and what is valid.
    """
    check_values(cfg, DEQLanguageModelConfig)
    if cfg.early_eps and not (cfg.max_update and cfg.max_update > 0):
        raise OptionError("--early-eps needs --max-update, since it is used for a share of these updates")
    if is_on(cfg, "subseq_forget") and cfg.subseq_len == 0:
        raise OptionError("--subseq-forget needs --subseq-len above 0: without it there are no subsequences")
    if is_on(cfg, "adaptive_input") and not cfg.adaptive_input_cutoff:
        raise OptionError("--adaptive-input needs --adaptive-input-cutoff, for example 20000,40000,200000")
    for name in ("adaptive_input_cutoff", "adaptive_softmax_cutoff"):
        if getattr(cfg, name):
            _check_cutoff(name, getattr(cfg, name), vocabulary)
    if is_on(cfg, "tie_adaptive_weights"):
        same = (cfg.adaptive_input_cutoff, cfg.adaptive_input_factor)
        if not is_on(cfg, "adaptive_input") or same != (
            cfg.adaptive_softmax_cutoff,
            cfg.adaptive_softmax_factor,
        ):
            raise OptionError(
                "--tie-adaptive-weights needs --adaptive-input, and the same cut-offs and factor in "
                "--adaptive-input-cutoff/-factor and --adaptive-softmax-cutoff/-factor"
            )
    if is_on(cfg, "tie_adaptive_proj") and not is_on(cfg, "tie_adaptive_weights"):
        raise OptionError("--tie-adaptive-proj needs --tie-adaptive-weights")
    if is_on(cfg, "share_decoder_input_output_embed") and (
        is_on(cfg, "adaptive_input") or cfg.adaptive_softmax_cutoff
    ):
        raise OptionError(
            "--share-decoder-input-output-embed is for the full softmax; with the adaptive one use "
            "--tie-adaptive-weights"
        )


def _check_cutoff(name: str, text: str, vocabulary: int) -> None:
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or numbers != sorted(set(numbers)) or numbers[0] < 1:
        raise OptionError(
            f"--{name.replace('_', '-')} must be increasing positive numbers with commas between, got {text}"
        )
    if numbers[-1] > vocabulary:
        raise OptionError(
            f"--{name.replace('_', '-')} {text} goes beyond the dictionary of {vocabulary} types; "
            "choose cut-offs below that"
        )
