"""The ranges of fairseq's numeric options; fairseq accepts any number, and fails later."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from ..errors import OptionError
from ..options import Range, flag

_COUNT, _NATURAL, _OR_NONE = "[1, inf)", "[0, inf)", "[-1, inf)"

#: For each group of fairseq's configuration: option -> interval, and -1 where it means "off".
RANGES: dict[str, dict[str, str | Range]] = {
    "common": {
        "log_interval": _COUNT,
        "seed": "[0, 4294967295]",
        "fp16_init_scale": _COUNT,
        "fp16_scale_window": _COUNT,
        "fp16_scale_tolerance": "[0, 1]",
        "min_loss_scale": "(0, inf)",
        "threshold_loss_scale": "(0, inf)",
        "amp_batch_retries": _NATURAL,
        "amp_init_scale": _COUNT,
        "amp_scale_window": _COUNT,
        "empty_cache_freq": _NATURAL,
        "all_gather_list_size": _COUNT,
        "model_parallel_size": _COUNT,
    },
    "distributed_training": {
        "distributed_world_size": _COUNT,
        "distributed_rank": _NATURAL,
        "distributed_port": "[-1, 65535]",
        "bucket_cap_mb": _COUNT,
        "heartbeat_timeout": _OR_NONE,
    },
    "dataset": {
        "num_workers": "[0, 1024]",
        "max_tokens": _COUNT,
        "batch_size": _COUNT,
        "max_tokens_valid": _COUNT,
        "batch_size_valid": _COUNT,
        "required_batch_size_multiple": _COUNT,
        "required_seq_len_multiple": _COUNT,
        "data_buffer_size": _NATURAL,
        "validate_interval": _COUNT,
        "validate_interval_updates": _NATURAL,
        "validate_after_updates": _NATURAL,
        "fixed_validation_seed": "[0, 4294967295]",
        "max_valid_steps": _NATURAL,
        "curriculum": _NATURAL,
        "num_shards": _COUNT,
        "shard_id": _NATURAL,
    },
    "optimization": {
        "max_epoch": _NATURAL,
        "max_update": _NATURAL,
        "stop_time_hours": _NATURAL,
        "clip_norm": _NATURAL,
        "update_freq": _COUNT,
        "lr": "[0, inf)",
        "stop_min_lr": Range("[0, inf)", also=-1),
    },
    "checkpoint": {
        "save_interval": _COUNT,
        "save_interval_updates": _NATURAL,
        "keep_interval_updates": _OR_NONE,
        "keep_interval_updates_pattern": Range(_COUNT, also=-1),
        "keep_last_epochs": _OR_NONE,
        "keep_best_checkpoints": _OR_NONE,
        "patience": _OR_NONE,
        "checkpoint_shard_count": _COUNT,
    },
    "generation": {
        "beam": _COUNT,
        "nbest": _COUNT,
        "max_len_a": _NATURAL,
        "max_len_b": _NATURAL,
        "min_len": _NATURAL,
        "lenpen": "(-inf, inf)",
        "unkpen": "(-inf, inf)",
        "prefix_size": _NATURAL,
        "no_repeat_ngram_size": _NATURAL,
        "sampling_topk": Range(_COUNT, also=-1),
        "sampling_topp": Range("(0, 1]", also=-1),
        "temperature": "(0, inf)",
        "diverse_beam_groups": Range(_COUNT, also=-1),
        "diverse_beam_strength": "(-inf, inf)",
        "diversity_rate": Range(_NATURAL, also=-1),
        "lm_weight": "(-inf, inf)",
    },
    "eval_lm": {"context_window": _NATURAL, "softmax_batch": _COUNT},
    "interactive": {"buffer_size": _NATURAL},
    "ema": {"ema_decay": "[0, 1]", "ema_start_update": _NATURAL, "ema_update_freq": _COUNT},
    "task": {"tokens_per_sample": _COUNT, "max_target_positions": _COUNT, "seed": "[0, 4294967295]"},
    "optimizer": {
        "adam_eps": "(0, inf)",
        "eps": "(0, inf)",
        "weight_decay": _NATURAL,
        "momentum": "[0, 1)",
        "adagrad_eps": "(0, inf)",
        "anneal_eps": "(0, inf)",
        "radam_eps": "(0, inf)",
        "rho": "[0, 1]",
    },
    "lr_scheduler": {
        "warmup_updates": _NATURAL,
        "warmup_init_lr": Range(_NATURAL, also=-1),
        "min_lr": Range(_NATURAL, also=-1),
        "lr_shrink": "(0, inf)",
        "lr_period_updates": Range("(0, inf)", also=-1),
        "t_mult": "[1, inf)",
        "end_learning_rate": _NATURAL,
        "power": "(0, inf)",
        "total_num_update": _COUNT,
        "lr_patience": _NATURAL,
    },
}

# Options that are lists: each number must be in the range.
_LISTS = ("update_freq", "lr")
# Options that may be fractions, as fairseq's types say; all others are whole numbers.
_FRACTIONS = (
    *("fp16_scale_tolerance", "min_loss_scale", "threshold_loss_scale", "stop_time_hours", "clip_norm", "lr"),
    *(
        "stop_min_lr",
        "max_len_a",
        "lenpen",
        "unkpen",
        "sampling_topp",
        "temperature",
        "diverse_beam_strength",
    ),
    *(
        "diversity_rate",
        "lm_weight",
        "ema_decay",
        "adam_eps",
        "eps",
        "weight_decay",
        "momentum",
        "adagrad_eps",
    ),
    *(
        "anneal_eps",
        "radam_eps",
        "rho",
        "warmup_init_lr",
        "min_lr",
        "lr_shrink",
        "lr_period_updates",
        "t_mult",
    ),
    *("end_learning_rate", "power", "total_num_update"),
)


def check_ranges(cfg: Any) -> None:
    """Check the numeric options of fairseq.

    Args:
        cfg: fairseq's configuration.
    Raises:
        OptionError: a number is out of its range; the sentence names the option and the range.
    """
    for group, name, value in _given(cfg):
        valid = RANGES[group][name]
        valid = Range(valid) if isinstance(valid, str) else valid
        whole = name not in _FRACTIONS
        for number in value if name in _LISTS and not isinstance(value, (int, float, str)) else (value,):
            valid.check(name, number, whole)
        if name in _LISTS and not isinstance(value, (int, float)) and len(value) == 0:
            raise OptionError(f"{flag(name)} must be one number or more, got none")
    _check_betas(cfg)


def _given(cfg: Any) -> Iterator[tuple[str, str, Any]]:
    for group, names in RANGES.items():
        options = cfg.get(group)
        if group == "task" and "language_modeling" not in str(getattr(options, "_name", "")):
            continue  # for another task the name may mean something else
        for name in names if options is not None else ():
            value = getattr(options, name, None)
            if value is not None:
                yield group, name, value


def _check_betas(cfg: Any) -> None:
    text = getattr(cfg.get("optimizer"), "adam_betas", None)
    if text is None:
        return
    try:
        first, second = (float(beta) for beta in (ast.literal_eval(text) if isinstance(text, str) else text))
    except (ValueError, SyntaxError, TypeError):
        first = second = -1.0
    if not (0 <= first < 1 and 0 <= second < 1):
        raise OptionError(f"--adam-betas must be two numbers in [0, 1), like '(0.9, 0.999)'; got {text}")
