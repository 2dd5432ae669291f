"""f of several layers through the decoder: the contracts of one layer hold for their composition."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from models.builders import build, check_causality, count_solves, decode, features, layers_of, taught, tokens
from selection import every_pair

from fairseq_deq.implicit import unroll
from fairseq_deq.jacobian import jacobian_penalty

PAD = 1
SOLVERS = ("anderson", "broyden", "picard")
DTYPES = [torch.float32, torch.float64]
FORMS = [
    {"decoder_layers": 2},
    {"decoder_layers": 3, "decoder_normalize_before": "true", "wnorm": "true"},
]


def _loss_gradients(model: Any, source: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a loss that no symmetry makes small, by parameter."""
    model.zero_grad()
    x, _ = model.train().extract_features(source)
    x.mul(torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _bound(model: Any, source: torch.Tensor) -> Any:
    """f over the whole of `source`."""
    decoder = model.decoder
    u = decoder.inject(decoder.embed(source), None)
    return decoder.layer.prepare(decoder.layer.draw(*source.shape, 0, u)).bind(u, None)


# ---------------------------------------------------------------------- parameters


def test_one_layer_keeps_its_names_and_weights():
    alone, asked = build(), build(decoder_layers=1)
    assert list(alone.state_dict()) == list(asked.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(alone.state_dict().values(), asked.state_dict().values()))
    assert "decoder.layer.qkv.weight_v" in alone.state_dict()


def test_each_further_layer_adds_the_weights_of_a_layer_and_its_injection():
    def count(layers: int) -> int:
        return sum(p.numel() for p in build(decoder_layers=layers).parameters())

    model = build()
    one = sum(p.numel() for p in (*model.decoder.layer.parameters(), *model.decoder.injection.parameters()))
    assert count(2) - count(1) == count(3) - count(2) == one
    first, second = layers_of(build(decoder_layers=2))
    assert not torch.equal(first.qkv.weight_v, second.qkv.weight_v)


# ---------------------------------------------------------------------- contracts


@every_pair(solver=SOLVERS, budget=[1, 2, 3, 5, 8, 13, 30], dtype=DTYPES)
def test_a_changed_token_leaves_all_before_it_bitwise_unchanged(solver, budget, dtype):
    model = build(dtype=dtype, decoder_layers=2, f_solver=solver, f_thres=budget, f_eps=1e-3, init_std=0.5)
    check_causality(model, budget)


@every_pair(solver=SOLVERS, options=FORMS, dtype=DTYPES)
def test_a_sample_does_not_depend_on_its_batch_mates(solver, options, dtype):
    source = tokens(4, 16)
    source[1, :4] = source[2, -5:] = source[3, :2] = PAD
    for budget in (1, 3, 9, 20):
        model = build(dtype=dtype, f_solver=solver, f_thres=budget, f_eps=1e-3, init_std=0.5, **options)
        together = features(model, source)
        for row in range(4):
            alone, real = features(model, source[row : row + 1]), source[row] != PAD
            assert torch.equal(alone[0, real], together[row, real]), (budget, row)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_padding_on_either_side_changes_nothing(options):
    model, source = build(**options), tokens(2, 10)
    pads, expected = torch.full((2, 3), PAD), features(model, source)
    assert torch.allclose(features(model, torch.cat([pads, source], 1))[:, 3:], expected, atol=1e-8)
    assert torch.allclose(features(model, torch.cat([source, pads], 1))[:, :10], expected, atol=1e-8)


@pytest.mark.parametrize("subseq_len", [1, 5, 12])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_subsequences_that_keep_their_context_change_nothing(options, subseq_len):
    source = tokens(2, 12)
    parts = features(build(subseq_len=subseq_len, **options), source)
    assert torch.allclose(parts, features(build(**options), source), atol=1e-8)


def test_forgetful_subsequences_see_the_one_before_alone():
    source = tokens(2, 12)
    whole = features(build(decoder_layers=2), source)
    forgetful = features(build(decoder_layers=2, subseq_len=4, subseq_forget="true"), source)
    assert torch.allclose(forgetful[:, :8], whole[:, :8], atol=1e-7)
    assert (forgetful[:, 8:] - whole[:, 8:]).abs().max() > 1e-4


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_memory_of_everything_continues_the_sequence(options):
    model, source = build(mem_len=100, **options), tokens(2, 15)
    memory, parts = None, []
    for part in source.split(6, 1):
        with torch.no_grad():
            x, extra = model.extract_features(part, memory=memory)
        memory = extra["memory"]
        parts.append(x)
    assert memory.length == 15
    assert memory.state.shape[-1] == options["decoder_layers"] * 16
    assert torch.allclose(torch.cat(parts, 1), features(model, source), atol=1e-8)


# ---------------------------------------------------------------------- decoding


@pytest.mark.parametrize("prompt", [1, 6])
@pytest.mark.parametrize("options", [*FORMS, {"decoder_layers": 2, "local_size": 3}], ids=str)
def test_decoding_equals_teacher_forcing_and_follows_the_beams(options, prompt):
    model, generator = build(**options), torch.Generator().manual_seed(5)
    decoded, source = decode(
        model, tokens(4, 11), prompt, reorder=lambda end: torch.randint(0, 4, (4,), generator=generator)
    )
    with torch.no_grad():
        whole, _ = model(source)
    assert torch.allclose(decoded, whole[:, prompt - 1 :], atol=1e-8)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_different_length_go_on_each_from_its_end(side):
    model, lengths, text = build(decoder_layers=2, mem_len=5), [6, 2, 5], tokens(3, 11)
    with torch.no_grad():
        memory = model(tokens(3, 5, seed=7))[1]["memory"]
    prompts, state = torch.full((3, 6), PAD), {}
    for row, length in enumerate(lengths):
        begin = 6 - length if side == "left" else 0
        prompts[row, begin : begin + length] = text[row, :length]
    if side == "left":
        text = torch.cat([prompts, text[:, 6:]], 1)
    with torch.no_grad():
        whole, _ = model(text, memory=memory)
    model.decoder.prefill(prompts, state, memory)
    for end in range(6 if side == "left" else 2, 12):
        with torch.no_grad():
            x, _ = model.decoder(text[:, :end], incremental_state=state)
        assert torch.allclose(x[:, 0], whole[:, end - 1], atol=1e-8), end


def test_a_prompt_is_one_solve_and_the_cache_is_that_of_each_layer(monkeypatch):
    sizes = {}
    for layers in (1, 2, 3):
        model, state = build(decoder_layers=layers), {}
        solves = count_solves(monkeypatch)
        model.decoder.prefill(tokens(2, 9), state)
        assert solves == [(2, 9)]
        with torch.no_grad():
            model.decoder(tokens(2, 10), incremental_state=state)
        sizes[layers] = model.decoder.decoding_cache(state).nbytes
    assert sizes[1] == 2 * 10 * 2 * 16 * 8  # rows, positions, keys and values, channels, bytes
    assert sizes[2] == 2 * sizes[1]
    assert sizes[3] == 3 * sizes[1]


def test_a_stack_is_decoded_as_a_stack():
    model = build(decoder_layers=2, pretrain_steps=3, pretrain_layers=3)
    source = tokens(2, 8)
    with torch.no_grad():
        whole, _ = model(source)
    assert torch.allclose(decode(model, source, 4)[0], whole[:, 3:], atol=1e-12)


# ---------------------------------------------------------------------- phases and gradients


def test_pretraining_is_a_tied_stack_of_all_layers():
    model, source = build(decoder_layers=2, pretrain_steps=3, pretrain_layers=4), tokens(2, 8)
    expected = unroll(_bound(model, source), torch.zeros(2, 8, 16, dtype=torch.float64), 4)
    assert torch.equal(features(model, source), expected)
    first, second = _bound(model, source).parts
    z = torch.zeros(2, 8, 16, dtype=torch.float64)
    for _ in range(4):
        z = second(first(z))
    assert torch.equal(expected, z)


@pytest.mark.parametrize("options", [*FORMS, {"decoder_layers": 2, "subseq_len": 3}], ids=str)
def test_the_gradient_is_that_of_a_long_unroll(options):
    source = tokens(2, 6)
    found = _loss_gradients(build(f_eps=1e-12, b_eps=1e-12, **options), source)
    expected = _loss_gradients(build(gradient="unroll", f_thres=150, **options), source)
    assert found.keys() == expected.keys()
    assert any(".layers.1." in name for name in found)
    for name, grad in expected.items():
        assert torch.allclose(found[name], grad, atol=1e-8 * (1 + grad.abs().max())), name


@pytest.mark.parametrize("gradient", ["shine", "phantom"])
def test_approximate_gradients_refined_to_the_end_are_exact(gradient):
    source, enough = tokens(2, 6), {"shine_refine": 200, "phantom_steps": 200}
    found = _loss_gradients(build(decoder_layers=2, gradient=gradient, **enough), source)
    expected = _loss_gradients(build(decoder_layers=2), source)
    for name, grad in expected.items():
        assert torch.allclose(found[name], grad, atol=1e-6 * (1 + grad.abs().max())), name


def test_jfb_is_one_step_through_all_layers():
    model, source = (
        build(decoder_layers=2, gradient="jfb", share_decoder_input_output_embed="true"),
        tokens(2, 6),
    )
    found = {name: grad.clone() for name, grad in _loss_gradients(model, source).items()}
    state = model.eval().extract_features(source)[0].detach()
    model.zero_grad()
    x = _bound(model, source)(state)
    x.mul(torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(found[name], p.grad, atol=1e-8), name


# ---------------------------------------------------------------------- the Jacobian


def test_the_penalty_and_the_radii_are_those_of_all_layers_together():
    source = tokens(2, 5)
    model = build(decoder_layers=2, spectral_radius=40, keep_converged=0.0)
    radii = model(source)[1]["spectral_radii"]
    ((f, state),) = radii.solved
    jacobian = torch.autograd.functional.jacobian(f, state)  # (2, 5, 16, 2, 5, 16)
    blocks = torch.stack([torch.stack([jacobian[b, t, :, b, t] for t in range(5)]) for b in range(2)])
    expected = torch.linalg.eigvals(blocks).abs().amax((1, 2))
    with torch.no_grad():
        assert torch.allclose(radii.largest(), expected, rtol=1e-6)
    model = build(decoder_layers=2, jac_loss_weight=0.5, keep_converged=0.0).train()
    _, extra = model(source)
    assert extra["jacobian_penalty"].weight == 0.5
    ((fz, z),) = [equilibrium.taped for equilibrium in extra["equilibria"]]
    mean = jacobian_penalty(fz, z, probes=400).item()
    assert mean == pytest.approx(float(jacobian.square().sum() / z.numel()), rel=0.1)
    extra["jacobian_penalty"].value.backward()
    assert all(layer.qkv.weight_v.grad.norm() > 1e-6 for layer in layers_of(model))


# ---------------------------------------------------------------------- what solves teach


@cache
def _known(dtype: torch.dtype = torch.float64) -> Any:
    return taught(build(dtype=dtype, decoder_layers=2, **({"f_eps": 1e-4} if dtype == torch.float32 else {})))


def _solving(model: Any, budget: int, **options: Any) -> Any:
    decoder = model.decoder
    decoder.solver = replace(decoder.solver, max_evals=budget, **options)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_known_keeps_causality_and_batch_invariance(dtype):
    model = _known(dtype)
    for solver, budget in ((solver, budget) for solver in SOLVERS for budget in (1, 3, 9)):
        _solving(model, budget, solver=solver, memory=0)
        check_causality(model, budget)
        source = tokens(3, 16)
        together = features(model, source)
        for row in range(3):
            assert torch.equal(features(model, source[row : row + 1]), together[row : row + 1])


def test_what_is_known_is_used_and_finds_the_same():
    model, source = _solving(_known(), 300, solver="broyden", memory=0, rtol=1e-10), tokens(3, 12, seed=8)
    knowledge = model.decoder.knowledge
    assert knowledge.preconditioner().width == 16
    starts = []
    original = model.decoder.find_equilibrium
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            model.decoder, "find_equilibrium", lambda f, z0, s: starts.append(z0) or original(f, z0, s)
        )
        found = features(model, source)
    assert starts[0].norm() > 0.1
    assert torch.allclose(found, features(build(decoder_layers=2), source), atol=1e-8)
    with torch.no_grad():
        whole, _ = model(source)
    assert torch.allclose(decode(model, source, 5)[0], whole[:, 4:], atol=1e-8)


# ---------------------------------------------------------------------- memory


def test_a_step_holds_no_more_with_more_evaluations():
    from solvers.test_peak_memory import _peak

    never = {"f_eps": 1e-30, "b_eps": 1e-30, "decoder_layers": 2, "init_std": 0.5}

    def peak(evaluations: int) -> int:
        model = build(dtype=torch.float32, f_thres=evaluations, b_thres=evaluations, **never)
        model.train()
        run = partial(_loss_gradients, model, tokens(2, 24))
        run()
        return _peak(run)

    assert peak(120) <= 1.05 * peak(20)
