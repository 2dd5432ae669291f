"""The options of one solve, validated when they are put together."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, replace
from typing import Any

from .early_precision import PRECISIONS
from .registry import linear_solver_names, solver_names

SCOPES = ("position", "sample", "batch", "recurrence")
POLICIES = ("best", "raise", "fallback")
ACTIVE_SETS = ("auto", "always", "never")
CUDA_GRAPHS = ("never", "auto")


@dataclass(frozen=True)
class SolverConfig:
    """Options of a fixed-point solve; a wrong one raises a `ValueError` that names the valid values.

    A lane has converged when |f(z) - z| <= atol*sqrt(D) + rtol*|f(z)|, with the Euclidean norm over the
    D numbers of the lane, so `atol` bounds the root mean square over these numbers.

    Attributes:
        solver: name in the registry: `picard`, `anderson`, `broyden`, `gmres` (affine f and whole samples
            only), or one registered by the user.
        max_evals: budget of evaluations of f.
        rtol, atol: relative and absolute tolerance.
        scope: what one lane is: a `position` (every index of the leading dimensions), a `sample` (every
            index of dimension 0), or the whole `batch`; `recurrence`: positions again, but settled one after
            another, where f is a `Recurrent`. Only `position` and `recurrence` keep a causal f causal before
            it has converged.
        memory: states (Anderson), steps (Broyden) or basis vectors (GMRES) kept, 0 for the solver's own
            default; bounds the solver's memory.
        damping: step length tau in (0, 1]; 1 steps to f(z).
        ridge: Tikhonov term of Anderson's least squares, relative to the squared norms of its columns.
        ridge_growth: where lanes depend on each other, the factor by which the ridge of a difference grows
            with every iteration since it was taken, up to 1, because the other lanes have changed since
            then and f with them. 1: old differences count as much as new ones.
        first_recheck: in `position` scope, the iteration (from 0) of the first recheck, which evaluates every
            lane that is not final, and wakes the frozen lanes whose inputs have changed; further rechecks
            follow every 3 iterations, later at longer distances.
        active_set: evaluate f at the moving lanes only, if f has `restrict`: when so few move that it saves
            time (`auto`), `always` where lanes are independent, or `never`. The result is the same if f
            rounds a position the same whatever other positions are evaluated with it.
        cuda_graph: `auto` records an iteration on a GPU as a CUDA graph, so that the iterations after the
            first are one launch each, f included; all lanes are evaluated then, whatever `active_set` says.
            Graphs of a map with `holds_its_tensors` are made when shapes and options come for the second
            time, and serve all later solves of that kind. Those of 16 kinds are kept, each with a copy of
            its tensors, until `release_recordings`. Without effect for linear solvers, in scope
            `recurrence`, where the map is one of autograd, as the backward solve is of a layer without an
            adjoint of its own, and on a CPU. `never`: launch by launch.
        patience: evaluations without a new best residual after which a lane restarts from its best state:
            with half the step, then by plain iteration, and so on in turns.
        early_precision: `full`, or the precision of the first evaluations of f: `tf32` (on a GPU) until the
            relative residual is 4e-3, or `bfloat16` (autocast) until it is 2e-2. The last evaluations, and
            with them the residual, are of full precision. Linear solvers, and states that are not float32,
            always use full precision.
        policy: on lanes that did not converge: return the `best` state, `raise` a `ConvergenceError`, or
            `fallback` to damped Picard from the best state.
    """

    solver: str = "anderson"
    max_evals: int = 30
    rtol: float = 1e-3
    atol: float = 1e-6
    scope: str = "position"
    memory: int = 0
    damping: float = 1.0
    ridge: float = 1e-3
    ridge_growth: float = 10.0
    first_recheck: int = 12
    active_set: str = "auto"
    cuda_graph: str = "never"
    patience: int = 6
    early_precision: str = "full"
    policy: str = "best"

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), type(field.default))
        _check_choice("solver", self.solver, (*solver_names(), *linear_solver_names()))
        _check_choice("scope", self.scope, SCOPES)
        _check_choice("policy", self.policy, POLICIES)
        _check_choice("active_set", self.active_set, ACTIVE_SETS)
        _check_choice("cuda_graph", self.cuda_graph, CUDA_GRAPHS)
        _check_choice("early_precision", self.early_precision, PRECISIONS)
        for name, low in (("max_evals", 1), ("memory", 0), ("first_recheck", 1), ("patience", 1)):
            value = getattr(self, name)
            if value < low:
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
        for name in ("rtol", "atol", "ridge"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)!r}")
        if not 1 <= self.ridge_growth < math.inf:
            raise ValueError(f"ridge_growth must be at least 1 and finite, got {self.ridge_growth!r}")
        if self.rtol >= 1:
            raise ValueError(f"rtol must be below 1 (with 1, any state would pass); got {self.rtol!r}")
        if self.rtol == 0 and self.atol == 0:
            raise ValueError("rtol and atol are both 0, which no residual can meet; set one above 0")
        if self.early_precision != "full" and self.scope == "recurrence":
            raise ValueError(
                "early_precision must be full in scope recurrence, whose solves are short; got "
                f"{self.early_precision!r}"
            )
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], got {self.damping!r}")
        if self.solver == "anderson" and self.memory == 1:
            raise ValueError(
                "anderson needs memory >= 2 (two states give one difference); use solver picard for 1"
            )

    def for_lanes(self, coupled: bool) -> SolverConfig:
        """The options for a method whose lanes depend on each other (`coupled`), or do not."""
        return self if coupled else _of_independent_lanes(self)

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> SolverConfig:
        """A configuration from a dictionary.

        Args:
            options: field names and values.
        Returns:
            the configuration.
        Raises:
            ValueError: a name that is no option, or a value out of range.
        """
        valid = [f.name for f in fields(cls)]
        unknown = sorted(set(options) - set(valid))
        if unknown:
            raise ValueError(f"unknown solver option {', '.join(unknown)}; valid options: {', '.join(valid)}")
        return cls(**options)


@functools.lru_cache(maxsize=64)  # generation asks for every token
def _of_independent_lanes(config: SolverConfig) -> SolverConfig:
    return replace(config, ridge_growth=1.0)


def _check_type(name: str, value: Any, kind: type) -> None:
    """Raise ValueError unless `value` is of the type of the option's default; an integer is a number too."""
    kinds: dict[Any, tuple[Any, str]] = {
        str: (str, "a name"),
        int: (int, "an integer"),
        float: ((int, float), "a number"),
    }
    allowed, word = kinds[kind]
    if not isinstance(value, allowed) or isinstance(value, bool):
        raise ValueError(f"{name} must be {word}, got {value!r}")


def _check_choice(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"{name} must be one of {', '.join(valid)}; got {value!r}")
