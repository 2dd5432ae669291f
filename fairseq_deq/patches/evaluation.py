"""Cases in which fairseq-eval-lm prints a perplexity that is not the perplexity of the text."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch

from ..errors import OptionError
from ._patch import replace

logger = logging.getLogger(__name__)


def refuse_to_skip_blocks() -> None:
    """Refuse to leave blocks of the text out of an evaluation.

    The fault: fairseq-eval-lm skips every block that is longer than the model's `max_positions()`. Its
    default `--tokens-per-sample` is 1024, so for a model trained with fewer it evaluates 0 tokens, prints
    "Perplexity: 1.00" and ends with status 0. Where the blocks are cut to a length, one that does not fit
    is an error here; where they are sentences, leaving out some stays a warning and leaving out all is an
    error.
    """
    from fairseq.tasks.fairseq_task import FairseqTask

    replace(FairseqTask, "filter_indices_by_size", _without_skipped_blocks)


def _without_skipped_blocks(filter_indices: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(
        self: Any, indices: Any, dataset: Any, max_positions: Any = None, ignore_invalid_inputs: bool = False
    ) -> Any:
        kept = filter_indices(self, indices, dataset, max_positions, ignore_invalid_inputs)
        skipped = len(indices) - len(kept)
        options = getattr(self, "cfg", None) or getattr(self, "args", None)
        block_size = getattr(options, "tokens_per_sample", None)
        if getattr(options, "sample_break_mode", None) not in (None, "none"):
            block_size = None
        if skipped and (block_size is not None or len(kept) == 0):
            advice = "the text has no block that the model can read"
            if block_size is not None:
                advice = f"give --tokens-per-sample {max_positions} or less instead of {block_size}"
            raise OptionError(
                f"{skipped} of {len(indices)} blocks of the text would be left out, because they are longer "
                f"than the {max_positions} positions of the model; {advice}"
            )
        return kept

    return wrapper


def refuse_scores_that_are_not_finite() -> None:
    """Refuse a perplexity over tokens whose scores are infinite or not a number.

    The fault: fairseq-eval-lm leaves tokens with an infinite score out of the sum (and its message about
    them fails), so that the worst tokens make the perplexity better; NaN scores give "Perplexity: nan" with
    status 0.
    """
    from fairseq.sequence_scorer import SequenceScorer

    replace(SequenceScorer, "generate", _with_finite_scores)


def _with_finite_scores(generate: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(self: Any, models: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        hypotheses = generate(self, models, sample, *args, **kwargs)
        # One transfer from the device for the whole batch.
        scores = torch.cat([row[0]["positional_scores"].reshape(-1) for row in hypotheses])
        failed = int((~torch.isfinite(scores)).sum())
        if failed:
            blocks = [int(i) for i, row in zip(sample["id"], hypotheses) if not _is_finite(row[0])]
            raise FloatingPointError(
                f"{failed} of {scores.numel()} tokens of a batch got a score that is not finite (first in "
                f"block {blocks[0]}), so the text has no perplexity; check the checkpoint for NaN weights, "
                "evaluate without --fp16, and for an equilibrium model look at the solver's statistics"
            )
        return hypotheses

    return wrapper


def _is_finite(hypothesis: Any) -> bool:
    return bool(torch.isfinite(hypothesis["positional_scores"]).all())


def evaluate_context_windows_in_order() -> None:
    """Give `--context-window` the context that precedes each block.

    The fault: the context is what the collater saw last. Several data loading workers (`--num-workers 2`)
    or several shards (`--num-shards 2`) each see only every other block, so the context is from further
    back and the perplexity silently another one. One worker is enough here; several shards are refused.
    """
    from fairseq.tasks.language_modeling import LanguageModelingTask

    replace(LanguageModelingTask, "eval_lm_dataloader", _with_context_in_order)


def _with_context_in_order(eval_lm_dataloader: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(eval_lm_dataloader)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        options = call.arguments
        if options["context_window"] > 0:
            if options["num_shards"] > 1:
                raise OptionError(
                    "--context-window needs the blocks in order, but --num-shards (or the number of "
                    f"processes) is {options['num_shards']}; evaluate with one"
                )
            if options["num_workers"] > 1:
                logger.info(
                    "--num-workers 1 instead of %d: --context-window needs the blocks in order",
                    options["num_workers"],
                )
                options["num_workers"] = 1
        return eval_lm_dataloader(*call.args, **call.kwargs)

    return wrapper
