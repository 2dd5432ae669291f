"""A trained model from Python: raw text in, raw text and log-probabilities out."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from fairseq import hub_utils
from fairseq.dataclass.configs import GenerationConfig
from fairseq.utils import set_torch_seed

from ..errors import OptionError
from ..patches.checkpoints import wanting_language_models
from ..solve_report import SolveReport
from .scoring import TextScorer, perplexity
from .text import TextEncoder, bound_lengths, check_length

logger = logging.getLogger(__name__)


class LanguageModelHub(hub_utils.GeneratorHubInterface):
    """What `from_pretrained` returns: fairseq's hub interface, completed for language models.

    Attributes:
        solves: a report of the solves in the latest call.
    """

    def __init__(self, cfg: Any, task: Any, models: Any) -> None:
        super().__init__(cfg, task, models)
        self.solves = SolveReport()
        self._longest = bound_lengths(self.models)
        self._encode = TextEncoder.of(self.src_dict, self.tokenizer, self.bpe)

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], checkpoint: str, data: str | os.PathLike[str], **overrides: Any
    ) -> LanguageModelHub:
        """Load checkpoints.

        Args:
            folder: the folder of the checkpoints, or the path of one checkpoint.
            checkpoint: their names, with colons between them for an ensemble.
            data: folder of the dictionary; relative to `folder` if it begins with a dot.
            overrides: options to change. They include those of the text, because the checkpoint's own
                tokeniser and BPE are not used: `bpe="sentencepiece"`, `sentencepiece_model="..."`,
                `tokenizer="moses"`, `f_eps=1e-4`.
        Raises:
            OptionError: a folder does not exist, or an option does not exist.
        """
        place, data = os.fspath(folder), os.fspath(data)
        if os.path.isfile(place):
            place, checkpoint = os.path.split(os.path.abspath(place))
        if not os.path.isdir(place):
            raise OptionError(f"there is no folder {place} with checkpoints")
        if not data.startswith(".") and not os.path.isdir(data):
            raise OptionError(
                f"the data folder {data} does not exist; give the one with the dict.txt of the training"
            )
        with wanting_language_models():
            loaded = hub_utils.from_pretrained(place, checkpoint, data, **overrides)
        return cls(loaded["args"], loaded["task"], loaded["models"])

    def encode(self, sentence: str) -> Any:
        """The tokens of a sentence and its end, (n + 1,); a warning says how many words are unknown.

        Raises:
            OptionError: it is no text, or longer than the models can read.
        """
        line = self._encode(sentence)
        check_length(line, self._longest)
        line.warn_of_unknown()
        return line.tokens

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
            sentences: a prompt, or a list of them; an empty prompt means a text from its beginning.
            beam: number of hypotheses in the search.
            verbose: whether to log the scores.
            seed: of the random numbers, for `sampling=True`.
            options: those of fairseq-interactive, such as `sampling=True, sampling_topk=10, temperature=0.8,
                max_len_b=50`. By default up to 200 tokens follow each prompt (`max_len_a=1, max_len_b=200`).
        Returns:
            each prompt with the best continuation: a text for a text, and a list for a list.
        Raises:
            OptionError: an option does not exist, a prompt is no text, or the layer is not finite.
        """
        valid = set(GenerationConfig.__dataclass_fields__)
        unknown = sorted(set(options) - valid)
        if unknown:
            raise OptionError(
                f"sample has no option {', '.join(unknown)}; its options are those of fairseq-interactive: "
                f"{', '.join(sorted(name for name in valid if not name.startswith('_')))}"
            )
        if isinstance(sentences, str):
            return self.sample([sentences], beam, verbose, seed, **options)[0]
        if seed is not None:
            set_torch_seed(seed)
        sentences = list(sentences)
        if not sentences:
            return []
        with self._reporting():
            return super().sample(sentences, beam, verbose, **({"max_len_a": 1} | options))

    def score(self, sentences: Any, eos: bool = True) -> Any:
        """Log-probabilities of sentences.

        Args:
            sentences: a sentence, or a list of them.
            eos: whether the end of each sentence is predicted and counted too
                (fairseq's own `score` leaves it out).
        Returns:
            a `SentenceScore`, or a list of them for a list.
        Raises:
            OptionError: a sentence is no text or too long, or the layer is not finite at its equilibrium.
        """
        if isinstance(sentences, str):
            return self.score([sentences], eos)[0]
        with self._reporting():
            most = self.cfg.dataset.max_tokens or 4096
            return TextScorer(self.task, self.models, self.tokenizer, self.bpe, most, eos).score(sentences)

    def perplexity(self, sentences: Any, eos: bool = True) -> float:
        """exp of the mean negative log-probability over the tokens of all sentences.

        Args:
            sentences: a sentence, or a list of them; each is scored without the others.
            eos: whether the end of each sentence counts, as in fairseq-eval-lm.
        Raises:
            OptionError: as for `score`, or there is no token to score.
        """
        scores = self.score([sentences] if isinstance(sentences, str) else sentences, eos)
        count = sum(score.tokens.numel() for score in scores)
        if count == 0:
            raise OptionError("there is nothing to score: give sentences that have words, or leave eos=True")
        return perplexity(sum(score.log_prob for score in scores), count)

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Record the solves in this context as `solves`, and warn if few positions converged."""
        with SolveReport() as self.solves:
            yield
        self.solves.log()
