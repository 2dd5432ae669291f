"""fairseq's `language_modeling`, under the same name, with the corrections of this package."""

from __future__ import annotations

import inspect
import logging
import os
from typing import Any

from fairseq.tasks import language_modeling as fairseqs
from fairseq.tasks.language_modeling import LanguageModelingTask

from ..errors import OptionError
from ..patches.dictionaries import after_checking_dictionary, with_dictionary
from ._careful import CarefulTask

logger = logging.getLogger(__name__)


class CarefulLanguageModelingTask(CarefulTask, LanguageModelingTask):
    """Language modeling on independent blocks of text.

    `--task language_modeling` is this class wherever the package is registered: a row of the table of patches
    puts it in the place of fairseq's in fairseq's own list of tasks. Options, data and checkpoints are those
    of fairseq's task, for its models as for those of this package.
    """

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """Load a text.

        Args:
            split: its name, such as train.
            epoch: chooses among the folders of a text in parts.
            combine: join train, train1, ...
            kwargs: what fairseq's tools pass to tasks that are not about text.
        Raises:
            OptionError: the data folder has no such text; the sentence names those that it has.
        """
        try:
            super().load_dataset(split, epoch=epoch, combine=combine, **kwargs)
        except FileNotFoundError as error:
            if "Dataset not found" not in str(error):
                raise
            data = self.args.data
            names = (name for name in os.listdir(data.split(os.pathsep)[0]) if name.endswith(".idx"))
            there = ", ".join(sorted(name.split(".")[0] for name in names)) or "none"
            kind = self.args.dataset_impl
            kind = f" of --dataset-impl {kind}" if kind and split in there.split(", ") else ""
            raise OptionError(
                f"the data folder {data} has no text {split!r}{kind}; it has: {there}"
            ) from None

    def eval_lm_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of fairseq-eval-lm, in order where `--context-window` needs that.

        The context of a block is what fairseq's collater saw last. Several data loading workers or shards
        each see only every other block, so that the context would be from further back.

        Args:
            args: as for `LanguageModelingTask.eval_lm_dataloader`.
            kwargs: likewise.
        Raises:
            OptionError: a context window over several shards.
        """
        call = inspect.signature(super().eval_lm_dataloader).bind(*args, **kwargs)
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
        return super().eval_lm_dataloader(*call.args, **call.kwargs)

    #: A checkpoint says which dictionary it was trained with, and one with another is refused.
    state_dict = with_dictionary(LanguageModelingTask.state_dict)
    load_state_dict = after_checking_dictionary(LanguageModelingTask.load_state_dict)


def in_place_of_fairseqs(registry: dict[str, Any]) -> dict[str, Any]:
    """fairseq's list of tasks with this `language_modeling` in it.

    Args:
        registry: name -> task; changed in place, since fairseq's modules share it.
    """
    if registry.get("language_modeling") is fairseqs.LanguageModelingTask:
        registry["language_modeling"] = CarefulLanguageModelingTask
    return registry
