"""The options of every DEQ language model, and the configurations that are made of them."""

from dataclasses import dataclass
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II

from ..errors import OptionError
from ..implicit import GRADIENTS, GradientConfig
from ..jacobian import PenaltySchedule
from ..layers.weight_norm import Initializer
from ..options import option, switch
from ..solvers import SolverConfig, linear_solver_names, solver_names
from ..solvers.config import ACTIVE_SETS, CUDA_GRAPHS, POLICIES, PRECISIONS, SCOPES

STOP_MODES = ("rel", "abs")

Init = ChoiceEnum(list(Initializer.NAMES))
StopMode = ChoiceEnum(list(STOP_MODES))
Scope = ChoiceEnum(list(SCOPES))
Policy = ChoiceEnum(list(POLICIES))
ActiveSet = ChoiceEnum(list(ACTIVE_SETS))
CudaGraph = ChoiceEnum(list(CUDA_GRAPHS))
EarlyPrecision = ChoiceEnum(list(PRECISIONS))
Gradient = ChoiceEnum(list(GRADIENTS))


@dataclass
class DEQLanguageModelConfig(FairseqDataclass):
    """Options of the embedding, the softmax, the solves and the pretraining phase."""

    decoder_embed_dim: int = option(256, "width of the model, and of its embeddings", valid="[1, 65536]")
    dropout: float = option(
        0.0,
        "variational dropout: one mask per sample, the same in all evaluations of a solve",
        valid="[0, 1)",
    )
    wnorm: str = switch(False, "normalise the weights inside the layer (weight norm)")
    init: Init = option("normal", "initial weights: N(0, std), U(-range, range), or U(+-1/sqrt(fan_in))")
    init_std: float = option(0.02, "standard deviation of --init normal", valid="(0, inf)", init="normal")
    init_range: float = option(0.05, "bound of --init uniform", valid="(0, inf)", init="uniform")
    embed_std: float = option(
        0.0,
        "standard deviation of the initial embeddings, 0: 1/sqrt(width); --adaptive-input uses fairseq's",
        valid="[0, inf)",
        adaptive_input="false",
    )

    share_decoder_input_output_embed: str = switch(
        False, "share the weights of the softmax and the input embedding"
    )
    adaptive_input: str = switch(False, "use fairseq's adaptive input")
    adaptive_input_cutoff: Optional[str] = option(
        None, "comma separated cut-offs of the adaptive input", adaptive_input="*"
    )
    adaptive_input_factor: float = option(
        4.0,
        "factor by which each band of the adaptive input is narrower than the one before",
        valid="[1, inf)",
        adaptive_input="*",
    )
    adaptive_softmax_cutoff: Optional[str] = option(
        None, "comma separated cut-offs; turns on fairseq's adaptive softmax"
    )
    adaptive_softmax_factor: float = option(
        4.0,
        "factor by which each tail of the adaptive softmax is narrower than the one before",
        valid="[1, inf)",
        adaptive_softmax_cutoff="*",
    )
    adaptive_softmax_dropout: float = option(
        0.0, "dropout in the tails of the adaptive softmax", valid="[0, 1)", adaptive_softmax_cutoff="*"
    )
    adaptive_softmax_projection: str = switch(
        False, "project the features before the adaptive softmax's head", adaptive_softmax_cutoff="*"
    )
    output_bias: str = switch(
        False, "give the softmax a bias for every word, and the adaptive softmax one for every band too"
    )
    tie_adaptive_weights: str = switch(
        False, "share the word vectors of the adaptive softmax and the adaptive input"
    )
    tie_adaptive_proj: str = switch(
        False, "share the projections of the adaptive softmax and the adaptive input"
    )

    f_solver: str = option("anderson", f"solver of the forward pass: {', '.join(solver_names())}")
    b_solver: str = option(
        "anderson",
        f"solver of the backward pass: {', '.join((*solver_names(), *linear_solver_names()))}",
        gradient="ift,shine",
    )
    f_thres: int = option(60, "largest number of evaluations of f in a forward solve", valid="[1, 100000]")
    b_thres: int = option(
        60,
        "largest number of vector-Jacobian products in a backward solve",
        valid="[1, 100000]",
        gradient="ift",
    )
    f_eps: float = option(1e-3, "tolerance of the forward solve", valid="(0, 1)")
    b_eps: float = option(
        1e-3, "relative tolerance of the backward solve", valid="(0, 1)", gradient="ift,shine"
    )
    early_eps: float = option(
        0.0,
        "a looser relative tolerance of both solves in the first part of the training, replacing --f-eps "
        "and --b-eps where those are smaller; 0: off",
        valid="[0, 1)",
    )
    early_share: float = option(
        0.67, "share of --max-update during which --early-eps is used", valid="(0, 1)", early_eps="*"
    )
    early_precision: EarlyPrecision = option(
        "full",
        "precision of the first evaluations of both solves: tf32 (on a GPU) until the relative residual is "
        "4e-3, bfloat16 until it is 2e-2, or full (the model's own) from the start; the last evaluations are "
        "always full",
        gradient="ift,phantom,jfb",
    )
    stop_mode: StopMode = option(
        "rel", "what --f-eps bounds: |f(z) - z| relative to |f(z)| (rel), or its root mean square (abs)"
    )
    solver_scope: Scope = option(
        "position",
        "what is solved as one unknown: each position, each sample, the whole batch, or one position after "
        "another (recurrence, TrellisNets only); with sample and batch a result depends on later tokens "
        "until the solve has converged",
    )
    f_memory: int = option(
        0,
        "earlier states that the forward solver keeps; 0: the solver's default",
        valid="[0, 1000]",
        f_solver="anderson,broyden",
    )
    b_memory: int = option(
        0,
        "earlier states that the backward solver keeps; 0: the solver's default",
        valid="[0, 1000]",
        b_solver="anderson,broyden,gmres",
    )
    f_damping: float = option(1.0, "step length of the forward solver, in (0, 1]", valid="(0, 1]")
    active_set: ActiveSet = option(
        "auto",
        "evaluate f only at positions that have not converged: where that saves time (auto), always, never",
    )
    cuda_graph: CudaGraph = option(
        "never",
        "auto: on a GPU, record an iteration of a solve as a CUDA graph and keep it; costs memory",
    )
    preconditioner_rank: int = option(
        32,
        "rank of the preconditioner that is learned in training, from the mean Jacobian; 0: off",
        valid="[0, 100000]",
    )
    learned_start: str = switch(
        True, "start each solve at a prediction of z*, a learned linear map of the last two tokens"
    )
    solver_policy: Policy = option(
        "best",
        "when a solve fails: return the best state (best), stop (raise), or try damped Picard (fallback)",
    )
    gradient: Gradient = option(
        "ift", "how to differentiate the fixed point: implicit function theorem (ift), or a cheaper mode"
    )
    phantom_steps: int = option(
        5, "steps of f that --gradient phantom differentiates", valid="[1, 100000]", gradient="phantom"
    )
    phantom_damping: float = option(
        1.0, "step length of --gradient phantom, in (0, 1]", valid="(0, 1]", gradient="phantom"
    )
    shine_refine: int = option(
        5,
        "backward products that improve the first estimate of --gradient shine",
        valid="[0, 100000]",
        gradient="shine",
    )

    jac_loss_weight: float = option(
        0.0, "weight of the Jacobian penalty in the loss, 0: off", valid="[0, inf)"
    )
    jac_loss_freq: float = option(
        1.0, "share of the updates in which the penalty is computed, in [0, 1]", valid="[0, 1]"
    )
    jac_incremental: int = option(
        0,
        "raise the penalty's weight by 0.1 each time this many updates have passed after the pretraining; "
        "0: never",
        valid="[0, inf)",
    )
    keep_converged: float = option(
        0.995,
        "share of positions that must converge within 30 evaluations in training; while fewer do, a Jacobian "
        "penalty is added to the loss; 0: never",
        valid="[0, 1)",
    )
    spectral_radius: int = option(
        0,
        "Arnoldi steps for the spectral radius at validation (8 positions per row), for example 20; 0: off",
        valid="[0, 1000]",
    )

    pretrain_steps: int = option(
        0,
        "number of first updates that train f as a stack (f applied --pretrain-layers times)",
        valid="[0, inf)",
    )
    pretrain_layers: int = option(
        2, "how often the stack of --pretrain-steps applies f", valid="[1, 10000]", pretrain_steps="*"
    )
    pretrain_random_layers: str = switch(
        False,
        "draw this number anew for each update, from 1 to 2 * --pretrain-layers - 1",
        pretrain_steps="*",
    )
    mem_len: int = option(0, "number of positions before a segment that it can attend to", valid="[0, inf)")
    subseq_len: int = option(
        0,
        "number of positions solved together, as a subsequence of the segment; 0: the whole segment",
        valid="[0, inf)",
    )
    subseq_forget: str = switch(
        False,
        "a subsequence sees only the one before it: not the memory, and no earlier subsequence",
        subseq_len="*",
    )

    seed: int = II("common.seed")
    max_update: int = II("optimization.max_update")
    tokens_per_sample: int = II("task.tokens_per_sample")
    max_target_positions: Optional[int] = II("task.max_target_positions")
    add_bos_token: bool = II("task.add_bos_token")


def forward_solver(cfg: DEQLanguageModelConfig) -> SolverConfig:
    """The options of the forward solve.

    Raises:
        ValueError: an option is out of range; the sentence names it and the valid values.
    """
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
        cuda_graph=str(cfg.cuda_graph),
        early_precision=str(cfg.early_precision),
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
        cuda_graph=str(cfg.cuda_graph),
        early_precision=str(cfg.early_precision),
        policy=str(cfg.solver_policy),
    )
    return GradientConfig(str(cfg.gradient), solver, cfg.phantom_steps, cfg.phantom_damping, cfg.shine_refine)


def penalty_schedule(cfg: DEQLanguageModelConfig) -> PenaltySchedule:
    """The weight of the Jacobian penalty over the training, from the end of the pretraining on.

    Raises:
        ValueError: an option is out of range; the sentence names it and the valid values.
    """
    weight, every = cfg.jac_loss_weight, cfg.jac_incremental
    if str(cfg.gradient) == "unroll" and (weight or every):
        raise OptionError(
            f"--{'jac-loss-weight' if weight else 'jac-incremental'} needs an equilibrium, which --gradient "
            "unroll does not solve for: choose --gradient ift, shine, phantom or jfb"
        )
    if cfg.jac_loss_freq != 1 and not weight and not every:
        raise OptionError(
            "--jac-loss-freq needs --jac-loss-weight or --jac-incremental; leave it out, or add one of them"
        )
    return PenaltySchedule(weight, cfg.jac_loss_freq, every, start=cfg.pretrain_steps)


def _anderson_memory(cfg: DEQLanguageModelConfig, solver: str, states: int) -> int:
    """States that Anderson keeps where the user names no number: `states`, or 2 for a position by itself."""
    if solver != "anderson":
        return 0
    return 2 if str(cfg.solver_scope) == "recurrence" else states


def _solver(flags: dict[str, str], **options: Any) -> SolverConfig:
    try:
        return SolverConfig.from_options(options)
    except ValueError as error:
        sentence = str(error)
        flags = flags | {"scope": "--solver-scope", "policy": "--solver-policy"}
        flags |= {"early_precision": "--early-precision"}
        name = sentence.split(" ", 1)[0]
        raise OptionError(sentence.replace(name, flags.get(name, name), 1)) from None
