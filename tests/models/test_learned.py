"""What a model learns of its solves: fits, workers, checkpoints and precisions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models.builders import build, build_trellis, taught, tokens
from problems import Neighbours, expanding_neighbours

from fairseq_deq.jacobian import JacobianSums
from fairseq_deq.models import learned
from fairseq_deq.models.learned import Learned, LearnedPreconditioner, LearnedStart
from fairseq_deq.solvers import Preconditioner

D, C = 3, 5
BUILDERS = {"transformer": build, "trellis": build_trellis}


def _draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _lesson(seed: int, batch: int = 8, length: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings, equilibria that are linear in the last two of them, and what is real."""
    embedded = _draw(batch, length, D, seed=seed)
    own, before, constant = _draw(C, D, seed=90), _draw(C, D, seed=91), _draw(C, seed=92)
    earlier = torch.nn.functional.pad(embedded, (0, 0, 1, 0))[:, :-1]
    return embedded, embedded @ own.T + earlier @ before.T + constant, torch.ones(batch, length).bool()


def _started(*seeds: int) -> LearnedStart:
    start = LearnedStart(D, C)
    for seed in seeds:
        start.collect(*_lesson(seed))
    start.renew()
    return start


def _buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


# ---------------------------------------------------------------------- the start


def test_what_is_linear_in_the_last_two_tokens_is_told():
    embedded, states, _ = _lesson(5)
    start = _started(0)
    assert (start(embedded) - states).norm() < 0.02 * states.norm()
    assert not start(embedded).requires_grad


def test_one_token_further_on_and_no_earlier_one_sees_a_token():
    start, embedded = _started(0), _draw(2, 10, D, seed=3)
    before, changed = start(embedded), embedded.clone()
    changed[:, 4] += 1.0
    moved = (start(changed) != before).any(-1)
    assert moved[:, 4:6].all()
    assert not moved[:, :4].any()
    assert not moved[:, 6:].any()


def test_a_row_is_the_same_alone_and_the_token_before_can_be_given():
    start, embedded = _started(0), _draw(5, 10, D, seed=3)
    whole = start(embedded)
    assert torch.equal(start(embedded[3:4]), whole[3:4])
    assert torch.equal(start(embedded[:, 6:], embedded[:, 5:6]), whole[:, 6:])
    assert not torch.allclose(start(embedded[:, 6:]), whole[:, 6:], atol=0.1)


def test_padding_and_what_is_not_finite_teach_nothing():
    embedded, states, real = _lesson(0)
    clean, spoilt = LearnedStart(D, C), LearnedStart(D, C)
    real[2, 5:] = False
    clean.collect(embedded, states, real)
    states = states.clone()
    states[2, 5:] = 1e6
    states[4, 3], real_without = float("nan"), real.clone()
    spoilt.collect(embedded, states, real)
    clean = LearnedStart(D, C)
    real_without[4, 3] = False
    clean.collect(embedded, states, real_without)
    clean.renew()
    spoilt.renew()
    assert torch.allclose(spoilt.weight, clean.weight, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(spoilt.weight).all()


def test_new_lessons_count_more_than_old_ones():
    start = _started(0)
    embedded, states, real = _lesson(1)
    errors = []
    for _ in range(6):
        start.collect(embedded, -2.0 * states, real)
        start.renew()
        errors.append(float((start(embedded) + 2.0 * states).norm() / states.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.3
    assert errors[-1] < 0.5 * errors[0]
    assert start.renewals == 7


# ---------------------------------------------------------------------- the preconditioner


def _probed(*seeds: int, rank: int = 16) -> LearnedPreconditioner:
    f = expanding_neighbours(torch.float32)
    module = LearnedPreconditioner(16, rank)
    for seed in seeds:
        module.collect(f, torch.zeros_like(f.u) + 0.5, torch.ones(f.u.shape[:2]).bool(), seed)
    module.renew()
    return module


def test_the_preconditioner_is_that_of_the_mean_jacobian():
    f = expanding_neighbours(torch.float32)
    z = torch.zeros_like(f.u) + 0.5
    sums = JacobianSums.probed(f, z, 16, seed=7)
    expected = Preconditioner.from_jacobian(sums.mean_jacobian(), 6)
    rows = _draw(9, 16, seed=1)
    assert torch.allclose(
        _probed(7, rank=6).preconditioner()(rows), expected.to(rows)(rows), rtol=1e-3, atol=1e-3
    )


def test_rank_and_channels():
    assert LearnedPreconditioner(4, 32).left.shape == (4, 4)
    assert build(preconditioner_rank=5).decoder.knowledge.learned_preconditioner.left.shape == (16, 5)
    trellis = build_trellis(solver_scope="recurrence").decoder
    assert trellis.knowledge.learned_preconditioner.channels == trellis.layer.own_dim == 24
    trellis = build_trellis(solver_scope="position").decoder
    assert trellis.knowledge.learned_preconditioner.channels == trellis.layer.state_dim == 48


def test_too_few_positions_make_no_preconditioner_and_no_start():
    module, f = LearnedPreconditioner(16, 16), expanding_neighbours(torch.float32, batch=1, length=3)
    module.collect(f, torch.zeros_like(f.u) + 0.5, torch.ones(1, 3).bool(), 0)
    module.renew()
    rows = _draw(9, 16, seed=1)
    known = module.preconditioner()
    assert known is None or torch.equal(known(rows), rows)
    start = LearnedStart(D, C)
    start.collect(*_lesson(0, batch=1, length=6))
    start.renew()
    assert not start.weight.any()


# ---------------------------------------------------------------------- workers


def _unite(monkeypatch: Any, others: list[tuple[torch.Tensor, ...]]) -> None:
    """From now on there is another worker, which has collected these sums."""
    waiting = [total for sums in others for total in sums]
    monkeypatch.setattr(learned.distributed_utils, "get_data_parallel_world_size", lambda: 2)
    monkeypatch.setattr(learned.distributed_utils, "get_data_parallel_group", lambda: None)
    monkeypatch.setattr(
        learned.distributed_utils, "all_reduce", lambda total, group: total.add_(waiting.pop(0))
    )


@pytest.mark.parametrize("mine", [(0,), ()], ids=["both", "the other alone"])
def test_two_workers_know_what_one_with_both_batches_knows(mine, monkeypatch):
    other, together, split = LearnedStart(D, C), LearnedStart(D, C), LearnedStart(D, C)
    for seed in mine:
        together.collect(*_lesson(seed))
        split.collect(*_lesson(seed))
    for seed in (1, 2):
        together.collect(*_lesson(seed))
        other.collect(*_lesson(seed))
    together.renew()
    _unite(monkeypatch, [other._collected])
    split.renew()
    for name, buffer in _buffers(together).items():
        assert torch.allclose(_buffers(split)[name], buffer, rtol=1e-5, atol=1e-6), name
    assert split.is_known


def test_two_workers_share_what_their_probes_found(monkeypatch):
    f = expanding_neighbours(torch.float32)
    z, real = torch.zeros_like(f.u) + 0.5, torch.ones(f.u.shape[:2]).bool()
    together, split, other = (LearnedPreconditioner(16, 8) for _ in range(3))
    for module, seeds in ((together, (0, 1)), (split, (0,)), (other, (1,))):
        for seed in seeds:
            module.collect(f, z, real, seed)
    together.renew()
    _unite(monkeypatch, [other._collected])
    split.renew()
    rows = _draw(9, 16, seed=1)
    assert torch.allclose(split.preconditioner()(rows), together.preconditioner()(rows), rtol=1e-3, atol=1e-3)
    assert split.renewals == together.renewals == 1


def test_a_worker_that_has_nothing_to_tell_reduces_all_the_same(monkeypatch):
    reduced = []
    monkeypatch.setattr(learned.distributed_utils, "get_data_parallel_world_size", lambda: 2)
    monkeypatch.setattr(learned.distributed_utils, "get_data_parallel_group", lambda: None)
    monkeypatch.setattr(
        learned.distributed_utils, "all_reduce", lambda total, group: reduced.append(total.shape)
    )
    for module in (LearnedStart(D, C), LearnedPreconditioner(16, 8)):
        full = copy.deepcopy(module)
        if isinstance(full, LearnedStart):
            full.collect(*_lesson(0))
        else:
            f = expanding_neighbours(torch.float32)
            full.collect(f, torch.zeros_like(f.u) + 0.5, torch.ones(f.u.shape[:2]).bool(), 0)
        shapes = [total.shape for total in full._collected]
        types = [total.dtype for total in full._collected]
        module.renew()
        assert reduced == shapes
        assert [total.dtype for total in module._no_sums()] == types == [torch.float64] * len(types)
        assert not module.is_known
        reduced.clear()


# ---------------------------------------------------------------------- checkpoints and precisions


def _is_learned(name: str) -> bool:
    return "knowledge" in name


@pytest.mark.parametrize("family", BUILDERS)
def test_an_old_checkpoint_loads_without_complaint_and_knows_nothing(family):
    model = taught(BUILDERS[family]())
    state = {name: tensor for name, tensor in model.state_dict().items() if not _is_learned(name)}
    assert len(state) < len(model.state_dict())
    fresh = BUILDERS[family](seed=1)
    fresh.load_state_dict(state, strict=True)
    assert not fresh.decoder.knowledge.learned_start.is_known
    assert fresh.decoder.knowledge.learned_preconditioner.preconditioner() is None
    for name, tensor in state.items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_a_new_checkpoint_brings_all_that_is_known():
    model, fresh = taught(build()), build(seed=1)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert fresh.decoder.knowledge.learned_start.is_known
    assert fresh.decoder.knowledge.learned_preconditioner.is_known
    source = tokens(2, 9)
    with torch.no_grad():
        (x, extra), (y, again) = model.extract_features(source), fresh.extract_features(source)
    assert torch.equal(x, y)
    assert extra["equilibria"][0].result.nfe == again["equilibria"][0].result.nfe


@pytest.mark.parametrize("name", ["learned_start.weight", "learned_preconditioner.right"])
def test_a_half_missing_one_is_reported(name):
    state = taught(build()).state_dict()
    del state[f"decoder.knowledge.{name}"]
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "decoder.knowledge.{name}"'):
        build().load_state_dict(state, strict=True)


@pytest.mark.parametrize("options", [{"preconditioner_rank": 0}, {"learned_start": "false"}], ids=str)
def test_what_is_switched_off_is_not_there(options):
    knowledge = build(**options).decoder.knowledge
    names = set(dict(knowledge.named_buffers()))
    off = "learned_preconditioner" if "preconditioner_rank" in options else "learned_start"
    assert getattr(knowledge, off) is None
    assert not any(name.startswith(off) for name in names)
    assert any(name.startswith("learned_") for name in names)


@pytest.mark.parametrize(
    "options",
    [
        {"preconditioner_rank": 0},
        {"preconditioner_rank": 8},
        {"learned_start": "false"},
        {"keep_converged": 0.0},
    ],
    ids=str,
)
def test_a_checkpoint_loads_where_these_options_are_changed(options):
    """As `--model-overrides` does, or a run that goes on with other options."""
    state = taught(build()).state_dict()
    other = build(seed=1, **options)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other.decoder.injection.weight, state["decoder.injection.weight"])
    assert torch.isfinite(other.extract_features(tokens(2, 5))[0]).all()


def _modules() -> list[Learned]:
    start, probed = _started(0), _probed(0, 1)
    with torch.no_grad():
        start.gram.mul_(1e6)  # beyond float16
    return [start, probed]


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_a_narrow_model_keeps_its_buffers_bit_for_bit(cast, index):
    module = _modules()[index]
    before = _buffers(module)
    getattr(module, cast)()
    for name, buffer in module.named_buffers():
        assert buffer.dtype == before[name].dtype, name
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("index", [0, 1])
def test_a_model_in_float64_has_them_in_float64(index):
    module = _modules()[index]
    before = _buffers(module)
    module.double()
    for name, buffer in module.named_buffers():
        if name == "renewals":
            assert buffer.dtype == torch.int64
        else:
            assert buffer.dtype == torch.float64, name
        assert torch.equal(buffer.to(before[name]), before[name]), name
    module.float()
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer.to(before[name]), before[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_model_of_any_precision_is_solved_with_them(dtype):
    model = taught(build(f_eps=1e-2 if dtype == torch.bfloat16 else 1e-4)).to(dtype)
    with torch.no_grad():
        x, extra = model.extract_features(tokens(2, 9))
    assert x.dtype == dtype
    assert torch.isfinite(x).all()
    assert extra["equilibria"][0].result.converged.float().mean() > 0.9


def test_a_layer_that_is_unknown_is_probed_and_left_alone():
    f = expanding_neighbours(torch.float32)
    module, z = LearnedPreconditioner(16, 8), torch.zeros_like(f.u) + 0.5
    assert isinstance(f, Neighbours)
    module.collect(f, z, torch.zeros(z.shape[:2]).bool(), 0)  # nothing real
    module.renew()
    assert not module.is_known
    assert module.preconditioner() is None
