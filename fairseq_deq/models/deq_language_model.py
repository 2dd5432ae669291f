"""What the models of both families share."""

from __future__ import annotations

from typing import Any

from fairseq.models import FairseqLanguageModel
from typing_extensions import Self

from ..errors import OptionError
from ..generation.hub import LanguageModelHub


class DEQLanguageModel(FairseqLanguageModel):
    """A language model of one layer at its equilibrium."""

    # fairseq announces the number of finished updates one too late for validation; our tasks do it in time.
    counts_finished_updates = True

    #: Positions that an input may have; None: any number, since positions are relative.
    most_positions: int | None = None

    @classmethod
    def of(cls, decoder: Any, cfg: Any, task: Any) -> Self:
        """The model of a decoder, for a task that it can serve.

        Args:
            decoder: the decoder.
            cfg: options of the model.
            task: fairseq's task.
        Raises:
            OptionError: the task asks for what the model would ignore.
        """
        source, target = task.source_dictionary, task.target_dictionary
        if target is not None and len(target) != len(source):
            raise OptionError(
                f"--output-dictionary-size {len(target)} does not work with these models, which "
                "predict every "
                f"word that they read ({len(source)}); leave it out"
            )
        targets = [name for name in getattr(task, "targets", None) or () if name != "future"]
        if targets:
            raise OptionError(
                f"--{targets[0]}-target does not work with these models, which predict the next word; "
                "leave it "
                "out"
            )
        model = cls(decoder)
        asked = getattr(
            getattr(task, "cfg", None) or getattr(task, "args", None), "max_target_positions", None
        )
        model.most_positions = getattr(cfg, "max_target_positions", None) if asked is None else asked
        return model

    def prepare_for_inference_(self, cfg: Any) -> None:
        """Make the model ready to evaluate or generate.

        Args:
            cfg: fairseq's configuration.
        Raises:
            OptionError: dropout is to stay on, which is held through a whole solve in training alone.
        """
        if getattr(cfg.get("generation"), "retain_dropout", False):
            raise OptionError("--retain-dropout does not work with these models; leave it out")
        super().prepare_for_inference_(cfg)

    def max_positions(self) -> int:
        """Positions that an input may have: `--max-target-positions`, where it is given."""
        most: int = super().max_positions()
        return most if self.most_positions is None else min(most, self.most_positions)

    def max_decoder_positions(self) -> int:
        """The same, for generation."""
        return self.max_positions()

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        checkpoint_file: str = "checkpoint_best.pt",
        data_name_or_path: str = ".",
        **overrides: Any,
    ) -> LanguageModelHub:
        """Load a trained model for use from Python.

        Args:
            model_name_or_path: folder of the checkpoints.
            checkpoint_file: name of the checkpoint; several, with colons between, make an ensemble.
            data_name_or_path: folder of the dictionary; relative to that of the checkpoints where it begins
                with a dot.
            overrides: options to change, those of the text among them: `bpe="sentencepiece"`,
                `sentencepiece_model="..."`, `tokenizer="moses"`, `f_eps=1e-4`.
        Returns:
            the interface, with `sample`, `score` and `perplexity`.
        Raises:
            OptionError: there is no such checkpoint, or no such option.
        """
        return LanguageModelHub.load(model_name_or_path, checkpoint_file, data_name_or_path, **overrides)
