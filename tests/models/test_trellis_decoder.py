"""The contracts of the decoder for TrellisNets: causality, batch mates, borders, decoding."""

import pytest
import torch
from models.builders import build, build_trellis, check_causality, decode, features, tokens
from selection import every_pair

from fairseq_deq.implicit import unroll

SOLVERS = ("anderson", "broyden", "picard")


@every_pair(
    solver=SOLVERS,
    budget=[1, 2, 5, 30],
    scope=["recurrence", "position"],
    dtype=[torch.float32, torch.float64],
)
def test_a_changed_token_leaves_all_before_it_bitwise_unchanged(solver, budget, scope, dtype):
    options = {"f_solver": solver, "f_thres": budget, "f_eps": 1e-3, "init_std": 0.8, "solver_scope": scope}
    model = build_trellis(dtype=dtype, **options)
    check_causality(model, budget)


@pytest.mark.parametrize("scope", ["recurrence", "position"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_does_not_depend_on_its_batch_mates(solver, scope):
    options = {"f_solver": solver, "f_thres": 9, "f_eps": 1e-3, "init_std": 0.8, "solver_scope": scope}
    model = build_trellis(dtype=torch.float32, **options)
    source = tokens(17, 11)
    together = features(model, source)
    for row in (0, 8, 16):
        assert torch.equal(features(model, source[row : row + 1]), together[row : row + 1])


@pytest.mark.parametrize(
    "options", [{}, {"ksize": 3}, {"dropouth": 0.3, "dropouti": 0.3, "wdrop": 0.3}], ids=str
)
def test_position_after_position_finds_what_all_at_once_finds(options):
    results = []
    for scope in ("recurrence", "position", "sample"):
        model = build_trellis(solver_scope=scope, **options).train()
        torch.manual_seed(4)
        x, extra = model.extract_features(tokens(3, 9))
        x.sin().sum().backward()
        (equilibrium,) = extra["equilibria"]
        assert equilibrium.result.converged.all()
        assert extra["backward_stats"].sums[4] == extra["backward_stats"].sums[0]
        results.append([x, *(p.grad for p in model.parameters() if p.grad is not None)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.allclose(a, b, atol=1e-7)


def test_the_gradient_is_that_of_a_long_unroll():
    grads = []
    for gradient in ("ift", "unroll"):
        model = build_trellis(gradient=gradient, f_thres=100, init_std=0.2).train()
        model.extract_features(tokens(2, 8))[0].sin().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1])
    for implicit, unrolled in zip(*grads):
        assert torch.allclose(implicit, unrolled, atol=1e-8)


@pytest.mark.parametrize("ksize", [2, 3])
def test_subsequences_change_nothing(ksize):
    source = tokens(2, 9)

    def run(subseq_len):
        model = build_trellis(ksize=ksize, subseq_len=subseq_len).train()
        x, extra = model.extract_features(source)
        x.sin().sum().backward()
        return x, len(extra["equilibria"]), [p.grad for p in model.parameters()]

    whole, _, gradients = run(0)
    for subseq_len, parts in ((1, 9), (4, 3), (9, 1)):
        x, solves, others = run(subseq_len)
        assert solves == parts
        assert torch.allclose(x, whole, atol=1e-8)
        # The gradient crosses the borders too.
        for a, b in zip(gradients, others, strict=True):
            assert (a is None and b is None) or torch.allclose(a, b, atol=1e-7)


@pytest.mark.parametrize("ksize", [2, 4])
def test_a_segment_sees_the_true_tokens_and_states_before_it(ksize):
    model = build_trellis(mem_len=1, ksize=ksize)
    source = tokens(2, 15)
    whole = features(model, source)
    memory, parts = None, []
    for part in source.split([1, 5, 6, 3], 1):
        with torch.no_grad():
            x, extra = model.extract_features(part, memory=memory)
        memory = extra["memory"]
        parts.append(x)
        assert memory.length <= ksize - 1
    assert memory.injection.shape == (2, ksize - 1, 16)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-8)


def test_nothing_is_carried_on_unless_asked_for():
    with torch.no_grad():
        assert build_trellis(mem_len=0).extract_features(tokens(2, 5))[1]["memory"] is None


def test_left_padding_does_not_change_the_tokens_after_it():
    model = build_trellis()
    source = tokens(2, 10)
    padded = torch.cat([torch.full((2, 3), model.decoder.padding_idx), source], 1)
    assert torch.allclose(features(model, padded)[:, 3:], features(model, source), atol=1e-8)
    assert torch.allclose(decode(model, padded)[0][:, 3:], decode(model, source)[0], atol=1e-8)


def test_pretraining_is_a_tied_stack():
    model = build_trellis(pretrain_steps=3, pretrain_layers=4)
    source, decoder = tokens(2, 8), model.decoder
    with torch.no_grad():
        u = decoder.injection(decoder.embed_tokens(source))
        f = decoder.layer.prepare(decoder.layer.draw(2, 8, 0, u)).bind(u, None)
        stack = unroll(f, torch.zeros(2, 8, 2 * 24, dtype=u.dtype), 4)
    assert torch.equal(features(model, source), stack[..., 8:24])


# ---------------------------------------------------------------------- decoding


@pytest.mark.parametrize("ksize", [2, 3])
def test_decoding_token_by_token_equals_teacher_forcing(ksize):
    model = build_trellis(ksize=ksize)
    source = tokens(3, 11)
    with torch.no_grad():
        whole, _ = model(source)
    assert torch.allclose(decode(model, source)[0], whole, atol=1e-8)
    assert torch.allclose(decode(model, source, steps_at_once=6)[0], whole[:, 5:], atol=1e-8)


@pytest.mark.parametrize("subseq_len", [0, 4])
def test_the_same_one_of_many_equilibria_is_found_however_a_text_is_cut(subseq_len):
    # Weights this large have several equilibria a position, and some that the solver does not settle at.
    options = {"init_std": 1.0, "f_thres": 20, "f_eps": 1e-4, "f_solver": "anderson", "mem_len": 1}
    model = build_trellis(dtype=torch.float64, subseq_len=subseq_len, **options)
    source = tokens(3, 11)
    with torch.no_grad():
        whole, _ = build_trellis(dtype=torch.float64, **options)(source)
        first, extra = model(source[:, :5])
        second, _ = model(source[:, 5:], memory=extra["memory"])
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-10)
    assert torch.allclose(decode(model, source)[0], whole, atol=1e-10)
    assert torch.allclose(decode(model, source, steps_at_once=7)[0], whole[:, 6:], atol=1e-10)


def test_decoding_keeps_the_last_state_only_and_solves_the_new_token_alone():
    model = build_trellis(ksize=3, dtype=torch.float32, f_eps=1e-4)
    source, state = tokens(2, 30), {}
    sizes, work = [], []
    for end in (1, *range(15, 31)):
        with torch.no_grad():
            _, extra = model.decoder(source[:, :end], incremental_state=state)
        cache = model.decoder.get_incremental_state(state, "cache")
        context = cache.layer.context
        kept = (context.hidden, context.cell, cache.recent, cache.last, cache.total, cache.count)
        # Storage counts: a view would keep the whole text alive.
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in kept))
        lanes, _, computed, *_ = extra["forward_stats"].sums.tolist()
        work.append((lanes, computed))
    assert max(sizes[2:]) == min(sizes[2:])
    assert [lanes for lanes, _ in work] == [2, 28, *[2] * 15]
    assert max(computed for _, computed in work[2:]) <= 2 * 20


# ---------------------------------------------------------------------- dropout


def test_output_dropout_drops_channels_not_positions():
    x, _ = build_trellis(dropout=0.5).train().extract_features(tokens(2, 8))
    dropped = x == 0
    assert dropped.any()
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))


def test_word_dropout_drops_words_wherever_they_occur():
    decoder = build_trellis(emb_dropout=0.5).train().decoder
    source = torch.arange(4, 52).repeat(2, 2)
    dropped = (decoder.embed(source) == 0).all(-1)
    assert 0.2 < dropped.double().mean() < 0.8
    assert torch.equal(dropped[:, :48], dropped[:, 48:])
    assert torch.equal(dropped[0], dropped[1])


def test_a_dropped_out_solve_still_converges_because_its_masks_are_held():
    options = {"dropout": 0.2, "dropouti": 0.2, "dropouth": 0.2, "emb_dropout": 0.2, "wdrop": 0.2}
    _, extra = build_trellis(**options).train().extract_features(tokens(2, 8))
    assert extra["equilibria"][0].result.converged.all()


def test_a_transformer_is_no_recurrence():
    with pytest.raises(ValueError, match="--solver-scope recurrence is for TrellisNets"):
        build(solver_scope="recurrence")
