"""What the models of both families share."""

from __future__ import annotations

from typing import Any

from fairseq.models import FairseqLanguageModel

from ..generation.hub import LanguageModelHub


class DEQLanguageModel(FairseqLanguageModel):
    """A language model of one layer at its equilibrium."""

    # fairseq announces the number of finished updates one too late for validation; see patches.
    counts_finished_updates = True

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
