"""The contracts of the decoder: causality, independence of batch mates, phases, memory, decoding."""

from functools import partial

import pytest
import torch
from models.builders import build, build_trellis, check_causality, decode, features, tokens

from fairseq_deq.implicit import unroll

SOLVERS = ("anderson", "broyden", "picard")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("budget", [1, 2, 3, 5, 8, 13, 30])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_changed_token_leaves_all_before_it_bitwise_unchanged(solver, budget, dtype):
    model = build(dtype=dtype, f_solver=solver, f_thres=budget, f_eps=1e-3, init_std=0.5)
    check_causality(model, budget)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_does_not_depend_on_its_batch_mates(solver):
    model = build(dtype=torch.float32, f_solver=solver, f_thres=9, f_eps=1e-3, init_std=0.5)
    source = tokens(4, 16)
    together = features(model, source)
    for row in range(4):
        assert torch.equal(features(model, source[row : row + 1]), together[row : row + 1])


def test_the_state_solves_the_equation():
    model = build()
    _, extra = model.extract_features(tokens(2, 12))
    (equilibrium,) = extra["equilibria"]
    fz, z = equilibrium.taped
    assert equilibrium.result.converged.all()
    assert (fz - z).norm(dim=-1).max() <= 2e-10 * fz.norm(dim=-1).min() * 10


def test_forgetful_subsequences_see_the_one_before_alone():
    source = tokens(2, 12)
    whole = features(build(), source)
    forgetful = features(build(subseq_len=4, subseq_forget="true"), source)
    assert torch.allclose(forgetful[:, :8], whole[:, :8], atol=1e-7)
    # the third sees the second; the second's own past counts through its states alone
    assert (forgetful[:, 8:] - whole[:, 8:]).abs().max() > 1e-4
    _, extra = build(mem_len=12).extract_features(tokens(2, 12, seed=3))
    remembering, _ = build(subseq_len=4, subseq_forget="true").extract_features(
        source, memory=extra["memory"]
    )
    whole, _ = build().extract_features(source, memory=extra["memory"])
    assert torch.allclose(remembering[:, :4], whole[:, :4], atol=1e-7)  # the first sees the memory
    assert (remembering[:, 4:] - whole[:, 4:]).abs().max() > 1e-4  # and the second does not


@pytest.mark.parametrize("pre_norm", ["false", "true"])
@pytest.mark.parametrize("subseq_len", [1, 5, 12])
def test_subsequences_that_keep_their_context_change_nothing(subseq_len, pre_norm):
    source = tokens(2, 12)
    whole = features(build(decoder_normalize_before=pre_norm), source)
    parts = features(build(decoder_normalize_before=pre_norm, subseq_len=subseq_len), source)
    assert torch.allclose(parts, whole, atol=1e-8)


def test_memory_of_everything_continues_the_sequence():
    model = build(mem_len=100)
    source = tokens(2, 15)
    whole = features(model, source)
    memory, parts = None, []
    for part in source.split(6, 1):
        with torch.no_grad():
            x, extra = model.extract_features(part, memory=memory)
        memory = extra["memory"]
        parts.append(x)
    assert memory.length == 15
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-8)


def test_memory_is_cut_to_its_length_and_detached():
    model = build(mem_len=4).train()
    _, extra = model.extract_features(tokens(2, 9))
    assert extra["memory"].length == 4
    assert not extra["memory"].state.requires_grad
    assert torch.equal(extra["memory"].state, extra["equilibria"][0].state[:, -4:])


def test_left_padding_does_not_change_the_tokens_after_it():
    model = build()
    source = tokens(2, 10)
    padded = torch.cat([torch.full((2, 3), model.decoder.padding_idx), source], 1)
    assert torch.allclose(features(model, padded)[:, 3:], features(model, source), atol=1e-8)


# ---------------------------------------------------------------------- phases


def test_pretraining_is_a_tied_stack_and_then_an_equilibrium():
    model = build(pretrain_steps=3, pretrain_layers=2).train()
    source = tokens(2, 8)
    for finished, stack in ((0, True), (2, True), (3, False), (4, False)):
        model.set_num_updates(finished)
        _, extra = model.extract_features(source)
        assert (extra["equilibria"][0].result is None) == stack


def test_pretraining_computes_two_layers():
    model = build(pretrain_steps=3, pretrain_layers=2)
    source = tokens(2, 8)
    decoder = model.decoder
    u = decoder.injection(decoder.embed_tokens(source) * decoder.inputs.scale)
    f = decoder.layer.prepare(decoder.layer.draw(2, 8, 0, u)).bind(u, None)
    assert torch.equal(features(model, source), unroll(f, torch.zeros(2, 8, 16, dtype=u.dtype), 2))


def test_a_checkpoint_is_evaluated_as_what_it_was_trained_as():
    model = build(pretrain_steps=3)
    for finished, stack in ((1, True), (3, True), (4, False)):
        model.set_num_updates(finished)
        _, extra = model.extract_features(tokens(1, 4))
        assert (extra["equilibria"][0].result is None) == stack
    assert not build(pretrain_steps=0).decoder.pretraining


# ---------------------------------------------------------------------- decoding


@pytest.mark.parametrize("pre_norm", ["false", "true"])
def test_decoding_token_by_token_equals_teacher_forcing(pre_norm):
    model = build(decoder_normalize_before=pre_norm, wnorm="true")
    source = tokens(3, 11)
    with torch.no_grad():
        whole, _ = model(source)
    assert torch.allclose(decode(model, source)[0], whole, atol=1e-8)


def test_a_prompt_is_solved_in_one_go():
    model = build()
    source = tokens(2, 9)
    with torch.no_grad():
        whole, _ = model(source)
    assert torch.allclose(decode(model, source, steps_at_once=6)[0], whole[:, 5:], atol=1e-8)


@pytest.mark.parametrize("make", [build, partial(build_trellis, ksize=3)], ids=["transformer", "trellis"])
def test_decoding_follows_the_beams(make):
    model = make()
    generator = torch.Generator().manual_seed(5)
    decoded, source = decode(
        model, tokens(4, 9), reorder=lambda end: torch.randint(0, 4, (4,), generator=generator)
    )
    with torch.no_grad():
        whole, _ = model(source)
    assert torch.allclose(decoded, whole, atol=1e-8)


def test_what_decoding_returns_is_not_its_cache():
    model = build(share_decoder_input_output_embed="false", adaptive_softmax_cutoff="10,30")
    source, state = tokens(2, 5), {}
    with torch.no_grad():
        expected, _ = model(source)
        for end in range(1, 6):
            x, _ = model.decoder(source[:, :end], incremental_state=state)
            last = x.clone()
            x.div_(3.0)  # as fairseq's generator does with a temperature
    assert torch.allclose(last, expected[:, -1:], atol=1e-8)


# ---------------------------------------------------------------------- dropout


def test_output_dropout_drops_channels_not_positions():
    model = build(dropout=0.5).train()
    x, _ = model.extract_features(tokens(2, 8))
    dropped = x == 0
    assert dropped.any()
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))


def test_a_dropped_out_solve_still_converges_because_its_masks_are_held():
    model = build(dropout=0.2, attention_dropout=0.2, f_eps=1e-8).train()
    _, extra = model.extract_features(tokens(2, 8))
    assert extra["equilibria"][0].result.converged.all()


def test_a_non_finite_sample_does_not_spoil_the_others():
    model = build(dtype=torch.float32, f_eps=1e-4)
    source = tokens(3, 8)
    source[1] = 10
    clean = features(model, source)
    with torch.no_grad():
        model.decoder.embed_tokens.weight[10] = float("nan")
    source[0, source[0] == 10] = 11
    source[2, source[2] == 10] = 11
    x, extra = model.extract_features(source)
    assert torch.isfinite(x).all()
    assert torch.equal(x[2], features(model, source[2:])[0])
    assert not extra["equilibria"][0].result.converged[1].any()
    assert clean.shape == x.shape
