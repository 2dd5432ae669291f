"""Verdicts on one block: gradient, Jacobian, starts of the solve, and what must not change a state."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ...solve_report import ENOUGH
from .measure import Measured
from .spectra import LARGE_RADIUS
from .verdict import Verdict, percent

# Radius that is a fault even where all solves converge; cosine that a gradient should have.
_TOO_LARGE_RADIUS, _GOOD_COSINE = 12.0, 0.99
# Share of positions that may come to another state from another start.
_APART = 0.01


def judge_gradient(m: Measured) -> Iterator[Verdict]:
    if m.gradients is None:
        return
    own, exact = m.gradients.of(m.gradients.own), m.gradients.of("ift")
    if own is None or own.cosine < _GOOD_COSINE:
        cosine = "is not finite" if own is None else f"has a cosine of {own.cosine:.3f} to the exact one"
        buys = ""
        if exact is not None and own is not None and own.mode != "ift" and exact.cosine > own.cosine:
            buys = (
                f" With --gradient ift the cosine is {exact.cosine:.3f}, and a step takes "
                f"{exact.seconds / own.seconds:.1f} times as long."
            )
        yield Verdict(
            "look",
            "The gradient is not that of the equilibrium",
            f"The gradient of this checkpoint's --gradient {m.gradients.own} {cosine}.{buys}",
            "gradient",
        )
        return
    yield Verdict(
        "good",
        "The gradient points the right way",
        f"--gradient {own.mode} has a cosine of {own.cosine:.4f} to the exact gradient, and differs by "
        f"{percent(own.error)} of its length.",
        "gradient",
    )
    cheaper = [
        g
        for g in m.gradients.modes
        if g.cosine >= 0.999 and g.seconds < 0.8 * own.seconds and g.mode not in (own.mode, "unroll")
    ]
    if cheaper:
        best = min(cheaper, key=lambda g: g.seconds)
        yield Verdict(
            "hint",
            f"--gradient {best.mode} is enough here",
            f"It has a cosine of {best.cosine:.4f} to the exact gradient in "
            f"{percent(best.seconds / own.seconds)} of the time of a step.",
            "gradient",
        )


def judge_radius(m: Measured) -> Iterator[Verdict]:
    if m.spectra is None:
        return
    value, place = m.spectra.largest
    if value > LARGE_RADIUS:
        fails = min(m.own.converged, m.backward_converged) < ENOUGH or value > _TOO_LARGE_RADIUS
        yield Verdict(
            "look" if fails else "hint",
            "The layer expands" if fails else "Some positions expand",
            f"The spectral radius at position {place} is {value:.1f}"
            + (
                ", and not all solves converge."
                if min(m.own.converged, m.backward_converged) < ENOUGH
                else "."
            )
            + _what_a_penalty_buys(m),
            "jacobian",
        )
    elif math.isfinite(value):
        word = (
            "so near the equilibrium even plain iteration converges"
            if value < 1
            else "which the solvers can handle"
        )
        yield Verdict(
            "good",
            "The Jacobian is moderate",
            f"The largest spectral radius found is {value:.2f}, at position {place}, {word}.",
            "jacobian",
        )


def _what_a_penalty_buys(m: Measured) -> str:
    """What some updates with a Jacobian penalty did, beside as many without."""
    p = m.penalty
    if p is None:
        return " A small --jac-loss-weight in training makes the Jacobian smaller."
    verb = "helps" if p.radius[1] < p.radius[0] else "did not help in this trial"
    return (
        f" --jac-loss-weight {p.weight:g} {verb}. After {p.updates} updates of a copy with it and without "
        f"it, the radius is {p.radius[1]:.1f} and {p.radius[0]:.1f}, {percent(p.converged[1])} and "
        f"{percent(p.converged[0])} of the positions converge, and the loss is {p.loss[1]:.3f} and "
        f"{p.loss[0]:.3f}."
    )


def judge_starts(m: Measured) -> Iterator[Verdict]:
    if m.starts is None or m.own.converged < ENOUGH:
        return
    fewest = min(m.starts.converged)
    if m.starts.apart > _APART and m.scope == "recurrence":
        yield Verdict(
            "hint",
            "There are several equilibria",
            f"When all positions are solved at once from random starts, {percent(m.starts.apart)} of them "
            "converge to another state. This model solves one position after another, always from the same "
            "start, so this does not affect its scores.",
            "equilibrium",
        )
    elif m.starts.apart > _APART:
        yield Verdict(
            "look",
            "There are several equilibria",
            f"From random starts {percent(m.starts.apart)} of the positions converge to another state, so "
            "scores depend on where a solve starts. Training with --jac-loss-weight makes f contract more.",
            "equilibrium",
        )
    elif fewest >= ENOUGH:
        yield Verdict(
            "good",
            "One equilibrium, whatever the start",
            f"Solves from {len(m.starts.converged)} random starts all end at the same states.",
            "equilibrium",
        )
    else:
        yield Verdict(
            "hint",
            "Solves from random starts are hard",
            f"From random starts {percent(fewest)} of the positions converge, with four times the budget and "
            "a tenth of the tolerance; those that do end at the same states.",
            "equilibrium",
        )


def judge_invariances(m: Measured) -> Iterator[Verdict]:
    if m.invariances is None:
        return
    failed = [
        sentence
        for holds, sentence in (
            (
                m.invariances.causal,
                f"changing a token changes states before it, by {m.invariances.causal_change:.1e}",
            ),
            (
                m.invariances.batch_invariant,
                f"the states of a row alone and in its batch differ, by {m.invariances.batch_change:.1e}",
            ),
        )
        if not holds
    ]
    if not failed:
        yield Verdict(
            "good",
            "Causal, and independent of batch mates",
            "Changing a token does not change any state before it, and a row has the same states alone and "
            "in its batch, to the last bit.",
            "equilibrium",
        )
        return
    advice = (
        f" With --solver-scope {m.scope} this holds only once a solve has converged; with position, always."
        if m.scope in ("sample", "batch")
        else " Look for a layer that mixes rows or looks ahead."
    )
    sentence = " and ".join(failed)
    yield Verdict(
        "look",
        "States depend on later tokens or on other rows",
        f"{sentence[0].upper()}{sentence[1:]}.{advice}",
        "equilibrium",
    )
