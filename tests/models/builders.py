"""Small models for the tests, with weights that are far from a trivial equilibrium."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from fairseq.data import Dictionary

import fairseq_deq  # noqa: F401  (registers the models)
from fairseq_deq.layers.composition import Composition
from fairseq_deq.models import incremental, segment_decoder
from fairseq_deq.models.deq_transformer_lm import DEQTransformerConfig, DEQTransformerLanguageModel
from fairseq_deq.models.deq_trellisnet_lm import DEQTrellisNetConfig, DEQTrellisNetLanguageModel

VOCABULARY = 52


def dictionary(types: int = VOCABULARY - 4) -> Dictionary:
    """A dictionary of made-up words; fairseq adds four symbols."""
    words = Dictionary()
    for i in range(types):
        words.add_symbol(f"word{i}")
    return words


def task(types: int = VOCABULARY - 4) -> Any:
    """What a model asks of a task."""
    words = dictionary(types)
    return SimpleNamespace(source_dictionary=words, target_dictionary=words)


# Options that both families have, for solves to full precision.
EXACT = {
    "decoder_embed_dim": 16,
    "init_std": 0.2,
    "f_solver": "broyden",
    "b_solver": "broyden",
    "f_thres": 300,
    "f_eps": 1e-10,
    "b_thres": 300,
    "b_eps": 1e-10,
    "seed": 0,
    "tokens_per_sample": 16,
    "max_target_positions": None,
    "add_bos_token": False,
}


def build(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> DEQTransformerLanguageModel:
    """A model of width 16 in evaluation mode; `options` are those of the command line.

    A random cell can have several equilibria. Here attention speaks louder than the residual path, and the
    input louder than the state, so that f contracts and the equilibrium is the only one.
    """
    small = EXACT | {"decoder_ffn_embed_dim": 32, "decoder_attention_heads": 2, "seed": seed}
    torch.manual_seed(seed)
    model = DEQTransformerLanguageModel.build_model(DEQTransformerConfig(**(small | options)), task())
    with torch.no_grad():
        model.decoder.injection.weight.mul_(2.0)
        for cell in layers_of(model):
            for linear, gain in ((cell.qkv, 0.5), (cell.out, 8.0), (cell.ffn_out, 0.5)):
                (linear.weight_v if linear.weight_g is None else linear.weight_g).mul_(gain)
            for name, parameter in cell.named_parameters():  # what begins as nothing
                if name.endswith("norm.gain"):
                    parameter.uniform_(0.7, 1.3)
                elif name.endswith("norm.bias") or name == "ffn_gate.bias":
                    parameter.normal_(0.0, 0.3)
    return model.to(dtype).eval()


def layers_of(model: Any) -> list[Any]:
    """The layers that the model's f is made of."""
    layer = model.decoder.layer
    return layer.parts if isinstance(layer, Composition) else [layer]


def build_trellis(
    seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any
) -> DEQTrellisNetLanguageModel:
    """A TrellisNet of width 16 and state 2*24 in evaluation mode; `options` are those of the command line."""
    torch.manual_seed(seed)
    small = EXACT | {"nhid": 8, "init_std": 0.4, "seed": seed}
    model = DEQTrellisNetLanguageModel.build_model(DEQTrellisNetConfig(**(small | options)), task())
    return model.to(dtype).eval()


def features(model: Any, source: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """The features of `source` (B, T), without gradients."""
    with torch.no_grad():
        return model.extract_features(source, **inputs)[0]


def check_causality(model: Any, budget: int) -> None:
    """A changed token changes itself and bitwise nothing before it, with `budget` evaluations of f."""
    source = tokens(3, 17)
    before = features(model, source)
    for t in (0, 7, 16):
        changed = source.clone()
        changed[:, t] = (changed[:, t] - 3) % 48 + 4
        after = features(model, changed)
        assert torch.equal(after[:, :t], before[:, :t])
        # One evaluation only measures the residual of the start.
        assert budget == 1 or not torch.equal(after[:, t], before[:, t])


def taught(model: Any, batch: int = 12, length: int = 16) -> Any:
    """The model after a training pass that changes no weight: it knows a start and a preconditioner."""
    decoder = model.decoder
    exact = decoder.solver, decoder.gradient
    decoder.solver = replace(exact[0], rtol=max(exact[0].rtol, 1e-4))  # enough to learn from
    decoder.gradient = replace(exact[1], solver=decoder.solver)
    model.train()
    x, _ = model.extract_features(tokens(batch, length, seed=100))
    x.sum().backward()
    model.set_num_updates(1)
    model.zero_grad()
    decoder.solver, decoder.gradient = exact
    assert decoder.knowledge.learned_start.is_known
    assert decoder.knowledge.learned_preconditioner.is_known
    assert decoder.knowledge.learned_start.weight.norm() > 0.1
    assert decoder.knowledge.learned_preconditioner.left.norm() > 1e-3
    return model.eval()


def decode(
    model: Any,
    source: torch.Tensor,
    steps_at_once: int = 1,
    reorder: Callable[[int], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of incremental decoding, (B, S, V), and the tokens they belong to.

    Args:
        model: a model of this package.
        source: tokens (B, T).
        steps_at_once: length of the prompt, which is seen in one go.
        reorder: from the number of tokens seen to the rows that go on.
    """
    state: dict[str, Any] = {}
    out: list[torch.Tensor] = []
    for end in range(steps_at_once, source.shape[1] + 1):
        with torch.no_grad():
            x, _ = model.decoder(source[:, :end], incremental_state=state)
        out.append(x)
        if reorder is not None:
            order = reorder(end)
            model.decoder.reorder_incremental_state(state, order)
            source = source.index_select(0, order)
            out = [o.index_select(0, order) for o in out]
    return torch.cat(out, 1), source


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random tokens (B, T), no special symbols."""
    return torch.randint(4, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def count_solves(monkeypatch: Any) -> list[tuple[int, int]]:
    """Rows and positions of every solve of a decoder from now on, in a list that grows."""
    solves: list[tuple[int, int]] = []
    for module, name in ((segment_decoder, "fixed_point"), (incremental, "solve_few")):
        original = getattr(module, name)

        def counted(f: Any, z0: torch.Tensor, *rest: Any, original: Any = original) -> Any:
            solves.append((z0.shape[0], z0.shape[1]))
            return original(f, z0, *rest)

        monkeypatch.setattr(module, name, counted)
    return solves
