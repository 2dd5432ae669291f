"""What a model learns about its own solves, besides its weights: the mean Jacobian, and where to start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fairseq.distributed import utils as distributed_utils
from torch import Tensor, nn

from ..invariant_matmul import rowwise_linear
from ..jacobian import JacobianSums
from ..solvers import Preconditioner
from .precision import dtype_of_f

# What was known counts this much beside what is new, whenever it is renewed.
_KEPT_JACOBIAN = 0.5
_KEPT_START = 0.7
# Least squares need so many positions for each unknown of a row; with fewer, nothing is made of them yet.
_LEAST_POSITIONS = 2
# Where I - Jbar is nearly singular, P lengthens a step by at most the inverse of this.
_LEAST_SINGULAR = 0.2
# Length of the changes that probe f, relative to the state, where its rounding allows.
_PROBE_LENGTH = 1e-2
# Ridge of the least squares, relative to the mean square of a feature.
_START_RIDGE = 3e-3


class Learned(nn.Module):
    """Something useful for solves that is learned from solves, in some updates of the training.

    What an update collects is summed over all workers and renews the buffers, which the checkpoint keeps. So
    all workers have the same buffers, and a resumed run equals the uninterrupted one. A checkpoint without
    the buffers loads as one that has learned nothing yet. They are float32 (or float64) in any model.
    """

    renewals: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("renewals", torch.zeros((), dtype=torch.long))
        self.is_known = False  # the buffer's word, where no device need be asked
        self._collected: tuple[Tensor, ...] | None = None

    def _collect(self, *sums: Tensor) -> None:
        collected = self._collected
        self._collected = sums if collected is None else tuple(a + b for a, b in zip(collected, sums))

    def renew(self) -> None:
        """Make use of what all workers have collected; each of them must call this."""
        collected, self._collected = self._collected, None
        if distributed_utils.get_data_parallel_world_size() > 1:
            group = distributed_utils.get_data_parallel_group()
            collected = self._no_sums() if collected is None else collected
            for total in collected:
                distributed_utils.all_reduce(total, group=group)
        if collected is not None and bool((collected[0] != 0).any()):
            self._renew(*collected)
            self.renewals += 1
            self.is_known = True

    def _no_sums(self) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _renew(self, *sums: Tensor) -> None:
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and _eps(buffer) > torch.finfo(torch.float32).eps:
                before = kept[name]
                assert before is not None
                self._buffers[name] = before.to(buffer.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        absent: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, absent, *rest)
        if len(absent) < len(self._buffers):
            missing.extend(absent)
        self.is_known = bool(self.renewals)


def _eps(buffer: Tensor) -> float:
    return torch.finfo(buffer.dtype).eps if buffer.is_floating_point() else 0.0


class LearnedPreconditioner(Learned):
    """P = (I - Jbar)^{-1} of low rank, from the mean Jacobian Jbar of the layer at its equilibria.

    Args:
        channels: channels of a position that the solve works on, C.
        rank: rank of P.
    """

    gram: Tensor
    cross: Tensor
    positions: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.channels, self.rank = channels, min(rank, channels)
        self.register_buffer("gram", torch.zeros(channels, channels))
        self.register_buffer("cross", torch.zeros(channels, channels))
        self.register_buffer("positions", torch.zeros((), dtype=torch.float64))
        self.register_buffer("left", torch.zeros(channels, self.rank))
        self.register_buffer("right", torch.zeros(channels, self.rank))

    def preconditioner(self) -> Preconditioner | None:
        """P; None while nothing has been learned."""
        return Preconditioner(self.left, self.right) if self.is_known else None

    def collect(self, f: Callable[[Tensor], Tensor], z: Tensor, real: Tensor, seed: int) -> None:
        """Probe f at its equilibria.

        Args:
            f: the layer.
            z: equilibria, (B, T, C).
            real: (B, T) bool, the positions to learn from.
            seed: of the probes.
        """
        length = max(_PROBE_LENGTH, 16 * torch.finfo(dtype_of_f(z)).eps)
        sums = JacobianSums.probed(f, z, self.channels, real, seed, length)
        self._collect(sums.gram, sums.cross, sums.positions)

    def _no_sums(self) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(x).double() for x in (self.gram, self.cross, self.positions))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        saved = state_dict.get(prefix + "left")
        if saved is None or saved.shape == self.left.shape:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
            return
        # Learned with another rank: what follows from the sums is made anew.
        own = {prefix + name: getattr(self, name) for name in ("left", "right")}
        super()._load_from_state_dict(state_dict | own, prefix, metadata, strict, missing, *rest)
        self._invert()

    def _renew(self, *sums: Tensor) -> None:
        for old, new in zip((self.gram, self.cross, self.positions), sums):
            old.copy_(old.double() * _KEPT_JACOBIAN + new)
        self._invert()

    def _invert(self) -> None:
        """P from the sums, once there are enough positions in them."""
        if self.positions >= _LEAST_POSITIONS * self.channels:
            sums = JacobianSums(self.gram.double(), self.cross.double(), self.positions)
            p = Preconditioner.from_jacobian(sums.mean_jacobian(), self.rank, _LEAST_SINGULAR)
            self.left.copy_(p.left)
            self.right.copy_(p.right)


class LearnedStart(Learned):
    """z0_t = W [e_t; e_{t-1}; 1], fitted to equilibria by least squares, with e the embeddings.

    It costs a sixth of an evaluation of a Transformer of width C: 2*C*C instead of 12*C*C multiplications per
    position. It looks at two tokens, so it is causal, and no gradient flows through it.

    Args:
        dim: channels of the embeddings, D.
        channels: channels of a state, C.
    """

    gram: Tensor
    cross: Tensor
    weight: Tensor

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        features = 2 * dim + 1
        self.register_buffer("gram", torch.zeros(features, features))
        self.register_buffer("cross", torch.zeros(features, channels))
        self.register_buffer("weight", torch.zeros(channels, features))

    @torch.no_grad()
    def forward(self, embedded: Tensor, before: Tensor | None = None) -> Tensor:
        """Where to start, (B, T, C).

        Args:
            embedded: embeddings, (B, T, D).
            before: that of the position before, (B, 1, D); None: there is none.
        """
        features = self._features(embedded, before)
        rows = rowwise_linear(features.flatten(0, 1), self.weight.to(features))
        return rows.view(*embedded.shape[:2], -1)

    @torch.no_grad()
    def collect(self, embedded: Tensor, state: Tensor, real: Tensor) -> None:
        """Learn from equilibria.

        Args:
            embedded: embeddings, (B, T, D).
            state: equilibria, (B, T, C).
            real: (B, T) bool, the positions to learn from.
        """
        features, states = self._features(embedded, None)[real].float(), state[real].float()
        sound = torch.isfinite(states).all(1, keepdim=True)
        features, states = features * sound, torch.where(sound, states, 0.0)
        self._collect((features.T @ features).double(), (features.T @ states).double())

    @staticmethod
    def _features(embedded: Tensor, before: Tensor | None) -> Tensor:
        if before is None:
            previous = F.pad(embedded, (0, 0, 1, 0))[:, :-1]
        else:
            previous = torch.cat([before.to(embedded), embedded], 1)[:, :-1]
        return torch.cat([embedded, previous, torch.ones_like(embedded[..., :1])], -1)

    def _no_sums(self) -> tuple[Tensor, ...]:
        return torch.zeros_like(self.gram).double(), torch.zeros_like(self.cross).double()

    def _renew(self, *sums: Tensor) -> None:
        for old, new in zip((self.gram, self.cross), sums):
            old.copy_(old.double() * _KEPT_START + new)
        gram = self.gram.double()
        if gram[-1, -1] < _LEAST_POSITIONS * len(gram):  # the last feature is 1: its square is their number
            return
        ridge = (
            _START_RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        )
        solution, info = torch.linalg.solve_ex(gram + ridge, self.cross.double())
        if not int(info) and bool(torch.isfinite(solution).all()):
            self.weight.copy_(solution.T)
