"""A decoder that knows a start and a preconditioner: contracts, decoding, a layer of one's own."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from models.builders import (
    EXACT,
    build,
    build_trellis,
    check_causality,
    decode,
    features,
    task,
    taught,
    tokens,
)
from selection import every_pair
from torch import nn

from fairseq_deq.layers.layer import Layer, PreparedLayer
from fairseq_deq.models import incremental, segment_decoder
from fairseq_deq.models.deq_config import DEQLanguageModelConfig
from fairseq_deq.models.deq_decoder import DEQDecoder
from fairseq_deq.models.deq_language_model import DEQLanguageModel
from fairseq_deq.models.segment_decoder import InputOptions

SOLVERS = ("anderson", "broyden", "picard")
PAD = 1
MODELS = {
    "transformer": build,
    "pre-norm": partial(build, decoder_normalize_before="true", wnorm="true"),
    "trellis": partial(build_trellis, solver_scope="recurrence"),
    "trellis, all at once": partial(build_trellis, solver_scope="position", ksize=3),
}
CONTRACTED = ["transformer", "trellis", "trellis, all at once"]


@cache
def _known(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    return taught(MODELS[kind](dtype=dtype, **({"f_eps": 1e-4} if dtype == torch.float32 else {}), **options))


def _solving(model: Any, solver: str, budget: int, rtol: float = 1e-6) -> Any:
    decoder = model.decoder
    decoder.solver = replace(decoder.solver, solver=solver, max_evals=budget, rtol=rtol, memory=0)
    return model


@pytest.fixture
def solves(monkeypatch) -> list[dict[str, Any]]:
    """What every solve of a decoder starts with and knows, from now on."""
    seen: list[dict[str, Any]] = []
    for module, name in ((segment_decoder, "fixed_point"), (incremental, "solve_few")):
        original = getattr(module, name)

        def noted(f: Any, z0: torch.Tensor, *rest: Any, original: Any = original) -> Any:
            result = original(f, z0, *rest)
            inner = getattr(result, "result", result)
            seen.append({"z0": z0, "preconditioner": rest[-1], "nfe": inner.nfe, "shape": z0.shape})
            return result

        monkeypatch.setattr(module, name, noted)
    return seen


# ---------------------------------------------------------------------- contracts


@every_pair(solver=SOLVERS, kind=CONTRACTED, dtype=[torch.float32, torch.float64])
def test_a_changed_token_leaves_all_before_it_bitwise_unchanged(solver, kind, dtype, thorough):
    model = _known(kind, dtype)
    # A recurrence is solved position after position: the budget is that of one of them.
    for budget in (1, 2, 5, 13) if kind == "trellis" and not thorough else (1, 2, 3, 4, 6, 9, 13, 20):
        # The start itself depends on its token, with a budget of 1 too.
        check_causality(_solving(model, solver, budget), budget)


@every_pair(solver=SOLVERS, kind=CONTRACTED, padded={"whole": False, "padded": True})
def test_a_sample_does_not_depend_on_its_batch_mates(solver, kind, padded):
    model, source = _known(kind, torch.float32), tokens(4, 12)
    if padded:
        source[1, :4] = source[2, -5:] = PAD
        source[3, :2] = PAD
    for budget in (1, 3, 9, 20):
        _solving(model, solver, budget)
        together = features(model, source)
        for row in range(4):
            alone = features(model, source[row : row + 1])
            real = source[row] != PAD
            assert torch.equal(alone[0, real], together[row, real]), (budget, row)


def test_left_padding_does_not_change_the_tokens_after_it():
    for kind in MODELS:
        model, source = _known(kind), tokens(2, 10)
        _solving(model, "broyden", 300, 1e-10)
        padded = torch.cat([torch.full((2, 3), PAD), source], 1)
        assert torch.allclose(features(model, padded)[:, 3:], features(model, source), atol=1e-8), kind


# ---------------------------------------------------------------------- what is known, and when


def test_as_long_as_nothing_is_known_the_start_is_zero_and_there_is_no_preconditioner(solves):
    source = tokens(3, 9)
    bare = features(build(preconditioner_rank=0, learned_start="false"), source)
    assert torch.equal(features(build(), source), bare)
    assert len(solves) == 2
    assert all(not solve["z0"].any() and solve["preconditioner"] is None for solve in solves)


@pytest.mark.parametrize("kind", ["transformer", "trellis, all at once"])
def test_evaluation_uses_what_is_known_and_finds_the_same(kind, solves):
    source = tokens(3, 12, seed=8)
    unknown, known = MODELS[kind](f_eps=1e-4), taught(MODELS[kind](f_eps=1e-4))
    solves.clear()
    expected, found = features(unknown, source), features(known, source)
    assert torch.allclose(found, expected, atol=1e-2)
    before, after = solves
    assert not before["z0"].any()
    assert before["preconditioner"] is None
    assert after["z0"].norm() > 0.1
    assert after["preconditioner"] is not None
    # Random weights that share little: only of a Transformer is it told beforehand that it pays.
    assert after["nfe"] < before["nfe"] or kind != "transformer"


def test_a_start_has_no_gradient():
    model = taught(build(f_eps=1e-10)).train()
    plain = build(f_eps=1e-10).train()
    source = tokens(2, 8)
    gradients = []
    for each in (model, plain):
        x, _ = each.extract_features(source)
        x.sin().sum().backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        assert torch.allclose(gradients[0][name], gradient, atol=1e-7), name


def test_it_is_learned_in_some_updates_of_the_training_alone():
    model, source = build(f_eps=1e-3, b_eps=1e-3), tokens(8, 12)
    decoder = model.decoder

    def renewals() -> tuple[int, int]:
        return int(decoder.knowledge.learned_start.renewals), int(
            decoder.knowledge.learned_preconditioner.renewals
        )

    model.eval().extract_features(source)
    model.set_num_updates(1)
    assert renewals() == (0, 0)  # evaluation teaches nothing
    model.set_num_updates(0)
    model.train()
    seen = []
    for update in range(23):
        model.extract_features(source)[0].sum().backward()
        model.set_num_updates(update + 1)
        seen.append(renewals())
    assert seen[0] == (1, 1)  # as soon as can be
    assert seen[9] == (1, 1)
    assert seen[10] == (2, 2)  # and then every tenth update
    assert seen[19] == (2, 2)
    assert seen[20:] == [(3, 3)] * 3
    with torch.no_grad():
        decoder.num_updates = 30
        model.extract_features(source)
        model.set_num_updates(31)
    assert renewals() == (3, 3)  # without gradients nothing is trained


def test_micro_batches_teach_together():
    whole, parts = (build(f_eps=1e-10).train() for _ in range(2))
    source = tokens(16, 16)
    for model, batches in ((whole, [source]), (parts, source.split(8))):
        for batch in batches:
            model.extract_features(batch)[0].sum().backward()
        model.set_num_updates(1)
    one, other = (model.decoder.knowledge.learned_start.weight for model in (whole, parts))
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    assert (
        whole.decoder.knowledge.learned_start.renewals == parts.decoder.knowledge.learned_start.renewals == 1
    )


@pytest.mark.parametrize("subseq_len", [1, 5])
def test_subsequences_teach_the_start_that_the_whole_teaches(subseq_len):
    """The token before the first of a subsequence is that of the text."""
    whole, parts = (build(f_eps=1e-10, subseq_len=length).train() for length in (0, subseq_len))
    for model in (whole, parts):
        model.extract_features(tokens(12, 16))[0].sum().backward()
        model.set_num_updates(1)
    one, other = (model.decoder.knowledge.learned_start.weight for model in (whole, parts))
    assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def test_a_stack_neither_learns_nor_uses_what_is_known():
    model = build(pretrain_steps=3).train()
    for update in range(3):
        model.extract_features(tokens(12, 16))[0].sum().backward()
        model.set_num_updates(update + 1)
    assert not model.decoder.knowledge.learned_start.is_known
    assert not model.decoder.knowledge.learned_preconditioner.is_known
    model.extract_features(tokens(12, 16))[0].sum().backward()
    model.set_num_updates(4)
    assert model.decoder.knowledge.learned_start.is_known


def test_positions_that_did_not_converge_teach_nothing():
    model = build(f_thres=2, f_eps=1e-10).train()
    model.extract_features(tokens(12, 16))[0].sum().backward()
    model.set_num_updates(1)
    assert not model.decoder.knowledge.learned_start.weight.any()
    assert not model.decoder.knowledge.learned_preconditioner.left.any()


# ---------------------------------------------------------------------- decoding


@every_pair(kind=list(MODELS), solver=["anderson", "broyden"], prompt=[1, 6])
def test_decoding_equals_teacher_forcing(kind, solver, prompt):
    model, source = _solving(_known(kind), solver, 300, 1e-10), tokens(3, 14)
    with torch.no_grad():
        whole, _ = model(source)
    assert torch.allclose(decode(model, source, steps_at_once=prompt)[0], whole[:, prompt - 1 :], atol=1e-8)


@pytest.mark.parametrize("kind", MODELS)
def test_decoding_follows_the_beams(kind):
    model = _solving(_known(kind), "broyden", 300, 1e-10)
    generator = torch.Generator().manual_seed(5)
    decoded, source = decode(
        model, tokens(4, 9), reorder=lambda end: torch.randint(0, 4, (4,), generator=generator)
    )
    with torch.no_grad():
        whole, _ = model(source)
    assert torch.allclose(decoded, whole, atol=1e-8)


@pytest.mark.parametrize("kind", ["transformer", "trellis, all at once"])
def test_decoding_starts_where_the_whole_text_starts_and_is_preconditioned(kind, solves):
    model, source = _solving(_known(kind), "anderson", 60), tokens(2, 12)
    features(model, source)
    whole = solves[-1]
    solves.clear()
    decode(model, source, steps_at_once=5)
    assert [solve["shape"][1] for solve in solves] == [5, *[1] * 7]
    for solve in solves:
        assert solve["preconditioner"] is not None
    for position, solve in enumerate(solves[1:], 5):
        assert torch.allclose(solve["z0"][:, 0], whole["z0"][:, position], atol=1e-12), position


def test_chunks_of_tokens_and_a_memory_equal_teacher_forcing():
    model = taught(build(mem_len=7, f_solver="anderson"))
    source, state = tokens(2, 20), {}
    with torch.no_grad():
        _, extra = model(source[:, :5])
        whole, _ = model(source[:, 5:], memory=extra["memory"])
        for end in (4, 5, 9, 15):
            given = {"memory": extra["memory"]} if not state else {}
            x, _ = model.decoder(source[:, 5 : 5 + end], incremental_state=state, **given)
            assert torch.allclose(x[:, 0], whole[:, end - 1], atol=1e-8), end


# ---------------------------------------------------------------------- a layer of one's own


class OwnLayer(Layer):
    """z_t = tanh(W z_t + mean of z before t + u_t): no `restrict`, no `adjoint`, no `direction`."""

    def __init__(self, width: int) -> None:
        super().__init__(state_dim=width, injection_dim=width)
        self.linear = nn.Linear(width, width, bias=False)

    def initialize(self, initializer: Any) -> None:
        with torch.no_grad():
            self.linear.weight.normal_(std=0.7 / self.state_dim**0.5)

    def memory_length(self, mem_len: int) -> int:
        return 0

    def prepare(self, masks: None) -> OwnPrepared:
        return OwnPrepared(self)


class OwnPrepared(PreparedLayer):
    """The context is the sum of the states behind and their number."""

    def __init__(self, layer: OwnLayer) -> None:
        self.layer = layer

    def context(self, record: torch.Tensor, injection: torch.Tensor, context: OwnPast | None) -> OwnPast:
        total, count = record.sum(1, keepdim=True), record.shape[1]
        if context is None:
            return OwnPast(total, count)
        return OwnPast(context.total + total, context.count + count)

    def bind(
        self, injection: torch.Tensor, context: OwnPast | None, padding: Any = None, start: int = 0
    ) -> Any:
        weight = self.layer.linear.weight
        held, behind = (0.0, 0) if context is None else (context.total, context.count)
        count = (
            torch.arange(behind, behind + injection.shape[1], dtype=injection.dtype)
            .clamp(min=1)
            .view(1, -1, 1)
        )

        def f(z: torch.Tensor) -> torch.Tensor:
            before = 0.5 * (held + z.cumsum(1) - z) / count
            return torch.tanh(z @ weight.T + before + injection)

        return f


class OwnPast:
    def __init__(self, total: torch.Tensor, count: int) -> None:
        self.total, self.count = total, count

    def rows(self, index: torch.Tensor) -> OwnPast:
        return OwnPast(self.total.index_select(0, index), self.count)


def _own(**options: Any) -> DEQLanguageModel:
    torch.manual_seed(0)
    cfg = DEQLanguageModelConfig(**(EXACT | options))
    decoder = DEQDecoder(cfg, task().source_dictionary, OwnLayer(16), InputOptions(scale=4.0, dropout=0.0))
    return DEQLanguageModel(decoder).double().eval()


def test_a_layer_of_ones_own_learns_and_is_solved_and_decoded_with_what_it_learned(solves):
    source = tokens(2, 9)
    expected = features(_own(), source)
    model = taught(_own())
    solves.clear()
    found = features(model, source)
    assert torch.allclose(found, expected, atol=1e-8)
    assert solves[0]["z0"].norm() > 0.1
    assert solves[0]["preconditioner"] is not None
    with torch.no_grad():
        whole, _ = model(source)
    assert torch.allclose(decode(model, source, steps_at_once=3)[0], whole[:, 2:], atol=1e-8)
    assert torch.allclose(decode(model, source)[0], whole, atol=1e-8)


def test_its_gradient_is_that_of_a_long_unroll():
    source, gradients = tokens(2, 7), []
    for model in (taught(_own()).train(), _own(gradient="unroll", f_thres=200).train()):
        model.extract_features(source)[0].sin().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        assert torch.allclose(gradients[0][name], gradient, atol=1e-8), name
