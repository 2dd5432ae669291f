"""The equilibrium layer of a trained model at real text, and one training step through it."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, tasks
from torch import Tensor

from ...equilibrium import Equilibrium, SolveStats
from ...errors import OptionError
from ...models import segment_decoder
from ...solvers import Preconditioner
from ..probe import Probe, ProbedMap, replaced

Map = Callable[[Tensor], Tensor]
# f, the start and the preconditioner that the model has learned -> the state, with its graph
Method = Callable[[Map, Tensor, Preconditioner | None], Tensor]


@dataclass
class InSubsequences:
    """A method for `length` positions at a time, each subsequence with those before it settled."""

    method: Method
    length: int

    def __call__(self, f: Map, z0: Tensor, known: Preconditioner | None) -> Tensor:
        return self.method(f, z0, known)


@dataclass
class Layer:
    """The layer of a trained model at one segment of text.

    Attributes:
        decoder: the model's decoder, whose embeddings are frozen.
        tokens: the segment, (B, T).
        memory: what the segments before it left.
        weighting: the gradient of the loss with respect to the output of the layer, (B, T, C).
    """

    decoder: Any
    tokens: Tensor
    memory: Any
    weighting: Tensor | None = None

    def parameters(self) -> list[Tensor]:
        return [*self.decoder.layer.parameters(), *self.decoder.injection.parameters()]

    def step(self, method: Method, probe: Probe | None = None) -> list[Tensor]:
        """One training step; the gradients of the layer's parameters."""

        def solved(f: Map, z0: Tensor, *options: Any) -> Equilibrium:
            state = method(f if probe is None else ProbedMap(f, probe), z0, options[-1])
            if probe is not None:
                probe.returned.append(state.detach())
            return Equilibrium(state, None, SolveStats.empty(z0.device), SolveStats.empty(z0.device))

        length = method.length if isinstance(method, InSubsequences) else 0
        with replaced(segment_decoder, fixed_point=solved), replaced(self.decoder, subseq_len=length):
            x, _ = self.decoder.extract_features(self.tokens, memory=self.memory)
        if probe is not None:
            probe.backward = True
        return list(torch.autograd.grad((x * self.weighting).sum(), self.parameters()))

    def bound(self) -> tuple[Map, Tensor, Preconditioner | None]:
        """f, the start of a solve, and the preconditioner."""
        found: list[tuple[Map, Tensor, Preconditioner | None]] = []

        def spy(f: Map, z0: Tensor, *options: Any) -> Equilibrium:
            found.append((f, z0, options[-1]))
            return Equilibrium(z0, None, SolveStats.empty(z0.device), SolveStats.empty(z0.device))

        with replaced(segment_decoder, fixed_point=spy):
            self.decoder.extract_features(self.tokens, memory=self.memory)
        return found[0]


def load_layer(args: argparse.Namespace) -> tuple[Layer, Layer]:
    """The layer at real text, in float32 and in float64."""
    if not Path(args.path).is_file():
        raise OptionError(f"--path: there is no checkpoint {args.path}")
    state = checkpoint_utils.load_checkpoint_to_cpu(args.path, {})
    cfg = state["cfg"]
    cfg.task._name, cfg.task.data, cfg.task.tokens_per_sample = "language_modeling", args.data, args.tokens
    task = tasks.setup_task(cfg.task)
    task.load_dataset(args.split)
    cfg.model.mem_len, cfg.model.subseq_len, cfg.model.pretrain_steps = args.memory, 0, 0
    model = task.build_model(cfg.model, from_checkpoint=True)
    model.load_state_dict(state["model"], strict=True, model_cfg=cfg.model)
    decoder = model.decoder.eval().to(args.device)
    decoder.embed_tokens.requires_grad_(False)
    blocks = task.datasets[args.split]
    text = torch.cat([torch.as_tensor(blocks[i]["source"]) for i in range(len(blocks))])
    before = -(-args.memory // args.tokens)
    needed = args.batch * (before + 1) * args.tokens + 1
    if len(text) < needed:
        raise OptionError(
            f"--split {args.split} has {len(text)} tokens, and {needed} are needed; lower --batch or --tokens"
        )
    rows = text[: len(text) // args.batch * args.batch].view(args.batch, -1).to(args.device)
    memory = None
    for k in range(before):
        with torch.no_grad():
            _, extra = decoder.extract_features(
                rows[:, k * args.tokens : (k + 1) * args.tokens], memory=memory
            )
        memory = extra["memory"]
    begin = before * args.tokens
    layer = Layer(decoder, rows[:, begin : begin + args.tokens], memory)
    with torch.no_grad():
        x, _ = decoder.extract_features(layer.tokens, memory=memory)
    x.requires_grad_()
    targets = rows[:, begin + 1 : begin + args.tokens + 1]
    layer.weighting = torch.autograd.grad(_loss(decoder, x, targets), x)[0]
    double = None
    if memory is not None:
        double = replace(memory, state=memory.state.double(), injection=memory.injection.double())
    exact = Layer(copy.deepcopy(decoder).double(), layer.tokens, double, layer.weighting.double())
    return layer, exact


def _loss(decoder: Any, x: Tensor, targets: Tensor) -> Tensor:
    if decoder.adaptive_softmax is None:
        logits = decoder.output_layer(x).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, targets.flatten())
    outputs, clusters = decoder.adaptive_softmax(x, targets.flatten())
    pairs = [(o, t) for o, t in zip(outputs, clusters) if t is not None]
    sums = [torch.nn.functional.cross_entropy(o, t, reduction="sum") for o, t in pairs]
    return torch.stack(sums).sum() / targets.numel()
