"""Corrections of fairseq's tasks that all tasks of this package share."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.tasks import FairseqTask
from torch import Tensor

from ..errors import OptionError
from ..generation.generator import PrefillingGenerator, is_prefillable
from ..generation.text import TextEncoder

logger = logging.getLogger(__name__)


class CarefulTask(FairseqTask):
    """A task that drops no block of a text, resumes with the same batches and handles prompts whole."""

    def filter_indices_by_size(
        self, indices: Any, dataset: Any, max_positions: Any = None, ignore_invalid_inputs: bool = False
    ) -> Any:
        """The blocks that are short enough, where leaving some out does not change what is evaluated.

        fairseq-eval-lm leaves out every block that is longer than the model's `max_positions()`, and prints
        a perplexity of the rest, or "Perplexity: 1.00" of nothing.

        Args:
            indices: numbers of the blocks.
            dataset: the blocks.
            max_positions: positions that a block may have.
            ignore_invalid_inputs: leave out what is longer, instead of ending.
        Raises:
            OptionError: all blocks would be left out, or some where `--tokens-per-sample` made them too long.
        """
        kept = super().filter_indices_by_size(indices, dataset, max_positions, ignore_invalid_inputs)
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

    def get_batch_iterator(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """fairseq's batches, which a resumed run cuts as the uninterrupted one did.

        fairseq draws which blocks make up a batch once, when a process starts, with `--seed` plus the epoch
        that it starts in. Here the first epoch counts wherever batches are kept from one epoch to the next.

        Args:
            dataset: what to read.
            args: as for `FairseqTask.get_batch_iterator`.
            kwargs: likewise.
        """
        bound = inspect.signature(super().get_batch_iterator).bind(dataset, *args, **kwargs)
        bound.apply_defaults()
        values = bound.arguments
        seed, epoch = values["seed"], values["epoch"]
        redrawn = values.get("update_epoch_batch_itr") or getattr(self.cfg, "rebuild_batches", False)
        if redrawn or epoch <= 1 or not self.can_reuse_epoch_itr(dataset):
            return super().get_batch_iterator(*bound.args, **bound.kwargs)
        values["seed"] = seed + 1 - epoch  # fairseq draws with seed + epoch
        iterator = super().get_batch_iterator(*bound.args, **bound.kwargs)
        iterator.seed = seed  # the order of the batches still follows the epoch
        return iterator

    def train_step(
        self, sample: Any, model: Any, criterion: Any, optimizer: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """One step, with `--amp` in bfloat16 on a CPU, where fairseq computes it in float32.

        bfloat16 has the exponents of float32 and needs no loss scaling.

        Args:
            sample, model, criterion, optimizer: as for `FairseqTask.train_step`.
            args: likewise.
            kwargs: likewise.
        """
        on_cpu = next(model.parameters()).device.type == "cpu"
        # The backward pass is inside too: a layer that is evaluated again there gets the same types.
        with torch.autocast("cpu", torch.bfloat16, enabled=on_cpu and isinstance(optimizer, AMPOptimizer)):
            return super().train_step(sample, model, criterion, optimizer, *args, **kwargs)

    def optimizer_step(self, optimizer: Any, model: Any, update_num: int) -> None:
        """One step of the optimizer, after which a model that asks for it knows of the finished update.

        fairseq tells the number of updates before the next one only, so that the validation after update N
        would see the model as of N-1, and a checkpoint loaded afterwards as of N.

        Args:
            optimizer: fairseq's.
            model: the model, perhaps wrapped.
            update_num: updates finished before.
        """
        super().optimizer_step(optimizer, model=model, update_num=update_num)
        if getattr(model, "counts_finished_updates", False):
            model.set_num_updates(update_num + 1)

    def build_generator(
        self, models: Any, args: Any, seq_gen_cls: Any = None, *rest: Any, **options: Any
    ) -> Any:
        """fairseq's search; where the decoder can solve for a whole prompt at once, one that lets it.

        Args:
            models: the ensemble.
            args: options of the generation.
            seq_gen_cls: the class of the search; None chooses.
            rest: as for `FairseqTask.build_generator`.
            options: likewise.
        """
        if seq_gen_cls is None and is_prefillable(models) and not getattr(args, "print_alignment", False):
            seq_gen_cls = PrefillingGenerator
        return super().build_generator(models, args, seq_gen_cls, *rest, **options)

    def get_interactive_tokens_and_lengths(
        self, lines: list[str], encode_fn: Callable[[str], str]
    ) -> tuple[list[Tensor], list[int]]:
        """The tokens of prompts; a warning says which have words that the dictionary does not have.

        Args:
            lines: the prompts.
            encode_fn: what the tokeniser and the BPE do to one.
        """
        encoder = TextEncoder(self.source_dictionary, encode_fn)
        encoded = [encoder(line) for line in lines]
        for line in encoded:
            line.warn_of_unknown()
        return [line.tokens for line in encoded], [line.tokens.numel() for line in encoded]
