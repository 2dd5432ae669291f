"""Decoding from cached equilibria gives what the whole sequence gives, and solves no more than it must."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from fairseq.sequence_scorer import SequenceScorer
from fairseq.tasks.language_modeling import LanguageModelingTask
from models.builders import build, build_trellis, count_solves, dictionary, tokens

from fairseq_deq.generation.generator import PrefillingGenerator
from fairseq_deq.layers.layer import PreparedLayer
from fairseq_deq.layers.memory import Memory
from fairseq_deq.layers.transformer.cache import KVCache
from fairseq_deq.layers.transformer.layer import PreparedTransformer
from fairseq_deq.models.decoding_cache import DecodingCache

EOS, PAD = 2, 1


def _model(**options):
    return build(**({"f_solver": "anderson", "share_decoder_input_output_embed": "true"} | options))


def _whole(model, source, **inputs):
    with torch.no_grad():
        return torch.log_softmax(model(source, **inputs)[0], -1)


def _step(model, source, end, state, **inputs):
    with torch.no_grad():
        x, extra = model.decoder(source[:, :end], incremental_state=state, **inputs)
    assert x.shape[1] == 1
    return torch.log_softmax(x[:, 0], -1), extra


# ---------------------------------------------------------------------- token by token


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decoder_normalize_before": "true", "wnorm": "true"},
        {"decoder_normalize_before": "true", "decoder_closing_norm": "false"},
        {"local_size": 3},
        {"decoder_head_dim": 6},
        {"solver_scope": "sample"},
    ],
    ids=str,
)
def test_token_by_token_equals_teacher_forcing(options):
    model = _model(**options)
    source, state = tokens(3, 11), {}
    whole = _whole(model, source)
    for end in range(1, 12):
        scores, _ = _step(model, source, end, state)
        assert torch.allclose(scores, whole[:, end - 1], atol=1e-8)


def test_far_beyond_the_training_window_the_buffers_grow():
    model = _model(tokens_per_sample=16)
    source, state = tokens(2, 150), {}
    whole = _whole(model, source)
    model.decoder.prefill(source[:, :60], state)
    for end in range(60, 151):
        scores, _ = _step(model, source, end, state)
        assert torch.allclose(scores, whole[:, end - 1], atol=1e-8)


def test_chunks_of_tokens_equal_teacher_forcing():
    model = _model()
    source, state = tokens(2, 20), {}
    whole = _whole(model, source)
    for end in (5, 6, 11, 19, 20):
        scores, _ = _step(model, source, end, state)
        assert torch.allclose(scores, whole[:, end - 1], atol=1e-8)


def test_a_row_that_begins_with_padding_may_come_token_by_token():
    model, text = build(), tokens(2, 6)
    text[1, :3] = model.decoder.padding_idx
    state: dict = {}
    with torch.no_grad():
        steps = [
            model.decoder.extract_features(text[:, :k], incremental_state=state)[0][:, -1]
            for k in range(1, 7)
        ]
        whole, _ = model.extract_features(text)
    found = torch.stack(steps, 1)
    assert torch.allclose(found[0], whole[0], atol=1e-8)
    assert torch.allclose(found[1, 3:], whole[1, 3:], atol=1e-8)


def test_left_padding_changes_nothing():
    model = _model()
    source, pads = tokens(3, 12), [0, 2, 5]
    padded, state = source.clone(), {}
    for row, count in enumerate(pads):
        padded[row, :count] = PAD
    model.decoder.prefill(padded[:, :7], state)
    alone = [_whole(model, source[row : row + 1, count:])[0] for row, count in enumerate(pads)]
    for end in range(7, 13):
        scores, _ = _step(model, padded, end, state)
        for row, count in enumerate(pads):
            assert torch.allclose(scores[row], alone[row][end - 1 - count], atol=1e-8)


def test_every_layer_that_can_be_bound_can_be_decoded(monkeypatch):
    model = _model()
    monkeypatch.setattr(PreparedTransformer, "new_cache", PreparedLayer.new_cache)
    source, state = tokens(3, 9), {}
    whole = _whole(model, source)
    for end in (4, 5, 6, 7, 8, 9):
        scores, _ = _step(model, source, end, state)
        assert torch.allclose(scores, whole[:, end - 1], atol=1e-8)
        order = torch.tensor([2, 0, 2]) if end == 6 else torch.arange(3)
        model.decoder.reorder_incremental_state(state, order)
        source, whole = source[order], whole[order]


@pytest.mark.parametrize("options", [{}, {"ksize": 3}], ids=str)
def test_the_trellis_is_decoded_as_it_is_trained(options):
    model = build_trellis(f_solver="anderson", mem_len=2, **options)
    before, lengths, continuation = tokens(3, 6, seed=5), [4, 1, 3], tokens(3, 9, seed=9)
    _, extra = model(before)
    prompts, state = _ragged(lengths), {}
    source = torch.stack(
        [torch.cat([prompts[i, :n], continuation[i, : 9 - n]]) for i, n in enumerate(lengths)]
    )
    whole = _whole(model, source, memory=extra["memory"])
    model.decoder.prefill(prompts, state, extra["memory"])
    for end in range(1, 10):
        scores, _ = _step(model, source, end, state)
        assert torch.allclose(scores, whole[:, end - 1], atol=1e-8)
        order = torch.tensor([2, 0, 2]) if end == 6 else torch.arange(3)
        model.decoder.reorder_incremental_state(state, order)
        source, whole = source[order], whole[order]


def test_a_memory_comes_before_the_first_token():
    model = _model(mem_len=7)
    source = tokens(2, 12)
    _, extra = model(source[:, :5])
    whole = _whole(model, source[:, 5:], memory=extra["memory"])
    for prefilled in (0, 3):
        state: dict = {}
        if prefilled:
            model.decoder.prefill(source[:, 5 : 5 + prefilled], state, extra["memory"])
        for end in range(1, 8):
            given = {"memory": extra["memory"]} if not state else {}
            scores, _ = _step(model, source[:, 5:], end, state, **given)
            assert torch.allclose(scores, whole[:, end - 1], atol=1e-8)


def test_a_stack_is_decoded_as_a_stack():
    model = _model(pretrain_steps=3, pretrain_layers=3)
    source, state = tokens(2, 8), {}
    whole = _whole(model, source)
    model.decoder.prefill(source[:, :4], state)
    for end in range(1, 9):
        scores, _ = _step(model, source, end, state)
        assert torch.allclose(scores, whole[:, end - 1], atol=1e-12)


def test_decoding_in_training_mode_is_refused():
    with pytest.raises(RuntimeError, match="eval"):
        _model().train().decoder(tokens(1, 2), incremental_state={})


# ---------------------------------------------------------------------- prompts


def _ragged(lengths):
    prompts = tokens(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        prompts[row, length:] = PAD
    return prompts


def test_prompts_of_different_length_are_solved_together_and_continued_each_from_its_end():
    model = _model()
    lengths, continuation = [6, 2, 9, 5], tokens(4, 12, seed=9)
    prompts, state = _ragged([6, 2, 9, 5]), {}
    rows = [torch.cat([prompts[i, :n], continuation[i, : 12 - n]]) for i, n in enumerate(lengths)]
    source = torch.stack(rows)
    whole = _whole(model, source)
    model.decoder.prefill(prompts, state)
    for end in range(1, 13):
        scores, _ = _step(model, source, end, state)
        assert torch.allclose(scores, whole[:, end - 1], atol=1e-8)
        # Rows move about, as the beams of a search do.
        order = torch.tensor([1, 0, 3, 2]) if end % 2 else torch.tensor([0, 2, 2, 3])
        model.decoder.reorder_incremental_state(state, order)
        source, whole = source[order], whole[order]


def test_a_row_that_is_still_in_its_prompt_costs_one_evaluation():
    model = _model()
    prompts, state = _ragged([2, 8]), {}
    model.decoder.prefill(prompts, state)
    source = torch.where(prompts.eq(PAD), 7, prompts)
    for end in range(1, 3):
        _, extra = _step(model, source, end, state)
        assert extra["equilibria"] == []
    for end in range(3, 9):
        _, extra = _step(model, source, end, state)
        result = extra["equilibria"][0].result
        assert result.lane_nfe[1] == 1 < result.lane_nfe[0]


def test_the_cache_is_not_copied_within_the_prompts(monkeypatch):
    model = _model()
    copies = []
    reorder = KVCache.reorder
    monkeypatch.setattr(
        KVCache, "reorder", lambda self, order: (copies.append(len(order)), reorder(self, order))
    )
    source, state = tokens(2, 6), {}
    model.decoder.prefill(source, state)
    model.decoder.reorder_incremental_state(state, torch.tensor([0, 0, 0, 1, 1, 1]))
    for end in range(1, 7):
        scores, _ = _step(model, source.repeat_interleave(3, 0), end, state)
        assert scores.shape[0] == 6
        model.decoder.reorder_incremental_state(state, torch.tensor([2, 1, 0, 3, 3, 5]))
    assert copies == []
    source = torch.cat([source, tokens(2, 2, seed=4)], 1)
    _step(model, source.repeat_interleave(3, 0), 7, state)
    model.decoder.reorder_incremental_state(state, torch.arange(6))
    _step(model, source.repeat_interleave(3, 0), 8, state)
    assert copies == [6]  # one when the rows part; none where each goes on as it is


def test_a_batch_is_not_held_by_its_slowest_row():
    model = _model(f_thres=100)
    source, state = tokens(24, 12), {}
    model.decoder.prefill(source[:, :8], state)
    for end in range(9, 13):
        _, extra = _step(model, source, end, state)
        result = extra["equilibria"][0].result
        needed = int(result.lane_nfe.sum())
        assert result.converged.all()
        assert result.nfe == result.lane_nfe.max()  # it ends with the slowest, not later
        assert needed <= result.total_lane_nfe <= 1.35 * needed


def test_the_start_is_made_of_what_lies_before():
    model = _model()
    source, state = tokens(2, 8), {}
    with torch.no_grad():
        model.decoder.prefill(source[:, :5], state)
        cache = model.decoder.decoding_cache(state)
        assert isinstance(cache, DecodingCache)
        expected = cache.prompt.state.mean(1, keepdim=True)
        assert torch.allclose(cache.start()[0], expected)
        _step(model, source, 6, state)
        cache = model.decoder.decoding_cache(state)
        assert torch.allclose(cache.start()[0], (5 * expected + cache.last) / 6)


# ---------------------------------------------------------------------- fairseq's search


def _searched(model, generator_class, prompts, seed=0, **options):
    words = dictionary()
    strategy = options.pop("search_strategy", None)
    generator = generator_class(
        [model], words, **({"max_len_b": 14, "search_strategy": strategy and strategy(words)} | options)
    )
    torch.manual_seed(seed)
    source = torch.cat([torch.full((prompts.shape[0], 1), EOS), prompts], 1)
    lengths = source.ne(PAD).sum(1)
    sample = {"net_input": {"src_tokens": source, "src_lengths": lengths}}
    task = SimpleNamespace(args=SimpleNamespace(), source_dictionary=words)
    return LanguageModelingTask.inference_step(task, generator, [model], sample)


def _sampling(**options):
    from fairseq.search import Sampling

    return lambda words: Sampling(words, **options)


SEARCHES = {
    "greedy": {"beam_size": 1},
    "beam": {"beam_size": 4},
    "beam at a temperature": {"beam_size": 3, "temperature": 1.7},
    "top-k": {"beam_size": 2, "search_strategy": _sampling(sampling_topk=5)},
    "top-p": {"beam_size": 2, "search_strategy": _sampling(sampling_topp=0.8), "temperature": 0.7},
}


@pytest.mark.parametrize("options", SEARCHES.values(), ids=SEARCHES)
def test_hypotheses_are_those_of_fairseq_token_by_token_and_scores_those_of_teacher_forcing(options):
    model = _model()
    prompts = _ragged([4, 0, 7, 3])
    prefilled = _searched(model, PrefillingGenerator, prompts, **options)
    one_by_one = _searched(model, SequenceGenerator, prompts, **options)
    for row, (ours, theirs) in enumerate(zip(prefilled, one_by_one)):
        assert len(ours) == len(theirs) > 0
        for hypothesis, expected in zip(ours, theirs):
            assert torch.equal(hypothesis["tokens"], expected["tokens"])
            assert torch.allclose(hypothesis["positional_scores"], expected["positional_scores"], atol=1e-5)
            prompt = prompts[row][prompts[row].ne(PAD)]
            assert torch.equal(hypothesis["tokens"][: prompt.numel()], prompt)
            if options.get("temperature", 1.0) == 1.0 and "search_strategy" not in options:
                target = hypothesis["tokens"].unsqueeze(0)
                source = torch.cat([torch.tensor([[EOS]]), target[:, :-1]], 1)
                sample = {"id": [0], "net_input": {"src_tokens": source}, "target": target}
                ((forced,),) = SequenceScorer(dictionary()).generate([model], sample)
                scores = hypothesis["positional_scores"].double()
                assert torch.allclose(scores[:-1], forced["positional_scores"].double()[:-1], atol=1e-5)


def test_a_prompt_is_one_parallel_solve_however_long_and_wide_the_beam(monkeypatch):
    solves = count_solves(monkeypatch)
    model = _model(f_thres=100)
    prompts = tokens(2, 9)
    with_prefill = _searched(model, PrefillingGenerator, prompts, beam_size=3, max_len_b=12)
    assert solves[0] == (2, 10)
    assert set(solves[1:]) <= {(6, 1), (3, 1)}
    assert len(solves) - 1 <= 3  # tokens 11 to 13 at most
    solves.clear()
    _searched(model, SequenceGenerator, prompts, beam_size=3, max_len_b=12)
    assert len(solves) >= 10
    assert all(len(row) == 3 for row in with_prefill)


def test_a_memory_in_the_sample_precedes_the_prompts():
    model = _model(mem_len=6)
    before = tokens(2, 6, seed=3)
    _, extra = model(before)
    memory = Memory(extra["memory"].state, extra["memory"].injection)
    words = dictionary()
    generator = PrefillingGenerator([model], words, beam_size=2, max_len_b=8)
    prompts = tokens(2, 3)
    sample = {
        "net_input": {"src_tokens": torch.nn.functional.pad(prompts, (1, 0), value=EOS), "memory": memory}
    }
    hypotheses = generator.generate([model], sample, prefix_tokens=prompts, bos_token=EOS)
    for row in range(2):
        found = hypotheses[row][0]["tokens"].unsqueeze(0)
        source = torch.cat([torch.tensor([[EOS]]), found[:, :-1]], 1)
        own = Memory(memory.state[row : row + 1], memory.injection[row : row + 1])
        scores = _whole(model, source, memory=own)[0].gather(1, found[0].unsqueeze(1)).squeeze(1)
        assert torch.allclose(scores[:-1], hypotheses[row][0]["positional_scores"].double()[:-1], atol=1e-5)


def test_adaptive_softmax_and_input_decode_alike():
    model = _model(
        seed=2,  # one of those whose equilibrium is the only one
        share_decoder_input_output_embed="false",
        adaptive_input="true",
        adaptive_input_cutoff="10,30",
        adaptive_softmax_cutoff="10,30",
    )
    prompts = _ragged([3, 5])
    for ours, theirs in zip(
        _searched(model, PrefillingGenerator, prompts, beam_size=2, temperature=2.0),
        _searched(model, SequenceGenerator, prompts, beam_size=2, temperature=2.0),
    ):
        assert torch.equal(ours[0]["tokens"], theirs[0]["tokens"])
        assert torch.allclose(ours[0]["positional_scores"], theirs[0]["positional_scores"], atol=1e-5)
