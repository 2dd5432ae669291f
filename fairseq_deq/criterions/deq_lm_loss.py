"""`deq_lm_loss`: cross-entropy with the statistics of the solves beside it."""

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from fairseq import utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from omegaconf import II
from torch import Tensor, nn

from ..equilibrium import SolveStats, real_lanes
from ..solvers import Status
from .watch import ConvergenceWatch

logger = logging.getLogger(__name__)

# Entries of SolveStats, as they are named in the log: means per lane, with f_ (forward) or b_ (backward).
_COLUMNS = ("nfe", "lane_nfe", "res", "conv")
# The Jacobian's: sums, and what they are sums over.
_JACOBIAN = ("jac_sum", "jac_positions", "sradius_sum", "sradius_rows")

# Where a column stands: fairseq shows small numbers first, ppl has 20 and the speed 90.
_AFTER_PPL = 30


@dataclass
class DEQLossConfig(FairseqDataclass):
    """Options of the loss."""

    sentence_avg: bool = II("optimization.sentence_avg")
    log_interval: int = II("common.log_interval")


@register_criterion("deq_lm_loss", dataclass=DEQLossConfig)
class DEQLanguageModelLoss(FairseqCriterion):
    """Cross-entropy of the next token, with full or adaptive softmax.

    `loss`, `nll_loss` (per token, also where `--sentence-avg` makes `loss` one per block) and `ppl` are
    cross-entropy alone, in bits and as perplexity. The log also has, as means over the lanes of a solve,
    `f_nfe` (evaluations of f), `f_lane_nfe` (those really computed), `f_res` (relative residual), `f_conv`
    (share of converged lanes), and the same with `b_` for the backward solve. If the model computes a
    Jacobian penalty, it is added to the loss that is differentiated, and logged without its weight as `jac`,
    a mean over positions; the spectral radius is logged as `sradius`, a mean over rows. A task with a method
    `counts` adds its own columns. `f_nonfinite` is the number of lanes where f was never finite, if there are
    any; a warning names their samples. Another warning says when few positions converge in training,
    averaged over `--log-interval` batches.
    """

    def __init__(self, task: Any, sentence_avg: bool, log_interval: int = 100) -> None:
        super().__init__(task)
        self.sentence_avg = sentence_avg
        self.watch = ConvergenceWatch(log_interval)

    def forward(
        self, model: Any, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """The loss of a batch, summed over its tokens, in nats.

        Args:
            model: a language model of this package or of fairseq.
            sample: fairseq's batch.
            reduce: sum over tokens; without it the loss of every token is returned.
        Returns:
            the loss; the number by which to divide its gradient; the columns to log, as sums.
        """
        features, extra = model(**sample["net_input"])
        extra = extra or {}  # fairseq's recurrent decoders give None
        target = model.get_targets(sample, (features, extra))
        loss = self._cross_entropy(model.decoder, features, target, reduce)
        if self.training and "forward_stats" in extra:
            self.watch.add({"f_conv": extra["forward_stats"], "b_conv": extra["backward_stats"]})
        non_finite = _lanes_without_a_finite_f(extra, target.ne(self.padding_idx))
        if bool(non_finite.any()):
            _name_the_samples(non_finite, sample)
        ntokens = int(sample["ntokens"])
        sample_size = target.size(0) if self.sentence_avg else ntokens
        logging_output = {
            "loss": loss.detach().sum(),
            "ntokens": ntokens,
            "nsentences": target.size(0),
            "sample_size": sample_size,
            "f_nonfinite_sum": non_finite.sum(),
        }
        if hasattr(self.task, "counts"):
            with torch.no_grad():
                scores = model.decoder.get_normalized_probs((features, extra), log_probs=True)
            logging_output |= self.task.counts(scores, target)
        term, radii = extra.get("jacobian_penalty"), extra.get("spectral_radii")
        # Every worker logs the same entries, on the device of the loss.
        sums = dict.fromkeys(_JACOBIAN, loss.new_zeros(()))
        if term is not None:
            sums |= {"jac_sum": term.value.detach() * term.positions, "jac_positions": term.positions}
        if radii is not None:
            sums |= {"sradius_sum": radii.largest().sum(), "sradius_rows": radii.real.any(1).sum()}
        logging_output |= sums
        for prefix in ("f", "b"):
            stats = extra.get("forward_stats" if prefix == "f" else "backward_stats")
            # Views: the backward pass fills its entries in after this dictionary was made.
            sums = stats.sums if stats is not None else features.new_zeros(SolveStats.ENTRIES)
            for name, value in zip(("lanes", *_COLUMNS), sums[: len(_COLUMNS) + 1].unbind(), strict=True):
                logging_output[f"{prefix}_{name}_sum"] = value
        if term is not None and reduce:
            loss = loss + term.weighted * sample_size
        return loss, sample_size, logging_output

    def _cross_entropy(self, decoder: Any, output: Tensor, target: Tensor, reduce: bool) -> Tensor:
        reduction = "sum" if reduce else "none"
        softmax = getattr(decoder, "adaptive_softmax", None)
        if softmax is None:
            log_probs = F.log_softmax(_widened(output), -1).flatten(0, 1)
            return F.nll_loss(log_probs, target.flatten(), ignore_index=self.padding_idx, reduction=reduction)
        loss = _adaptive_cross_entropy(softmax, output, target.flatten(), self.padding_idx)
        if _is_distributed():
            # A cluster without a target in this batch must still report to the other processes.
            loss = loss + 0.0 * _touch(softmax, decoder.embed_tokens)
        return loss.sum() if reduce else loss

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Log the means over all workers."""

        def total(key: str) -> float:
            return float(utils.item(sum(log.get(key, 0) for log in logging_outputs)))

        ntokens, sample_size = total("ntokens"), total("sample_size")
        loss = total("loss") / max(sample_size, 1) / math.log(2)
        metrics.log_scalar("loss", loss, sample_size, round=3)
        metrics.log_scalar("nll_loss", total("loss") / max(ntokens, 1) / math.log(2), ntokens, round=3)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["nll_loss"].avg))
        non_finite = total("f_nonfinite_sum")
        if non_finite > 0:
            metrics.log_scalar_sum("f_nonfinite", non_finite, priority=_AFTER_PPL)
        for prefix, digits in (("f", 4), ("b", 4)):
            lanes = total(f"{prefix}_lanes_sum")
            if lanes > 0:
                for name in _COLUMNS:
                    mean = total(f"{prefix}_{name}_sum") / lanes
                    rounding = 2 if name.endswith("nfe") else digits if name == "conv" else 6
                    metrics.log_scalar(f"{prefix}_{name}", mean, lanes, _AFTER_PPL, rounding)
        for name, count in (("jac", total("jac_positions")), ("sradius", total("sradius_rows"))):
            if count > 0:
                metrics.log_scalar(name, total(f"{name}_sum") / count, count, _AFTER_PPL, 4)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Every entry is a sum, so workers may add them up first."""
        return True


def _lanes_without_a_finite_f(extra: dict[str, Any], real: Tensor) -> Tensor:
    """Number of lanes of each row of the batch where f was never finite, (B,); (1,) if lanes span rows.

    Only lanes count that are `real`, (B, T) bool, somewhere.
    """
    rows = torch.zeros(1, dtype=torch.long, device=real.device)
    start = 0
    for equilibrium in extra.get("equilibria", ()):
        part = real[:, start : start + equilibrium.state.shape[1]]
        start += part.shape[1]
        if equilibrium.result is not None:
            failed = equilibrium.result.status.eq(Status.NON_FINITE)
            failed = failed & real_lanes(part, failed)
            rows = rows + failed.reshape(failed.shape[0], -1).sum(1)
    return rows


def _name_the_samples(non_finite: Tensor, sample: dict[str, Any]) -> None:
    total, rows = int(non_finite.sum()), non_finite.nonzero().flatten().tolist()
    ids = sample.get("id")
    names = [int(ids[row]) for row in rows] if ids is not None and len(ids) == len(non_finite) else rows
    shown = ", ".join(map(str, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    logger.warning(
        "f is not finite at %d positions, in the samples %s: their state stays where the solve started, and "
        "the gradient of the batch cannot be trusted; look for NaN in the weights of their tokens",
        total,
        shown,
    )


def _adaptive_cross_entropy(softmax: Any, output: Tensor, target: Tensor, padding_idx: int) -> Tensor:
    """Loss of every token, (n,), 0 at padding, in the order of `target` (n,)."""
    logits, targets = softmax(output, target)
    loss = F.cross_entropy(_widened(logits[0]), targets[0], reduction="none")
    for i, (tail, tail_target) in enumerate(zip(logits[1:], targets[1:], strict=True)):
        if tail_target is not None:
            inside = (target >= softmax.cutoff[i]) & (target < softmax.cutoff[i + 1])
            tail_loss = F.cross_entropy(_widened(tail), tail_target, reduction="none")
            loss = loss.index_add(0, inside.nonzero().squeeze(1), tail_loss)
    return loss.masked_fill(target == padding_idx, 0.0)


def _widened(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _is_distributed() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _touch(*modules: nn.Module) -> Tensor:
    """Zero-size dependence on every parameter of the modules."""
    parameters = {id(p): p for module in modules for p in module.parameters()}
    return torch.stack([p.flatten()[:1].sum() for p in parameters.values()]).sum()
