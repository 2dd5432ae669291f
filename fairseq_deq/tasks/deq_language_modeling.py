"""`deq_language_modeling`: language modeling on contiguous streams of text, with a memory carried along."""

import inspect
import logging
from dataclasses import dataclass
from typing import Any, Optional

import torch
from fairseq.data import FairseqDataset
from fairseq.distributed import utils as distributed_utils
from fairseq.tasks import FairseqTask, register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig
from torch import Tensor

from ..errors import OptionError
from ..layers.memory import Memory
from ._streams import StreamBatches, StreamIterator, StreamText
from .language_modeling import CarefulLanguageModelingTask

logger = logging.getLogger(__name__)


@dataclass
class DEQLanguageModelingConfig(LanguageModelingConfig):
    """Options of the task: those of `language_modeling`."""


@register_task("deq_language_modeling", dataclass=DEQLanguageModelingConfig)
class DEQLanguageModelingTask(CarefulLanguageModelingTask):
    """Language modeling on contiguous streams.

    Each row of a batch is a stream of text, and the next batch continues it. The memory of a row
    (`--mem-len`) is handed to the model with the next batch, in `net_input["memory"]`. Every pass over a text
    has a memory of its own and starts without one; that of the training pass is saved in checkpoints.

    Training leaves out the end of the text, which does not fill a block of every stream. Validation and
    evaluation predict every token once.
    """

    def __init__(
        self, args: Any, dictionary: Any, output_dictionary: Any = None, targets: Any = None
    ) -> None:
        super().__init__(args, dictionary, output_dictionary, targets)
        self._training: Optional[StreamIterator] = None
        self._memory_of_all: Optional[Memory] = None
        self._width: Optional[int] = None  # channels of the model's states, where it says so

    @classmethod
    def setup_task(cls, args: Any, **kwargs: Any) -> "DEQLanguageModelingTask":
        """The task of these options.

        Raises:
            OptionError: an option cannot work with streams.
        """
        if args.tokens_per_sample < 1:
            raise OptionError(f"--tokens-per-sample must be at least 1, got {args.tokens_per_sample}")
        if str(args.sample_break_mode or "none") != "none":
            _refuse("--sample-break-mode", args.sample_break_mode)
        if args.output_dictionary_size >= 0:
            _refuse("--output-dictionary-size", args.output_dictionary_size)
        for name in (
            "add_bos_token",
            "self_target",
            "past_target",
            "pad_to_fixed_length",
            "pad_to_fixed_bsz",
        ):
            if getattr(args, name, False):
                _refuse("--" + name.replace("_", "-"), "")
        return super().setup_task(args, **kwargs)

    def build_model(self, args: Any, from_checkpoint: bool = False) -> Any:
        """The model of these options.

        Raises:
            OptionError: it does not take a memory.
        """
        model = super().build_model(args, from_checkpoint)
        if "memory" not in inspect.signature(model.decoder.forward).parameters:
            raise OptionError(
                f"--task deq_language_modeling needs a model that takes a memory, and {type(model).__name__} "
                "does not; use --task language_modeling, or an --arch of this package (deq_...)"
            )
        self._width = getattr(getattr(model.decoder, "layer", None), "record_dim", None)
        if getattr(args, "mem_len", 0) == 0:
            logger.info("--mem-len is 0: nothing is carried from one batch of the streams to the next")
        return model

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """Load a text.

        Args:
            split: its name, such as train.
            epoch: chooses among the folders of a text in parts.
            combine: join train, train1, ...
            kwargs: what fairseq's tools pass to tasks that are not about text.
        """
        super().load_dataset(split, epoch=epoch, combine=combine, **kwargs)
        sentences = self.datasets[split].dataset.dataset
        eos, pad = self.dictionary.eos(), self.dictionary.pad()
        self.datasets[split] = StreamText(split, sentences, sentences.sizes, eos, pad)

    def get_batch_iterator(self, dataset: FairseqDataset, *args: Any, **kwargs: Any) -> Any:
        """An iterator over batches; over streams if `dataset` is a text, and as fairseq does for prompts.

        Args:
            dataset: what to read.
            args: as for `FairseqTask.get_batch_iterator`.
            kwargs: likewise.
        Raises:
            OptionError: the options leave no row of a batch.
        """
        if not isinstance(dataset, StreamText):
            return super().get_batch_iterator(dataset, *args, **kwargs)
        signature = inspect.signature(FairseqTask.get_batch_iterator)
        given = signature.bind(self, dataset, *args, **kwargs).arguments
        # Only the trainer's iterator over the training text is told this.
        training = "update_epoch_batch_itr" in given
        rows = self._rows(given.get("max_sentences"), given.get("max_tokens"))
        processes = given.get("num_shards", 1)
        batches = StreamBatches(
            dataset,
            streams=rows * processes,
            first=rows * given.get("shard_id", 0),
            rows=rows,
            block=self.args.tokens_per_sample,
            whole_blocks=training,
        )
        logger.info(
            f"{dataset.name}: {len(dataset):,} tokens in {batches.streams} streams, {len(batches)} batches"
            + (f"; the last {batches.left_out:,} tokens are left out" if batches.left_out else "")
        )
        iterator = StreamIterator(
            batches,
            epoch=given.get("epoch", 1),
            num_workers=given.get("num_workers", 0),
            buffer_size=given.get("data_buffer_size", 0),
        )
        if training:
            self._training = iterator
        return iterator

    def _rows(self, batch_size: Optional[int], max_tokens: Optional[int]) -> int:
        block = self.args.tokens_per_sample
        if max_tokens is not None and max_tokens < block:
            raise OptionError(f"--max-tokens {max_tokens} is less than --tokens-per-sample {block}")
        most = None if max_tokens is None else max_tokens // block
        if batch_size is None and most is None:
            raise OptionError("give the number of streams with --batch-size, or --max-tokens")
        return min(number for number in (batch_size, most) if number is not None)

    def eval_lm_dataloader(
        self,
        dataset: FairseqDataset,
        max_tokens: Optional[int] = 36000,
        batch_size: Optional[int] = None,
        max_positions: Optional[int] = None,
        num_shards: int = 1,
        shard_id: int = 0,
        num_workers: int = 1,
        data_buffer_size: int = 10,
        context_window: int = 0,
    ) -> Any:
        """The batches of fairseq-eval-lm: one stream, unless `batch_size` says otherwise.

        Args:
            dataset: the text.
            max_tokens: bounds the tokens of a batch, but leaves one stream.
            batch_size: number of streams.
            max_positions: unused; the blocks are as long as the user says.
            num_shards: number of processes.
            shard_id: which of them this is.
            num_workers: processes that load the text.
            data_buffer_size: batches loaded ahead.
            context_window: must be 0.
        Raises:
            OptionError: a context window is asked for.
        """
        if context_window > 0:
            raise OptionError(
                "--context-window is for --task language_modeling; with --task deq_language_modeling the "
                "context is in the memory: --model-overrides \"{'mem_len': 480}\""
            )
        most = max(1, (max_tokens or 36000) // self.args.tokens_per_sample)
        if batch_size is not None and batch_size > most:
            bound = f"--max-tokens {max_tokens or 36000}"
            logger.warning(
                f"{most} streams instead of --batch-size {batch_size}: {bound} has no room for more of "
                f"--tokens-per-sample {self.args.tokens_per_sample}"
            )
        return self.get_batch_iterator(
            dataset,
            max_sentences=min(batch_size or 1, most),
            num_shards=num_shards,
            shard_id=shard_id,
            num_workers=num_workers,
            data_buffer_size=data_buffer_size,
        ).next_epoch_itr(shuffle=False)

    # ------------------------------------------------------------------ checkpoints

    def gather_memory(self, group: Any) -> None:
        """Collect the memory of all processes, so that one of them can save it; each must call this.

        Args:
            group: the processes, as fairseq's functions want them.
        """
        memory = self._training.memory if self._training is not None else None
        self._memory_of_all = None
        processes = distributed_utils.get_world_size(group)
        if processes > 1:
            shape = None if memory is None else (tuple(memory.state.shape), tuple(memory.injection.shape))
            shapes: list[Any] = [None] * processes
            # fairseq's all_gather_list needs a GPU
            torch.distributed.all_gather_object(shapes, shape, group=group)
            if any(other != shape for other in shapes):
                # A process that ran out of memory has lost its own.
                logger.warning("the processes remember different lengths: the checkpoint has no memory")
                return
            if memory is not None:
                memory = Memory(_gathered(memory.state, group), _gathered(memory.injection, group))
        self._memory_of_all = memory

    def get_checkpoint_dict(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps of the task: the memory of every stream, and how far it has been read."""
        memory, state = self._memory_of_all, {}
        if memory is not None and self._training is not None:
            state = {
                "memory_state": memory.state.cpu().clone(),  # a clone has only what is seen of a slice
                "memory_injection": memory.injection.cpu().clone(),
                "tokens_read": torch.tensor(self._training.tokens_read),
            }
        return {type(self).__name__: state}

    def set_checkpoint_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with the memory of a checkpoint; fairseq has moved the training iterator there before.

        Args:
            state: what `get_checkpoint_dict` gave under the name of this class.
        """
        training = self._training
        if training is None or training.iterations_in_epoch == 0:
            return  # a new pass starts without a memory
        batches, all_states = training.batches, state["memory_state"]
        if self._width is not None and all_states.shape[-1] != self._width:
            raise OptionError(
                f"the checkpoint's memory has {all_states.shape[-1]} channels, the model {self._width}: go "
                "on with --reset-dataloader, which starts without a memory"
            )
        if all_states.shape[0] != batches.streams or int(state["tokens_read"]) != training.tokens_read:
            logger.warning(
                "the checkpoint's memory is of %d streams after %d tokens each, and training goes on with %d "
                "after %d: starting without a memory (--reset-dataloader starts with the first token)",
                all_states.shape[0],
                int(state["tokens_read"]),
                batches.streams,
                training.tokens_read,
            )
            return
        mine = slice(batches.first, batches.first + batches.rows)
        training.memory = Memory(all_states[mine].clone(), state["memory_injection"][mine].clone())


def _refuse(option: str, value: Any) -> None:
    raise OptionError(
        f"{option} {value}".strip() + " does not work with --task deq_language_modeling, whose batches are "
        "streams of the whole text; leave it out, or use --task language_modeling"
    )


def _gathered(tensor: Tensor, group: Any) -> Tensor:
    """The rows of all processes, in the order of the processes."""
    return torch.cat(distributed_utils.all_gather(tensor.contiguous(), group))
