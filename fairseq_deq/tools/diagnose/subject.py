"""The model under examination, and the text that it is examined at."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.data import encoders
from torch import Tensor

from ...equilibrium import Equilibrium, SolveStats
from ...errors import OptionError
from ...generation.text import TextEncoder, read_lines
from ...layers.memory import Memory, MemoryCarrier
from ...solvers import FixedPoint, Preconditioner, SolverConfig, solve
from ...tasks._streams import StreamBatches, StreamText
from ..evaluation import require_equilibrium
from ..probe import replaced

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """The layer f of a model at one block of text.

    Attributes:
        f: the map that solves are of.
        z0: where they start, (B, T, C).
        preconditioner: what they know of f; None: nothing.
        solver: their options.
        tokens, targets: the block, and the tokens after each, (B, T).
        memory: what the blocks before it left.
        state: the equilibrium that the model finds, (B, T, C).
        result: the solve that found it.
    """

    f: Map
    z0: Tensor
    preconditioner: Preconditioner | None
    solver: SolverConfig
    tokens: Tensor
    targets: Tensor
    memory: Memory | None
    result: FixedPoint

    @property
    def state(self) -> Tensor:
        return self.result.state

    @property
    def positions(self) -> int:
        """Number of positions, B*T."""
        return self.tokens.numel()

    def rows(self, count: int, subject: Subject) -> Layer:
        """The same at the first `count` rows."""
        memory = self.memory
        if memory is not None:
            memory = Memory(memory.state[:count], memory.injection[:count])
        return subject.layer_at(self.tokens[:count], self.targets[:count], memory)


@dataclass(frozen=True)
class Subject:
    """A trained model in evaluation mode, and a text.

    Attributes:
        path: where its checkpoint is.
        model: the model.
        dictionary: fairseq's.
        options: the model's options, as the checkpoint has them.
        updates: updates of its training.
        text: the text as streams, one per row, in blocks.
        source: what the text is called.
        tokens_in_all: tokens of that text, of which `text` has the first ones.
    """

    path: str
    model: Any
    dictionary: Any
    options: dict[str, Any]
    updates: int
    text: StreamBatches
    source: str
    tokens_in_all: int

    @property
    def decoder(self) -> Any:
        return self.model.decoder

    def batches(self, blocks: int | None = None) -> Iterator[dict[str, Any]]:
        """fairseq's batches of the first `blocks` blocks (None: all), each with the memory before it."""
        carrier = MemoryCarrier()
        for k in range(len(self.text) if blocks is None else min(blocks, len(self.text))):
            carrier = MemoryCarrier(carrier)
            batch = self.text[k]
            yield {**batch, "net_input": {**batch["net_input"], "memory": carrier}}

    def loss(self, layer: Layer) -> tuple[Tensor, dict[str, Any]]:
        """The mean loss of the layer's block, in nats, with its graph; and the model's extra output."""
        output = self.model(layer.tokens, memory=layer.memory)
        return self.loss_of(output, layer.targets), output[1]

    def loss_of(self, output: tuple[Tensor, dict[str, Any]], targets: Tensor) -> Tensor:
        """The mean loss, in nats, of the model's output at targets (B, T)."""
        log_probs = self.model.get_normalized_probs(output, log_probs=True, sample={"target": targets})
        return -log_probs.gather(-1, targets.unsqueeze(-1)).mean()

    @torch.no_grad()
    def layer(self) -> Layer:
        """The layer at the second block, or the first where there is no other."""
        memory, block = None, self.text[0]
        if len(self.text) > 1:
            _, extra = self.decoder.extract_features(block["net_input"]["src_tokens"])
            memory, block = extra["memory"], self.text[1]
        return self.layer_at(block["net_input"]["src_tokens"], block["target"], memory)

    @torch.no_grad()
    def layer_at(self, tokens: Tensor, targets: Tensor, memory: Memory | None) -> Layer:
        """The layer at a block: its tokens (B, T), the tokens after each, and the memory before it."""
        found: list[tuple[Map, Tensor]] = []

        def note(f: Map, z0: Tensor, stats: tuple[SolveStats, SolveStats]) -> Equilibrium:
            found.append((f, z0))
            return Equilibrium(z0, None, *stats)

        with solving_by(self.decoder, note), replaced(self.decoder, subseq_len=0):
            self.decoder.extract_features(tokens, memory=memory)
        (f, z0), known = found[0], self.decoder.knowledge.preconditioner()
        solver = self.decoder.solver
        return Layer(f, z0, known, solver, tokens, targets, memory, solve(f, z0, solver, known))


@contextmanager
def solving_by(decoder: Any, method: Callable[..., Equilibrium]) -> Iterator[None]:
    """Let a decoder's equilibria be what `method` makes of f, the start and the statistics of its solves."""
    decoder.find_equilibrium = method
    try:
        yield
    finally:
        del decoder.find_equilibrium


def load(args: argparse.Namespace, path: str) -> Subject:
    """The model of a checkpoint, and the text that the options name.

    Args:
        args: the options of the command.
        path: the checkpoint.
    Raises:
        OptionError: the checkpoint, the text or an option cannot be used; the sentence says why.
    """
    overrides = {"data": args.data} | args.model_overrides
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task([path], arg_overrides=overrides)
    model = models[0].eval()
    require_equilibrium(model, path)
    # What fails is what the report is about.
    model.decoder.solver = replace(model.decoder.solver, policy="best")
    dictionary = task.source_dictionary
    name, tokens = args.input or args.gen_subset, _tokens(args, task, dictionary)
    kept = min(args.tokens, len(tokens))
    block = args.tokens_per_sample or int(getattr(cfg.task, "tokens_per_sample", 0) or 64)
    block = min(block, kept)
    rows = max(1, min(args.rows, kept // block))
    stream = StreamText(name, [tokens[:kept]], np.array([kept]), dictionary.eos(), dictionary.pad())
    text = StreamBatches(stream, rows, 0, rows, block, whole_blocks=True)
    options = {str(key): cfg.model[key] for key in cfg.model if cfg.model[key] is not None}
    return Subject(path, model, dictionary, options, _updates(path), text, name, len(tokens))


def _updates(path: str) -> int:
    state = checkpoint_utils.load_checkpoint_to_cpu(path, {})
    history = state.get("optimizer_history") or [{}]
    return int(history[-1].get("num_updates", 0))


def _tokens(args: argparse.Namespace, task: Any, dictionary: Any) -> Tensor:
    """The text, (n,).

    Raises:
        OptionError: there is none, or too little of it.
    """
    if args.input is not None:
        bpe = encoders.build_bpe(_coder(args, "bpe"))
        tokenizer = encoders.build_tokenizer(_coder(args, "tokenizer"))
        encode = TextEncoder.of(dictionary, tokenizer, bpe)
        lines = [encode(text).tokens for text in read_lines(args.input)]
        tokens = torch.cat(lines) if lines else torch.zeros(0, dtype=torch.long)
        option = f"--input {args.input}"
    else:
        task.load_dataset(args.gen_subset)
        data = task.datasets[args.gen_subset]
        option = f"--gen-subset {args.gen_subset}"
        if isinstance(data, StreamText):
            tokens = data.span(0, len(data))
        else:
            tokens = torch.cat([torch.as_tensor(data[i]["target"]) for i in range(len(data))])
    if len(tokens) < 2:
        raise OptionError(f"{option}: the text has {len(tokens)} tokens, and at least 2 are needed")
    return tokens


def _coder(args: argparse.Namespace, kind: str) -> argparse.Namespace:
    """What fairseq makes a tokeniser or a BPE of."""
    options = {"sentencepiece_model": args.sentencepiece_model, "bpe_codes": args.bpe_codes}
    return argparse.Namespace(**{kind: getattr(args, kind)}, **options, moses_no_escape=args.moses_no_escape)


def rows_not_finite(path: str) -> list[str]:
    """The weights of a checkpoint that hold NaN or infinity, each with its rows, in words."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        weights = torch.load(path, map_location="cpu", weights_only=True)["model"]
    found = []
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
            continue
        rows = (~torch.isfinite(tensor.reshape(tensor.shape[0] if tensor.dim() else 1, -1))).any(1)
        numbers = rows.nonzero().flatten().tolist()
        shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
        found.append(f"{name}, {len(numbers)} of {len(rows)} rows ({shown})")
    return found
