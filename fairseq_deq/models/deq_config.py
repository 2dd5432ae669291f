"""The options that every DEQ language model has, and what they become."""

import math
from dataclasses import dataclass
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II

from ..errors import OptionError
from ..implicit import GRADIENTS, GradientConfig
from ..jacobian import PenaltySchedule
from ..modules.weight_norm import Initializer
from ..options import is_on, option, switch
from ..solvers import SolverConfig, linear_solver_names, solver_names
from ..solvers.config import ACTIVE_SETS, POLICIES, SCOPES

STOP_MODES = ("rel", "abs")

Init = ChoiceEnum(list(Initializer.NAMES))
StopMode = ChoiceEnum(list(STOP_MODES))
Scope = ChoiceEnum(list(SCOPES))
Policy = ChoiceEnum(list(POLICIES))
ActiveSet = ChoiceEnum(list(ACTIVE_SETS))
Gradient = ChoiceEnum(list(GRADIENTS))


@dataclass
class DEQLanguageModelConfig(FairseqDataclass):
    """Options of the embedding, the softmax, the solves and the pretraining phase."""

    decoder_embed_dim: int = option(256, "width of the model, and of its embeddings")
    dropout: float = option(0.0, "variational dropout, one mask a sample held through a whole solve")
    wnorm: str = switch(False, "normalise the weights inside the layer (weight norm)")
    init: Init = option("normal", "initial weights: N(0, std), U(-range, range), or U(+-1/sqrt(fan_in))")
    init_std: float = option(0.02, "standard deviation of --init normal")
    init_range: float = option(0.05, "bound of --init uniform")
    embed_std: float = option(
        0.0,
        "standard deviation of the initial embeddings, 0: 1/sqrt(width); --adaptive-input has fairseq's own",
    )

    share_decoder_input_output_embed: str = switch(False, "tie the softmax to the input embedding")
    adaptive_input: str = switch(False, "use fairseq's adaptive input")
    adaptive_input_cutoff: Optional[str] = option(None, "comma separated cut-offs of the adaptive input")
    adaptive_input_factor: float = option(4.0, "factor by which the adaptive input's bands narrow")
    adaptive_softmax_cutoff: Optional[str] = option(
        None, "comma separated cut-offs; turns fairseq's adaptive softmax on"
    )
    adaptive_softmax_factor: float = option(4.0, "factor by which the adaptive softmax's tails narrow")
    adaptive_softmax_dropout: float = option(0.0, "dropout in the tails of the adaptive softmax")
    tie_adaptive_weights: str = switch(False, "tie the words of adaptive softmax and adaptive input")
    tie_adaptive_proj: str = switch(False, "tie the projections of adaptive softmax and adaptive input")

    f_solver: str = option("anderson", f"solver of the forward pass: {', '.join(solver_names())}")
    b_solver: str = option(
        "anderson",
        f"solver of the backward pass: {', '.join((*solver_names(), *linear_solver_names()))}",
    )
    f_thres: int = option(40, "evaluations of f at most, in the forward pass")
    b_thres: int = option(40, "vector-Jacobian products at most, in the backward pass")
    f_eps: float = option(1e-3, "tolerance of the forward solve")
    b_eps: float = option(1e-3, "relative tolerance of the backward solve")
    early_eps: float = option(
        0.0,
        "relative tolerance of both solves in the first part of the training, where it is looser than "
        "--f-eps and --b-eps; 0: the same throughout",
    )
    early_share: float = option(0.67, "share of --max-update that --early-eps holds for, in (0, 1)")
    stop_mode: StopMode = option("rel", "--f-eps is relative to |f(z)| (rel) or a root mean square (abs)")
    solver_scope: Scope = option(
        "position",
        "what is solved as one unknown: position, sample, batch, or position after position (recurrence, of "
        "TrellisNets alone); sample and batch are not causal until they have converged",
    )
    f_memory: int = option(0, "states the forward solver keeps; 0: the solver's default")
    b_memory: int = option(0, "states the backward solver keeps; 0: the solver's default")
    f_damping: float = option(1.0, "step length of the forward solver, in (0, 1]")
    active_set: ActiveSet = option(
        "auto", "evaluate f at unconverged positions only: where it pays (auto), always, never"
    )
    preconditioner_rank: int = option(
        32, "rank of the preconditioner that solves learn in training from the mean Jacobian; 0: none"
    )
    learned_start: str = switch(True, "start solves where a linear map of the last two tokens says")
    solver_policy: Policy = option("best", "when a solve fails: best, raise, fallback")
    gradient: Gradient = option("ift", "how to differentiate the fixed point")
    phantom_steps: int = option(5, "steps of --gradient phantom")
    phantom_damping: float = option(1.0, "step length of --gradient phantom, in (0, 1]")
    shine_refine: int = option(5, "evaluations of the backward solver after the estimate of --gradient shine")

    jac_loss_weight: float = option(0.0, "weight of the Jacobian penalty in the loss, 0: off")
    jac_loss_freq: float = option(1.0, "share of the updates that the penalty is computed in, in [0, 1]")
    jac_incremental: int = option(
        0, "the penalty's weight grows by 0.1 each such number of updates after the pretraining, 0: never"
    )
    keep_converged: float = option(
        0.995,
        "share of positions whose solves are to converge in training; where it is missed, a Jacobian penalty "
        "is switched on until they do; 0: never",
    )
    spectral_radius: int = option(
        0, "Arnoldi steps for the spectral radius at validation (8 positions a row), for example 20; 0: off"
    )

    pretrain_steps: int = option(0, "updates trained as a tied stack before the equilibrium phase")
    pretrain_layers: int = option(2, "layers of that stack")
    mem_len: int = option(0, "positions of the previous segment that are remembered")
    subseq_len: int = option(0, "positions solved at a time; 0: the whole segment")
    subseq_forget: str = switch(
        False, "a subsequence sees the one before it alone, without the memory and those before that"
    )

    max_update: int = II("optimization.max_update")
    tokens_per_sample: int = II("task.tokens_per_sample")
    max_target_positions: Optional[int] = II("task.max_target_positions")
    add_bos_token: bool = II("task.add_bos_token")


def forward_solver(cfg: DEQLanguageModelConfig) -> SolverConfig:
    """The options of the forward solve.

    Raises:
        ValueError: an option is out of range; the sentence names it and the valid values.
    """
    if str(cfg.stop_mode) not in STOP_MODES:
        raise OptionError(f"--stop-mode must be one of {', '.join(STOP_MODES)}; got {cfg.stop_mode!s}")
    if cfg.f_solver not in solver_names():  # those of linear systems are for the backward pass alone
        raise OptionError(f"--f-solver must be one of {', '.join(solver_names())}; got {cfg.f_solver!r}")
    relative = str(cfg.stop_mode) == "rel"
    return _solver(
        {"solver": "--f-solver", "max_evals": "--f-thres", "memory": "--f-memory", "damping": "--f-damping"}
        | ({"rtol": "--f-eps"} if relative else {"atol": "--f-eps"}),
        solver=cfg.f_solver,
        max_evals=cfg.f_thres,
        rtol=cfg.f_eps if relative else 0.0,
        atol=0.0 if relative else cfg.f_eps,
        memory=cfg.f_memory or _anderson_memory(cfg, cfg.f_solver, 0),
        damping=cfg.f_damping,
        scope=str(cfg.solver_scope),
        active_set=str(cfg.active_set),
        policy=str(cfg.solver_policy),
    )


def gradient_config(cfg: DEQLanguageModelConfig) -> GradientConfig:
    """How to differentiate, with the options of the backward solve.

    Raises:
        ValueError: an option is out of range; the sentence names it and the valid values.
    """
    solver = _solver(
        {"solver": "--b-solver", "max_evals": "--b-thres", "rtol": "--b-eps", "memory": "--b-memory"},
        solver=cfg.b_solver,
        max_evals=cfg.b_thres,
        rtol=cfg.b_eps,
        atol=0.0,
        memory=cfg.b_memory or _anderson_memory(cfg, cfg.b_solver, 5),
        scope=str(cfg.solver_scope),
        active_set=str(cfg.active_set),
        policy=str(cfg.solver_policy),
    )
    if cfg.phantom_steps < 1:
        raise OptionError(f"--phantom-steps must be at least 1, got {cfg.phantom_steps}")
    if not 0 < cfg.phantom_damping <= 1:
        raise OptionError(f"--phantom-damping must lie in (0, 1], got {cfg.phantom_damping}")
    if cfg.shine_refine < 0:
        raise OptionError(f"--shine-refine must be at least 0, got {cfg.shine_refine}")
    return GradientConfig(str(cfg.gradient), solver, cfg.phantom_steps, cfg.phantom_damping, cfg.shine_refine)


def penalty_schedule(cfg: DEQLanguageModelConfig) -> PenaltySchedule:
    """When the Jacobian penalty counts, and how much: from the end of the pretraining on.

    Raises:
        ValueError: an option is out of range; the sentence names it and the valid values.
    """
    weight, every = cfg.jac_loss_weight, cfg.jac_incremental
    _require(0 <= weight < math.inf, "jac_loss_weight", "finite and at least 0", weight)
    _require(0 <= cfg.jac_loss_freq <= 1, "jac_loss_freq", "in [0, 1]", cfg.jac_loss_freq)
    _require(every >= 0, "jac_incremental", "at least 0", every)
    if str(cfg.gradient) == "unroll" and (weight or every):
        raise OptionError(
            f"--{'jac-loss-weight' if weight else 'jac-incremental'} needs an equilibrium, which --gradient "
            "unroll does not solve for: choose --gradient ift, shine, phantom or jfb"
        )
    return PenaltySchedule(weight, cfg.jac_loss_freq, every, start=cfg.pretrain_steps)


def _anderson_memory(cfg: DEQLanguageModelConfig, solver: str, states: int) -> int:
    """States that Anderson keeps where the user names no number: `states`, or 2 for a position by itself."""
    if solver != "anderson":
        return 0
    return 2 if str(cfg.solver_scope) == "recurrence" else states


def _solver(flags: dict[str, str], **options: Any) -> SolverConfig:
    tolerance = options["rtol"] + options["atol"]
    if tolerance == 0:  # no residual can meet that
        flag = next(flag for flag in flags.values() if flag.endswith("-eps"))
        raise OptionError(f"{flag} must be above 0, got {tolerance}")
    try:
        return SolverConfig.from_options(options)
    except ValueError as error:
        sentence = str(error)
        flags = flags | {"scope": "--solver-scope", "policy": "--solver-policy"}
        name = sentence.split(" ", 1)[0]
        raise OptionError(sentence.replace(name, flags.get(name, name), 1)) from None


def check_options(cfg: DEQLanguageModelConfig, vocabulary: int) -> None:
    """Refuse what cannot work, before anything is built.

    Args:
        cfg: the options.
        vocabulary: number of types in the dictionary.
    Raises:
        ValueError: with the option's name, what is wrong and what is valid.
    """
    for name in ("pretrain_steps", "mem_len", "subseq_len", "spectral_radius", "embed_std"):
        _require(getattr(cfg, name) >= 0, name, "at least 0", getattr(cfg, name))
    for name in ("decoder_embed_dim", "pretrain_layers"):
        _require(getattr(cfg, name) >= 1, name, "at least 1", getattr(cfg, name))
    for name in ("dropout", "adaptive_softmax_dropout"):
        _require(0 <= getattr(cfg, name) < 1, name, "in [0, 1)", getattr(cfg, name))
    for name in ("f_eps", "b_eps"):
        value = getattr(cfg, name)
        if name == "f_eps" and str(cfg.stop_mode) == "abs":
            _require(0 < value < math.inf, name, "above 0 and finite", value)
        else:
            # Relative to |f(z)|: at 1 the start would do as the answer.
            _require(0 < value < 1, name, "in (0, 1)", value)
    _require(0 <= cfg.early_eps < 1, "early_eps", "in [0, 1)", cfg.early_eps)
    _require(0 < cfg.early_share < 1, "early_share", "in (0, 1)", cfg.early_share)
    if cfg.early_eps and not (cfg.max_update and cfg.max_update > 0):
        raise OptionError("--early-eps needs --max-update: it holds for a share of that number of updates")
    _require(0 <= cfg.keep_converged < 1, "keep_converged", "in [0, 1)", cfg.keep_converged)
    _require(cfg.preconditioner_rank >= 0, "preconditioner_rank", "at least 0", cfg.preconditioner_rank)
    if is_on(cfg, "subseq_forget") and cfg.subseq_len == 0:
        raise OptionError("--subseq-forget needs --subseq-len above 0: it is about what subsequences see")
    if is_on(cfg, "adaptive_input") and not cfg.adaptive_input_cutoff:
        raise OptionError("--adaptive-input needs --adaptive-input-cutoff, for example 20000,40000,200000")
    for name in ("adaptive_input_cutoff", "adaptive_softmax_cutoff"):
        if getattr(cfg, name):
            _check_cutoff(name, getattr(cfg, name), vocabulary)
    if is_on(cfg, "tie_adaptive_weights"):
        same = (cfg.adaptive_input_cutoff, cfg.adaptive_input_factor)
        if not is_on(cfg, "adaptive_input") or same != (
            cfg.adaptive_softmax_cutoff,
            cfg.adaptive_softmax_factor,
        ):
            raise OptionError(
                "--tie-adaptive-weights needs --adaptive-input, and the same cut-offs and factor in "
                "--adaptive-input-cutoff/-factor and --adaptive-softmax-cutoff/-factor"
            )
    if is_on(cfg, "tie_adaptive_proj") and not is_on(cfg, "tie_adaptive_weights"):
        raise OptionError("--tie-adaptive-proj needs --tie-adaptive-weights")
    if is_on(cfg, "share_decoder_input_output_embed") and (
        is_on(cfg, "adaptive_input") or cfg.adaptive_softmax_cutoff
    ):
        raise OptionError(
            "--share-decoder-input-output-embed is for the full softmax; with the adaptive one use "
            "--tie-adaptive-weights"
        )


def cutoffs(text: str) -> list[int]:
    """The numbers of a cut-off option."""
    return [int(number) for number in text.split(",")]


def _check_cutoff(name: str, text: str, vocabulary: int) -> None:
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or numbers != sorted(set(numbers)) or numbers[0] < 1:
        raise OptionError(
            f"--{name.replace('_', '-')} must be increasing positive numbers with commas between, got {text}"
        )
    if numbers[-1] > vocabulary:
        raise OptionError(
            f"--{name.replace('_', '-')} {text} goes beyond the dictionary of {vocabulary} types; "
            "choose cut-offs below that"
        )


def _require(good: bool, name: str, valid: str, value: Any) -> None:
    if not good:
        raise OptionError(f"--{name.replace('_', '-')} must be {valid}, got {value!r}")
