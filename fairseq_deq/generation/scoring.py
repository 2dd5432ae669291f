"""Log-probabilities of raw text, token by token and word by word."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.sequence_scorer import SequenceScorer
from fairseq.tokenizer import tokenize_line
from torch import Tensor

# Rows of the vocabulary's size that the softmax makes at a time.
_SOFTMAX_BATCH = 1024


@dataclass(frozen=True)
class SentenceScore:
    """How probable a model finds a sentence, given only that it begins.

    Attributes:
        text: the sentence as it was given.
        pieces: what it was cut into, as text; last `</s>` where the end counts.
        tokens: their numbers in the dictionary, (n,).
        log_probs: natural logarithm of each one's probability, (n,).
        words: each word with the sum of its pieces' logarithms.
    """

    text: str
    pieces: list[str]
    tokens: Tensor
    log_probs: Tensor
    words: list[tuple[str, float]]

    @property
    def log_prob(self) -> float:
        """Logarithm of the probability of the whole sentence."""
        return float(self.log_probs.double().sum())

    @property
    def perplexity(self) -> float:
        """exp of the mean negative logarithm over the tokens."""
        return perplexity(self.log_prob, self.tokens.numel())


def perplexity(log_prob: float, count: int) -> float:
    """exp(-log_prob / count), infinite where it is beyond any float, 1 for nothing."""
    try:
        return math.exp(-log_prob / count) if count else 1.0
    except OverflowError:
        return math.inf


class TextScorer:
    """Scores raw text by teacher forcing, many sentences at a time.

    Args:
        task: fairseq's task, for its dictionary.
        models: an ensemble of language models.
        tokenizer, bpe: fairseq's encoders, or None.
        max_tokens: tokens of a batch, padding included; a longer sentence is a batch of its own.
        eos: whether the end of a sentence is predicted, and counted, too.
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
        self.models, self.tokenizer, self.bpe = list(models), tokenizer, bpe
        self.max_tokens, self.eos = max_tokens, eos
        self.dictionary = task.source_dictionary
        add_bos = getattr(getattr(task, "args", None), "add_bos_token", False)
        self.first = self.dictionary.bos() if add_bos else self.dictionary.eos()
        self.scorer = SequenceScorer(task.target_dictionary, softmax_batch=_SOFTMAX_BATCH)

    def score(self, sentences: Iterable[str]) -> list[SentenceScore]:
        """The scores of `sentences`, in their order."""
        texts = list(sentences)
        pieces = [self._pieces(text) for text in texts]
        tokens = [torch.tensor([self.dictionary.index(p) for p in row], dtype=torch.long) for row in pieces]
        log_probs = [torch.zeros(0)] * len(texts)
        for batch in self._batches([row.numel() for row in tokens]):
            for i, scores in zip(batch, self._score([tokens[i] for i in batch])):
                log_probs[i] = scores
        return [
            SentenceScore(text, row, ids, scores, self._words(row, scores.tolist()))
            for text, row, ids, scores in zip(texts, pieces, tokens, log_probs)
        ]

    def _pieces(self, text: str) -> list[str]:
        encoded = text if self.tokenizer is None else self.tokenizer.encode(text)
        encoded = encoded if self.bpe is None else self.bpe.encode(encoded)
        return tokenize_line(encoded) + ([self.dictionary[self.dictionary.eos()]] if self.eos else [])

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

    def _words(self, pieces: list[str], scores: list[float]) -> list[tuple[str, float]]:
        words: list[tuple[list[str], float]] = []
        for piece, score in zip(pieces, scores):
            if words and self._continues(words[-1][0][-1], piece):
                words[-1] = ([*words[-1][0], piece], words[-1][1] + score)
            else:
                words.append(([piece], score))
        return [(self._joined(parts), score) for parts, score in words]

    def _continues(self, before: str, piece: str) -> bool:
        """Whether `piece` goes on with the word that `before` is a part of."""
        if piece == self.dictionary[self.dictionary.eos()]:
            return False
        if hasattr(self.bpe, "is_beginning_of_word"):
            return not self.bpe.is_beginning_of_word(piece)
        symbol = getattr(self.bpe, "bpe_symbol", "").strip()
        return bool(symbol) and before.endswith(symbol)

    def _joined(self, parts: list[str]) -> str:
        return " ".join(parts) if self.bpe is None else self.bpe.decode(" ".join(parts)) or " ".join(parts)
