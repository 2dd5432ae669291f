"""All that is measured of one checkpoint, in stages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...solvers import Status
from ..evaluation import Evaluation, Word, budgets_up_to, evaluate, hardest
from ..probe import replaced
from .checks import Invariances, Starts, check_invariances, random_starts
from .gradients import Gradients, measure_gradients, output_gradient
from .penalty import PenaltyTrial, try_penalty
from .solves import Curve, TimeInside, backward_curves, backward_solve, forward_curves, time_inside
from .spectra import LARGE_RADIUS, Spectra, measure_spectra
from .subject import Subject

# Options are tried out on so many tokens, and gradients and solvers compared at so many rows.
_TRIAL_TOKENS, _FEW_ROWS = 1536, 4
_LIKELIEST, _WORDS, _OCCURRENCES = 5, 12, 3
# A backward solve that fails is tried again with so many times the budget.
_LONGER = 4
_TOLERANCES = (0.1, 3.0, 10.0)

STAGES = (
    "text", "budgets", "tolerances", "layer", "forward solvers", "backward solvers", "time inside f",
    "Jacobian", "gradients", "random starts", "causality",
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """What some options make of the first blocks of the text.

    Attributes:
        budget: evaluations of f at most.
        tolerance: of the solve.
        perplexity, loss: of the next token, the loss in nats.
        evaluations: until a position stops moving, a mean.
        converged: share of positions.
        residual: mean relative residual.
    """

    budget: int
    tolerance: float
    perplexity: float
    loss: float
    evaluations: float
    converged: float
    residual: float


@dataclass(frozen=True)
class Measured:
    """All that was measured of one checkpoint.

    Attributes:
        facts: what the model is, by name.
        solver: options of its solves, by name.
        budget, tolerance: of its forward solves, and `backward_budget`, `backward_tolerance`.
        shape: rows and tokens of the blocks, and their number.
        passed: the pass over the text with the model's own options.
        bytes: of the text that was scored.
        by_position: mean evaluations at each position of a block, and its mean residual.
        caps: share of the blocks whose solve ran into the budget.
        budgets, tolerances: trials; that of the model itself is `own`.
        forward, backward: residual against work, a curve a solver, the model's own first.
        backward_converged: share of positions of the backward solve that converged.
        backward_longer: the same with four times the budget.
        backward_residuals, backward_evaluations: of its positions.
        penalty: what a Jacobian penalty would do, where the Jacobian is large or solves fail.
        inside, spectra, gradients, starts, invariances: as their types say; None where f is not finite.
        hardest, easiest: types of the dictionary, by their mean evaluations.
        frequency: count in the text and mean evaluations, for each type.
    """

    facts: dict[str, str]
    solver: dict[str, str]
    budget: int
    tolerance: float
    backward_budget: int
    backward_tolerance: float
    scope: str
    shape: tuple[int, int, int]
    passed: Evaluation
    bytes: int
    by_position: tuple[list[float], list[float]]
    caps: float
    budgets: list[Trial]
    tolerances: list[Trial]
    own: Trial
    hardest: list[Word]
    easiest: list[Word]
    frequency: list[tuple[int, float]]
    forward: list[Curve]
    backward: list[Curve]
    backward_converged: float
    backward_longer: float
    backward_residuals: list[float]
    backward_evaluations: list[int]
    inside: TimeInside | None
    spectra: Spectra | None
    penalty: PenaltyTrial | None
    gradients: Gradients | None
    starts: Starts | None
    invariances: Invariances | None

    @property
    def bits_per_byte(self) -> float:
        return float(self.passed.loss.double().sum()) / math.log(2) / max(self.bytes, 1)

    def share(self, status: Status) -> float:
        """Share of the positions of the text that ended in `status`."""
        return float(self.passed.status.eq(int(status)).float().mean())


def measure(subject: Subject, tell: Callable[[str], None] = lambda stage: None) -> Measured:
    """Measure everything.

    Args:
        subject: the model and the text.
        tell: is told the name of each of `STAGES`, and of what else there is to try, as it begins.
    Raises:
        OptionError: the text has no batch.
    """
    decoder, pad = subject.decoder, subject.dictionary.pad()
    budget = decoder.solver.max_evals
    tell("text")
    passed = evaluate(subject.model, subject.batches(), budget, pad, _LIKELIEST, refuse=False)
    rows, length, blocks = subject.text.rows, subject.text.block, len(subject.text)
    blocks_tried = max(1, _TRIAL_TOKENS // (rows * length))

    def trial(budget: int, factor: float = 1.0) -> Trial:
        solver = replace(
            decoder.solver, rtol=min(decoder.solver.rtol * factor, 0.9), atol=decoder.solver.atol * factor
        )
        with replaced(decoder, solver=solver):
            found = evaluate(subject.model, subject.batches(blocks_tried), budget, pad, refuse=False)
        line = found.summary()
        return Trial(
            *(budget, solver.rtol or solver.atol, line["perplexity"], float(found.loss.mean())),
            *(line["evaluations"], line["converged"], line["residual"]),
        )

    tell("budgets")
    allowed = [*budgets_up_to(budget), *(budget * factor for factor in _beyond(budget))]
    budgets = [trial(b) for b in allowed]
    own = next(t for t in budgets if t.budget == budget)
    tell("tolerances")
    tolerances = sorted(
        [own, *(trial(budget * (2 if factor < 1 else 1), factor) for factor in _TOLERANCES)],
        key=lambda t: t.tolerance,
    )
    words = hardest(passed, subject.dictionary, len(subject.dictionary), _OCCURRENCES)
    found: dict[str, Any] = dict.fromkeys(
        ("inside", "spectra", "penalty", "gradients", "starts", "invariances")
    )
    found |= {"forward": [], "backward": [], "backward_converged": math.nan, "backward_longer": math.nan}
    found |= {"backward_residuals": [], "backward_evaluations": []}
    if not bool(passed.status.eq(int(Status.NON_FINITE)).any()):
        found |= _of_the_layer(subject, budget, tell)
    return Measured(
        facts=_facts(subject),
        solver=_solver_options(subject),
        budget=budget,
        tolerance=decoder.solver.rtol or decoder.solver.atol,
        backward_budget=decoder.gradient.solver.max_evals,
        backward_tolerance=decoder.gradient.solver.rtol,
        scope=decoder.solver.scope,
        shape=(rows, length, blocks),
        passed=passed,
        bytes=_bytes(subject),
        by_position=_by_position(passed, rows, length),
        caps=_caps(passed, rows, length),
        budgets=budgets,
        tolerances=tolerances,
        own=own,
        hardest=words[:_WORDS],
        easiest=words[::-1][:_WORDS],
        frequency=[(word.count, word.evaluations) for word in words],
        **found,
    )


def _beyond(budget: int) -> list[int]:
    """Factors of the budget to try beyond it; a small budget is left far behind."""
    return [2, 4] if budget >= 16 else [2, 4, 8, 16]


def _of_the_layer(subject: Subject, budget: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """What is measured at one block of text."""
    tell("layer")
    layer = subject.layer()
    few = layer.rows(min(_FEW_ROWS, subject.text.rows), subject)
    grad = output_gradient(subject, few)
    tell("forward solvers")
    found: dict[str, Any] = {"forward": forward_curves(few, max(budget, 40))}
    tell("backward solvers")
    options = subject.decoder.gradient.solver
    solved = backward_solve(few, grad, options)
    share = found["backward_converged"] = found["backward_longer"] = float(solved.converged.float().mean())
    if share < 1:
        longer = replace(options, max_evals=_LONGER * options.max_evals)
        found["backward_longer"] = float(backward_solve(few, grad, longer).converged.float().mean())
    found["backward_residuals"] = torch.nan_to_num(solved.residual.flatten(), posinf=1e6).tolist()
    found["backward_evaluations"] = solved.lane_nfe.flatten().tolist()
    found["backward"] = backward_curves(subject, few, grad, max(options.max_evals, 40))
    tell("time inside f")
    found["inside"] = time_inside(layer)
    tell("Jacobian")
    found["spectra"] = spectra = measure_spectra(layer)
    if spectra.largest[0] > LARGE_RADIUS:
        tell("penalty")
        found["penalty"] = try_penalty(subject, few)
    tell("gradients")
    found["gradients"] = measure_gradients(subject, few)
    tell("random starts")
    found["starts"] = random_starts(few)
    tell("causality")
    found["invariances"] = check_invariances(subject, few)
    return found


def _facts(subject: Subject) -> dict[str, str]:
    model, decoder = subject.model, subject.decoder
    unique = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in decoder.layer.parameters())
    return {
        "checkpoint": subject.path,
        "architecture": str(subject.options.get("_name", type(model).__name__)),
        "layer": f"{type(decoder.layer).__name__}, state of {decoder.layer.state_dim} channels a position",
        "updates": f"{subject.updates:,}",
        "parameters": f"{unique:,}, of which the layer has {layer:,}",
        "layer parameters": str(layer),
        "vocabulary": f"{len(subject.dictionary):,}",
    }


def _solver_options(subject: Subject) -> dict[str, str]:
    names = (
        "f_solver f_thres f_eps stop_mode f_memory f_damping b_solver b_thres b_eps b_memory gradient "
        "solver_scope preconditioner_rank learned_start jac_loss_weight keep_converged mem_len subseq_len"
    )
    options = subject.options
    return {f"--{n.replace('_', '-')}": str(options[n]) for n in names.split() if n in options}


def _bytes(subject: Subject) -> int:
    """Bytes of the text that is scored, tokens joined as words of their line."""
    tokens = torch.cat([subject.text[k]["target"].flatten() for k in range(len(subject.text))])
    pieces = [subject.dictionary[t] for t in tokens.tolist() if t != subject.dictionary.pad()]
    if any(piece.startswith("▁") for piece in pieces):  # sentencepiece's mark of a space
        return len("".join(pieces).replace("▁", " ").encode())
    return len(" ".join(pieces).replace("@@ ", "").encode())


def _by_position(passed: Evaluation, rows: int, length: int) -> tuple[list[float], list[float]]:
    whole = len(passed.loss) // (rows * length) * rows * length
    if whole == 0:
        return [], []
    evaluations = passed.evaluations[:whole].double().view(-1, length).mean(0)
    residual = torch.nan_to_num(passed.residual[:whole].double(), posinf=1.0).view(-1, length).mean(0)
    return evaluations.tolist(), residual.tolist()


def _caps(passed: Evaluation, rows: int, length: int) -> float:
    """Share of the blocks that have a position which did not converge, so that they went on to the cap."""
    failed: Tensor = (~passed.converged).float()
    parts = failed.split(rows * length)
    return sum(float(part.max()) for part in parts) / len(parts)
