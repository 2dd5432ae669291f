"""Verdicts on the measurements, in sentences: what is wrong, what would mend it, what would be cheaper."""

from __future__ import annotations

from collections.abc import Iterator

from ...solve_report import ENOUGH
from ...solvers import Status
from .layer_verdicts import judge_gradient, judge_invariances, judge_radius, judge_starts
from .measure import Measured, Trial
from .verdict import LEVELS, Verdict, percent

# Below this share of converged positions the numbers have little to do with the equilibrium.
_FAR_TOO_FEW = 0.9
# Losses that differ by less than this share are the same; by more than the second, they are not.
_SAME_LOSS, _OTHER_LOSS = 1e-3, 1e-2
# A change that saves less than this share of the evaluations is not worth a word.
_WORTH_SAYING = 0.1


def judge(m: Measured) -> list[Verdict]:
    """All verdicts, worst first."""
    found = [*_finite(m), *_convergence(m), *_budget(m), *_tolerance(m), *_solvers(m)]
    found += [*_backward(m), *judge_gradient(m), *judge_radius(m), *judge_starts(m), *judge_invariances(m)]
    return sorted(found, key=lambda verdict: LEVELS.index(verdict.level))


def _finite(m: Measured) -> Iterator[Verdict]:
    share = m.share(Status.NON_FINITE)
    if share:
        yield Verdict(
            "bad",
            "The layer is not finite",
            f"f returns NaN or infinity at {percent(share)} of the positions, so they have no equilibrium "
            "and no score, and the sections on the layer are left out. Look for NaN or huge numbers in the "
            "weights, or use an earlier checkpoint.",
            "convergence",
        )


def _convergence(m: Measured) -> Iterator[Verdict]:
    share = float(m.passed.converged.float().mean())
    if share >= ENOUGH:
        rest = ""
        if share < 1:
            rest = (
                f" Because of the other {percent(1 - share)}, {percent(m.caps)} of the blocks use all "
                f"{m.budget} evaluations."
            )
        yield Verdict(
            "good",
            "Solves converge",
            f"{percent(share)} of {len(m.passed.loss):,} positions reach the tolerance {m.tolerance:g} "
            f"within {m.budget} evaluations, on average in {_mean_evaluations(m):.1f}.{rest}",
            "convergence",
        )
        return
    yield Verdict(
        "bad" if share < _FAR_TOO_FEW else "look",
        "Solves do not converge" if share < _FAR_TOO_FEW else "Some solves do not converge",
        f"Only {percent(share)} of {len(m.passed.loss):,} positions reach the tolerance {m.tolerance:g} "
        f"within {m.budget} evaluations (mean residual {m.passed.summary()['residual']:.1e}), and "
        f"{percent(m.caps)} of the blocks use up the budget. {_what_budget_buys(m)}",
        "convergence",
    )


def _what_budget_buys(m: Measured) -> str:
    """The smallest budget tried with which enough positions converge, or that none is enough."""
    larger = [t for t in m.budgets if t.budget > m.budget]
    for t in larger:
        if t.converged >= ENOUGH:
            return (
                f"The budget is too small: on the first blocks, with --f-thres {t.budget}, "
                f"{percent(t.converged)} converge instead of {percent(m.own.converged)}, in "
                f"{t.evaluations:.1f} evaluations per position, and the perplexity changes from "
                f"{m.own.perplexity:.2f} to {t.perplexity:.2f}."
            )
    last = larger[-1]
    kinds = {s: m.share(s) for s in (Status.DIVERGED, Status.STALLED, Status.MAX_ITER, Status.NON_FINITE)}
    worst = max(kinds, key=lambda s: kinds[s])
    words = {
        Status.DIVERGED: "the residual grew far beyond its start",
        Status.STALLED: "the residual stopped falling",
        Status.MAX_ITER: "the residual was still falling",
        Status.NON_FINITE: "f was not finite",
    }
    return (
        f"A larger budget does not help: with --f-thres {last.budget} {percent(last.converged)} converge. At "
        f"{percent(kinds[worst])} of the positions {words[worst]}. The layer expands too much: train with "
        "--jac-loss-weight or a lower --lr, or use an earlier checkpoint."
    )


def _budget(m: Measured) -> Iterator[Verdict]:
    last = m.budgets[-1]
    change = _change(last, m.own)
    if last.converged < ENOUGH:
        return  # there is no equilibrium to compare with, and that has been said
    if change > _OTHER_LOSS:
        better = "falls" if last.loss < m.own.loss else "rises"
        yield Verdict(
            "look",
            "The score is not that of the equilibrium",
            f"With {last.budget} evaluations allowed instead of {m.budget} the perplexity {better} from "
            f"{m.own.perplexity:.2f} to {last.perplexity:.2f}.",
            "equilibrium",
        )
        return
    if m.own.converged >= ENOUGH:
        enough = next(t for t in m.budgets if _change(t, last) <= _SAME_LOSS or t is last)
        less = (
            f" {enough.budget} evaluations already give the same loss, to 0.1%."
            if enough.evaluations < (1 - _WORTH_SAYING) * m.own.evaluations
            else ""
        )
        yield Verdict(
            "good",
            "More evaluations change nothing",
            f"With {last.budget} evaluations allowed instead of {m.budget} the perplexity of the first "
            f"blocks is {last.perplexity:.2f} instead of {m.own.perplexity:.2f}.{less}",
            "equilibrium",
        )


def _tolerance(m: Measured) -> Iterator[Verdict]:
    if m.own.converged < ENOUGH:
        return
    looser = [
        t
        for t in m.tolerances
        if t.tolerance > m.own.tolerance
        and _change(t, m.own) <= _SAME_LOSS
        and t.evaluations <= (1 - _WORTH_SAYING) * m.own.evaluations
    ]
    if looser:
        t = looser[-1]
        yield Verdict(
            "hint",
            "A looser tolerance is enough for evaluation",
            f"At --f-eps {t.tolerance:g} the loss is the same to 0.1% ({t.loss:.4f}, {m.own.loss:.4f} now) "
            f"with {percent(1 - t.evaluations / m.own.evaluations)} fewer evaluations. Before you train with "
            "it, look at what the tolerance does to the gradient.",
            "budgets",
        )


def _solvers(m: Measured) -> Iterator[Verdict]:
    for curves, option, word in (
        (m.forward, "--f-solver", "forward"),
        (m.backward, "--b-solver", "backward"),
    ):
        done = [c for c in curves if c.converged[-1] >= ENOUGH]
        if not done or curves[0] not in done:
            continue
        own, best = curves[0], min(done, key=lambda c: c.cost)
        if best.cost <= (1 - _WORTH_SAYING) * own.cost and not best.name.startswith("the same"):
            yield Verdict(
                "hint",
                f"{best.name} is cheaper ({word})",
                f"{option} {best.name} converges in {best.cost:.1f} evaluations per position; this "
                f"model's own solver takes {own.cost:.1f}.",
                "convergence",
            )
    bare = next((c for c in m.forward if c.name.startswith("the same")), None)
    if bare is not None and m.forward[0].converged[-1] >= ENOUGH:
        saved = 1 - m.forward[0].cost / bare.cost
        if saved < 0:
            yield Verdict(
                "hint",
                "The learned start and preconditioner do not help",
                f"Without them a position takes {bare.cost:.1f} evaluations instead of "
                f"{m.forward[0].cost:.1f}: give --learned-start false --preconditioner-rank 0.",
                "convergence",
            )
        else:
            yield Verdict(
                "good",
                "The learned start and preconditioner help",
                f"They save {percent(saved)} of the evaluations ({m.forward[0].cost:.1f} per position, "
                f"{bare.cost:.1f} without them).",
                "convergence",
            )


def _backward(m: Measured) -> Iterator[Verdict]:
    share = m.backward_converged
    if m.gradients is None or m.gradients.own not in ("ift", "shine"):
        return
    if share >= ENOUGH:
        yield Verdict(
            "good",
            "The backward solve converges",
            f"{percent(share)} of its positions reach the tolerance {m.backward_tolerance:g} within "
            f"{m.backward_budget} products, on average in {m.backward[0].cost:.1f}.",
            "convergence",
        )
        return
    longer = 4 * m.backward_budget
    yield Verdict(
        "look",
        "The backward solve does not converge",
        f"Only {percent(share)} of its positions reach the tolerance {m.backward_tolerance:g} within "
        f"--b-thres {m.backward_budget}, so the gradient is not exact there; with --b-thres {longer}, "
        f"{percent(m.backward_longer)} of them do.",
        "convergence",
    )


def _change(a: Trial, b: Trial) -> float:
    """How far apart two losses are, relative to the second."""
    return abs(a.loss - b.loss) / max(abs(b.loss), 1e-12)


def _mean_evaluations(m: Measured) -> float:
    return float(m.passed.evaluations.float().mean())
