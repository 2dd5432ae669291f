"""Decoding with recorded solves: the results of the whole sequence, from few recordings."""

from __future__ import annotations

import pytest
import torch
from models.builders import build, tokens

from fairseq_deq.layers.transformer import cache
from fairseq_deq.solvers import SolverConfig, captured, solve


@pytest.fixture(autouse=True)
def filled(monkeypatch):
    """Windows of a token are filled up, as on a GPU."""
    monkeypatch.setattr(cache, "fills_windows", lambda device: True)


def _model(device, **options):
    options = {"f_solver": "anderson", "share_decoder_input_output_embed": "true", **options}
    return build(tokens_per_sample=16, **options).to(device)


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "recordings"), [({}, 2), ({"local_size": 16}, 1), ({"local_size": 70}, 2)], ids=str
)
def test_one_recording_serves_the_tokens_up_to_a_multiple_of_64(options, recordings, device, made):
    source = tokens(2, 80).to(device)
    whole = torch.log_softmax(_model(device, **options)(source)[0], -1)
    model, state = _model(device, cuda_graph="auto", **options), {}
    model.decoder.prefill(source[:, :50], state)
    before = len(made)
    for end in range(51, 81):
        x, _ = model.decoder(source[:, :end], incremental_state=state)
        assert torch.allclose(torch.log_softmax(x[:, 0], -1), whole[:, end - 1], atol=1e-8)
    assert len(made) - before == recordings
    assert not captured.refused


@torch.no_grad()
def test_f_of_a_token_that_is_solved_again_keeps_its_own_key_and_value(device, made):
    """It has been evaluated before the second solve, as with early precision, or in a fallback."""
    layer = _model(device).decoder.layer
    like = layer.out.bias
    generator = torch.Generator().manual_seed(0)

    def draw(length, width):
        return torch.randn(2, length, width, generator=generator).to(like)

    text, u = layer.prepare(layer.draw(2, 1, 0, like)).new_cache(2), draw(6, layer.injection_dim)
    text.append(draw(5, layer.state_dim), u[:, :5])
    f = text.bind(u[:, 5:], None)
    config = SolverConfig(max_evals=60, rtol=1e-9, atol=0.0, cuda_graph="auto")
    for start in (0.0, 1.0, -1.0, 2.0):
        found = solve(f, torch.full_like(draw(1, layer.state_dim), start), config)
        assert found.converged.all()
        fz = f(found.state)
        assert float(((fz - found.state).norm(dim=-1) / fz.norm(dim=-1)).max()) < 1e-8
    assert len(made) == 1
