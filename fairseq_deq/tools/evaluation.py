"""A pass over a text that keeps what the solve and the loss of every token came to."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from fairseq import utils
from torch import Tensor

from ..errors import OptionError
from ..generation.scoring import perplexity
from ..solve_report import SolveReport


@dataclasses.dataclass
class Evaluation:
    """One pass over the text.

    Attributes:
        budget: evaluations of f at most.
        source: the token that was read at each position, (n,).
        loss: cross-entropy of the next token, in nats, (n,).
        residual: relative residual reached, (n,).
        evaluations: evaluations of f until the position stopped moving, (n,).
        converged: whether it reached the tolerance, (n,).
        status: how its solve ended, a `Status`, (n,).
        likeliest: the most probable next tokens, best first, (n, k); k = 0 where they were not asked for.
        log_probs: their logarithms, (n, k).
    """

    budget: int
    source: Tensor
    loss: Tensor
    residual: Tensor
    evaluations: Tensor
    converged: Tensor
    status: Tensor
    likeliest: Tensor
    log_probs: Tensor

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return perplexity(-float(self.loss.double().sum()), self.loss.numel())

    def summary(self) -> dict[str, float]:
        """The numbers of one line of the table."""
        return {
            "budget": self.budget,
            "perplexity": self.perplexity,
            "residual": float(torch.nan_to_num(self.residual, posinf=1.0).mean()),
            "converged": float(self.converged.float().mean()),
            "evaluations": float(self.evaluations.float().mean()),
        }


@dataclasses.dataclass(frozen=True)
class Word:
    """A type of the dictionary, with means over the positions where it was read."""

    word: str
    count: int
    evaluations: float
    residual: float
    loss: float


def budgets_up_to(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return [2**k for k in range(most.bit_length()) if 2**k < most] + [most]


@torch.no_grad()
def evaluate(
    model: Any,
    batches: Iterable[dict[str, Any]],
    budget: int,
    pad: int,
    likeliest: int = 0,
    refuse: bool = True,
) -> Evaluation:
    """Score every token with at most `budget` evaluations of f a solve.

    Args:
        model: a DEQ language model in evaluation mode.
        batches: fairseq's batches; a memory in them is carried along.
        budget: evaluations of f at most.
        pad: index of padding, which is not scored.
        likeliest: how many of the most probable next tokens to keep for each position.
        refuse: whether a layer that is not finite is an error.
    Raises:
        OptionError: there is no batch, or the layer is not finite.
    """
    decoder = model.decoder
    before = decoder.solver
    decoder.solver = dataclasses.replace(before, max_evals=budget)
    parts: list[tuple[Tensor, ...]] = []
    try:
        for sample in batches:
            if "net_input" not in sample:
                continue
            sample = utils.move_to_cuda(sample) if next(model.parameters()).is_cuda else sample
            with SolveReport() if refuse else contextlib.nullcontext():
                output = model(**sample["net_input"])
            log_probs = model.get_normalized_probs(output, log_probs=True, sample=sample)
            target = sample["target"]
            loss = -log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1)
            solves = [equilibrium.result for equilibrium in output[1]["equilibria"]]
            lanes = [
                torch.cat([_by_position(getattr(solve, name), solve.state) for solve in solves], 1)
                for name in ("residual", "lane_nfe", "converged", "status")
            ]
            real = target != pad
            best = log_probs.topk(likeliest, -1)
            rows = (sample["net_input"]["src_tokens"], loss, *lanes, best.indices, best.values)
            parts.append(tuple(row[real].cpu() for row in rows))
    finally:
        decoder.solver = before
    if not parts:
        raise OptionError("the text has no batch to evaluate")
    return Evaluation(budget, *(torch.cat(column) for column in zip(*parts, strict=True)))


def _by_position(lanes: Tensor, state: Tensor) -> Tensor:
    """(B, T): each position of state (B, T, C) has the value of the lane it is in, one position or more."""
    return lanes if lanes.dim() == 2 else lanes.view(-1, 1).expand(state.shape[:2])


def hardest(evaluation: Evaluation, dictionary: Any, count: int, at_least: int) -> list[Word]:
    """The types at which the solve took the most evaluations on average, hardest first.

    Args:
        evaluation: a pass over the text.
        dictionary: fairseq's.
        count: types to return at most.
        at_least: occurrences below which a type is left out.
    """
    occurrences = torch.bincount(evaluation.source, minlength=len(dictionary))

    def mean(values: Tensor) -> Tensor:
        sums = torch.bincount(evaluation.source, values.double(), minlength=len(dictionary))
        return sums / occurrences.clamp(min=1)

    evaluations, residual, loss = map(
        mean, (evaluation.evaluations, torch.nan_to_num(evaluation.residual, posinf=1.0), evaluation.loss)
    )
    ranked = torch.where(occurrences >= at_least, evaluations, -1.0).argsort(descending=True, stable=True)
    return [
        Word(dictionary[i], int(occurrences[i]), float(evaluations[i]), float(residual[i]), float(loss[i]))
        for i in ranked[:count].tolist()
        if occurrences[i] >= at_least
    ]


def require_equilibrium(model: Any, path: str) -> None:
    """Refuse a model that solves for no equilibrium.

    Args:
        model: a language model in evaluation mode.
        path: where its checkpoint is.
    Raises:
        OptionError: it is another model, or a stack of layers.
    """
    decoder = model.decoder
    if not hasattr(decoder, "solver"):
        raise OptionError(f"{path} is a {type(model).__name__}, which has no solver")
    if decoder.gradient.mode == "unroll" or decoder.pretraining:
        raise OptionError(
            f"{path} is a stack of layers, not an equilibrium; to solve for its equilibrium "
            "all the same give --model-overrides \"{'pretrain_steps': 0, 'gradient': 'ift'}\""
        )
