"""Log-probabilities of raw text, per token and per word."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.sequence_scorer import SequenceScorer
from torch import Tensor, nn

from .text import Line, TextEncoder, bound_lengths, check_length

# The number of positions for which the softmax makes logits at a time.
_SOFTMAX_BATCH = 1024


@dataclass(frozen=True)
class SentenceScore:
    """The probability that a model gives to a sentence.

    Attributes:
        text: the sentence as it was given.
        pieces: the pieces it was split into, as text; the last is `</s>` if the end counts.
        tokens: their numbers in the dictionary, (n,).
        log_probs: natural logarithm of the probability of each token given those before it, (n,).
        words: each word with the sum of the log-probabilities of its pieces.
        is_unknown: for each piece, whether it is not in the dictionary and was scored as `<unk>`.
        pieces_of_words: number of pieces of each word.
    """

    text: str
    pieces: list[str]
    tokens: Tensor
    log_probs: Tensor
    words: list[tuple[str, float]]
    is_unknown: list[bool]
    pieces_of_words: list[int]

    @property
    def unknown(self) -> list[str]:
        """The pieces that are not in the dictionary."""
        return [piece for piece, unknown in zip(self.pieces, self.is_unknown) if unknown]

    @property
    def unknown_in_words(self) -> list[int]:
        """Number of unknown pieces in each word."""
        counts, i = [], 0
        for count in self.pieces_of_words:
            counts.append(sum(self.is_unknown[i : i + count]))
            i += count
        return counts

    @property
    def log_prob(self) -> float:
        """Natural logarithm of the probability of the whole sentence."""
        return float(self.log_probs.double().sum())

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability over the tokens."""
        return perplexity(self.log_prob, self.tokens.numel())


def perplexity(log_prob: float, count: int) -> float:
    """exp(-log_prob / count); infinite if it exceeds the largest float, NaN if count is 0."""
    try:
        return math.exp(-log_prob / count) if count else math.nan
    except OverflowError:
        return math.inf


class TextScorer:
    """Scores raw text by teacher forcing, many sentences at a time.

    Args:
        task: fairseq's task, for its dictionary.
        models: an ensemble of language models.
        tokenizer, bpe: fairseq's encoders, or None.
        max_tokens: tokens of a batch, padding included; a longer sentence is a batch of its own.
        eos: whether the end of each sentence is predicted and counted too.
    """

    def __init__(
        self,
        task: Any,
        models: Sequence[Any],
        tokenizer: Any,
        bpe: Any,
        max_tokens: int = 4096,
        eos: bool = True,
    ) -> None:
        self.bpe, self.max_tokens, self.eos = bpe, max_tokens, eos
        self.dictionary = task.source_dictionary
        self.encode = TextEncoder.of(self.dictionary, tokenizer, bpe)
        self.longest = bound_lengths(models)
        self.models = [_ByParts(model) if hasattr(model.decoder, "prefill") else model for model in models]
        add_bos = getattr(getattr(task, "args", None), "add_bos_token", False)
        self.first = self.dictionary.bos() if add_bos else self.dictionary.eos()
        self.scorer = SequenceScorer(task.target_dictionary, softmax_batch=_SOFTMAX_BATCH)

    def score(self, sentences: Iterable[str]) -> list[SentenceScore]:
        """The scores of sentences, in their order; a warning says which have unknown words.

        Args:
            sentences: the texts.
        Raises:
            OptionError: one is no text, or is longer than the models can read.
        """
        lines = [self.encode(text, self.eos) for text in sentences]
        for line in lines:
            check_length(line, self.longest)
            line.warn_of_unknown(self.eos)
        log_probs = [torch.zeros(0)] * len(lines)
        for batch in self._batches([line.tokens.numel() for line in lines]):
            for i, scores in zip(batch, self._score([lines[i].tokens for i in batch])):
                log_probs[i] = scores
        return [self._sentence(line, scores) for line, scores in zip(lines, log_probs)]

    def _sentence(self, line: Line, scores: Tensor) -> SentenceScore:
        words = self._words(line.pieces, scores.tolist())
        joined = [(self._joined(parts), score) for parts, score in words]
        counts = [len(parts) for parts, _ in words]
        return SentenceScore(line.text, line.pieces, line.tokens, scores, joined, line.is_unknown, counts)

    def _batches(self, lengths: list[int]) -> Iterable[list[int]]:
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lengths.__getitem__):
            if lengths[i] == 0:
                continue
            if batch and lengths[i] * (len(batch) + 1) > self.max_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    @torch.no_grad()
    def _score(self, rows: list[Tensor]) -> list[Tensor]:
        device = next(self.models[0].parameters()).device
        pad = self.dictionary.pad()
        target = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        source = torch.cat([torch.full((len(rows), 1), self.first), target[:, :-1]], 1)
        lengths = torch.tensor([row.numel() for row in rows])
        sample = {
            "id": torch.arange(len(rows)),
            "net_input": {"src_tokens": source.to(device), "src_lengths": lengths.to(device)},
            "target": target.to(device),
        }
        hypotheses = self.scorer.generate(self.models, sample)
        return [
            hypothesis[0]["positional_scores"].float().cpu()[: row.numel()]
            for row, hypothesis in zip(rows, hypotheses)
        ]

    def _words(self, pieces: list[str], scores: list[float]) -> list[tuple[list[str], float]]:
        words: list[tuple[list[str], float]] = []
        for piece, score in zip(pieces, scores):
            if words and self._continues(words[-1][0][-1], piece):
                words[-1] = ([*words[-1][0], piece], words[-1][1] + score)
            else:
                words.append(([piece], score))
        return words

    def _continues(self, before: str, piece: str) -> bool:
        """Whether `piece` continues the word that `before` is a part of."""
        if piece == self.dictionary[self.dictionary.eos()]:
            return False
        if hasattr(self.bpe, "is_beginning_of_word"):
            return not self.bpe.is_beginning_of_word(piece)
        symbol = getattr(self.bpe, "bpe_symbol", "").strip()
        return bool(symbol) and before.endswith(symbol)

    def _joined(self, parts: list[str]) -> str:
        return " ".join(parts) if self.bpe is None else self.bpe.decode(" ".join(parts)) or " ".join(parts)


class _ByParts(nn.Module):
    """A model that gives fairseq's scorer features, so that the scorer makes logits of a part at a time."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, src_tokens: Tensor, src_lengths: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Features (B, T, C), and the decoder's extra output."""
        return self.model.decoder(src_tokens, features_only=True)

    def get_normalized_probs(self, output: tuple[Tensor, Any], log_probs: bool, sample: Any) -> Tensor:
        """Probabilities (B, T, V), or their logarithms, from features (B, T, C)."""
        features, extra = output
        logits = self.model.decoder.output_layer(features)
        return self.model.get_normalized_probs((logits, extra), log_probs=log_probs, sample=sample)
