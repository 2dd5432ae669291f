"""Refuses options of evaluation and generation that cannot work together or would be ignored."""

from __future__ import annotations

import os
from typing import Any

from ..errors import OptionError
from ..options import flag


def check_evaluation(cfg: Any) -> None:
    """Check the options of fairseq-eval-lm.

    Raises:
        OptionError: an option cannot work.
    """
    processes = cfg.distributed_training.distributed_world_size
    if processes > 1:
        raise OptionError(
            f"--distributed-world-size must be 1 for fairseq-eval-lm: with {processes}, each process "
            "would print "
            "the perplexity of its own part of the text"
        )
    block, window = getattr(cfg.get("task"), "tokens_per_sample", None), cfg.eval_lm.context_window
    if window and block is not None and window >= block:
        raise OptionError(
            f"--context-window {window} must be below --tokens-per-sample {block}, of which it is a part"
        )


# Options of generation that have no effect on a language model.
_OF_TRANSLATION = (
    *("constraints", "print_alignment", "score_reference", "replace_unk", "sacrebleu", "match_source_len"),
    *("beam_mt", "max_len_a_mt", "max_len_b_mt", "lenpen_mt", "decoding_format", "eos_token"),
    *("iter_decode_eos_penalty", "iter_decode_max_iter", "iter_decode_force_max_iter", "print_step"),
    *("iter_decode_with_beam", "iter_decode_with_external_reranker", "retain_iter_history"),
    *("no_early_stop", "no_beamable_mm"),
)


def _check_options_of_translation(cfg: Any, tool: str) -> None:
    from fairseq.dataclass.configs import GenerationConfig

    names = (*_OF_TRANSLATION, "prefix_size") if tool == "interactive" else _OF_TRANSLATION
    for name in names:
        value = getattr(cfg.generation, name, None)
        if value != GenerationConfig.__dataclass_fields__[name].default:
            raise OptionError(
                f"{flag(name)} has no effect on language models, which have no source text besides "
                "their prompt; "
                "leave it out"
            )


def check_generation(cfg: Any, tool: str) -> None:
    """Check the options of fairseq-generate and fairseq-interactive.

    Args:
        cfg: fairseq's configuration.
        tool: `generate` or `interactive`.
    Raises:
        OptionError: an option cannot work, or would be ignored.
    """
    generation = cfg.generation
    if generation.sampling and generation.nbest != generation.beam:
        raise OptionError(
            f"--sampling needs --nbest equal to --beam, got {generation.nbest} and {generation.beam}"
        )
    if generation.nbest > generation.beam:
        raise OptionError(f"--nbest {generation.nbest} must be at most --beam {generation.beam}")
    if not generation.sampling and (generation.sampling_topk > 0 or generation.sampling_topp > 0):
        raise OptionError("--sampling-topk and --sampling-topp need --sampling; add it")
    if generation.lm_path is not None and tool == "interactive":
        raise OptionError("--lm-path is not used by fairseq-interactive; fairseq-generate has it")
    if generation.lm_weight and generation.lm_path is None:
        raise OptionError(f"--lm-weight {generation.lm_weight} needs --lm-path")
    if generation.lm_path is not None and not os.path.exists(generation.lm_path):
        raise OptionError(f"--lm-path: there is no checkpoint {generation.lm_path}")
    if str(getattr(cfg.get("task"), "_name", "")).endswith("language_modeling"):
        _check_options_of_translation(cfg, tool)
    size = cfg.dataset.batch_size
    if tool == "interactive" and size and size > max(cfg.interactive.buffer_size, 1):
        raise OptionError(
            f"--batch-size {size} must be at most --buffer-size {cfg.interactive.buffer_size}, the "
            "lines that are "
            "read before any is answered"
        )
    task = cfg.get("task")
    if tool == "generate" and str(getattr(task, "_name", "")) == "language_modeling":
        mode = str(task.sample_break_mode)
        if mode != "eos":
            raise OptionError(
                "fairseq-generate takes whole sentences as prompts: give --sample-break-mode eos "
                f"instead of {mode}, "
                "whose blocks begin and end anywhere"
            )
