"""A trained model from Python: raw text in, raw text and log-probabilities out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fairseq import hub_utils
from fairseq.dataclass.configs import GenerationConfig
from fairseq.utils import set_torch_seed

from ..errors import OptionError
from .scoring import SentenceScore, TextScorer, perplexity


class LanguageModelHub(hub_utils.GeneratorHubInterface):
    """What `from_pretrained` returns: fairseq's hub interface, and what it lacks for language models."""

    @classmethod
    def load(cls, folder: str, checkpoint: str, data: str, **overrides: Any) -> LanguageModelHub:
        """Load checkpoints.

        Args:
            folder: where they are.
            checkpoint: their names, with colons between those of an ensemble.
            data: folder of the dictionary; relative to `folder` where it begins with a dot.
            overrides: options to change, those of the text among them: `bpe="sentencepiece"`,
                `sentencepiece_model="..."`, `tokenizer="moses"`, `f_eps=1e-4`.
        """
        loaded = hub_utils.from_pretrained(folder, checkpoint, data, **overrides)
        return cls(loaded["args"], loaded["task"], loaded["models"])

    def sample(
        self,
        sentences: Any,
        beam: int = 1,
        verbose: bool = False,
        seed: int | None = None,
        **options: Any,
    ) -> Any:
        """Continue prompts.

        Args:
            sentences: a prompt, or a list of them; an empty one begins from nothing.
            beam: hypotheses of the search.
            verbose: log the scores.
            seed: of the random numbers, for `sampling=True`.
            options: those of fairseq-interactive, such as `sampling=True, sampling_topk=10, temperature=0.8,
                max_len_b=50`. By default up to 200 tokens follow a prompt (`max_len_a=1, max_len_b=200`).
        Returns:
            each prompt with what follows, best hypothesis; a text for a text, a list for a list.
        Raises:
            OptionError: an option that does not exist.
        """
        valid = set(GenerationConfig.__dataclass_fields__)
        unknown = sorted(set(options) - valid)
        if unknown:
            raise OptionError(
                f"sample has no option {', '.join(unknown)}; its options are those of fairseq-interactive: "
                f"{', '.join(sorted(name for name in valid if not name.startswith('_')))}"
            )
        if seed is not None:
            set_torch_seed(seed)
        return super().sample(sentences, beam, verbose, **({"max_len_a": 1} | options))

    def score(self, sentences: Any, eos: bool = True) -> Any:
        """Log-probabilities of sentences.

        Args:
            sentences: a sentence, or a list of them.
            eos: whether the end of a sentence is predicted, and counted, too (fairseq's own `score` leaves
                it out).
        Returns:
            a `SentenceScore`; a list of them for a list.
        """
        if isinstance(sentences, str):
            return self.score([sentences], eos)[0]
        return self._scorer(eos).score(sentences)

    def perplexity(self, sentences: Any, eos: bool = True) -> float:
        """exp of the mean negative log-probability over the tokens of all sentences.

        Args:
            sentences: a sentence, or a list of them; each is scored by itself.
            eos: whether the end of a sentence counts, as in fairseq-eval-lm.
        """
        scores: Iterable[SentenceScore] = self._scorer(eos).score(
            [sentences] if isinstance(sentences, str) else sentences
        )
        scores = list(scores)
        return perplexity(sum(s.log_prob for s in scores), sum(s.tokens.numel() for s in scores))

    def _scorer(self, eos: bool) -> TextScorer:
        most = self.cfg.dataset.max_tokens or 4096
        return TextScorer(self.task, self.models, self.tokenizer, self.bpe, most, eos)
