"""fairseq-deq-benchmark on a tiny trained model: what its rows must say of methods whose merits are known."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from models.builders import build_trellis, tokens

from fairseq_deq.implicit import GradientConfig
from fairseq_deq.solvers import Preconditioner, Recurrent, SolverConfig
from fairseq_deq.tools import probe
from fairseq_deq.tools.benchmark import command, layer, measure, methods

ROWS = ("anderson+ift", "anderson+gmres", "anderson+jfb", "stack of 12", "stack of 12, checkpointed")


@pytest.fixture(scope="module")
def outcome(data_bin, deq_checkpoint, tmp_path_factory):
    """The figures, what was printed, and the picture."""
    out = tmp_path_factory.mktemp("benchmark") / "tiny"
    words = [str(data_bin), "--path", str(deq_checkpoint), "--tokens", "12", "--batch", "3"]
    words += ["--rounds", "2", "--rtol", "1e-5", "--out", str(out)]
    for row in ROWS:
        words += ["--only", row]
    assert command.main(words) == 0
    return json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".png")


def test_the_rows_asked_for_are_there_and_drawn(outcome):
    figures, picture = outcome
    assert set(figures["rows"]) == set(ROWS)
    assert picture.stat().st_size > 5000
    assert all(row["step_ms"] > 0 and row["peak_mib"] > 0 for row in figures["rows"].values())


def test_solves_meet_the_tolerance_and_are_counted(outcome):
    row = outcome[0]["rows"]["anderson+ift"]
    assert row["f_position"] <= 1.1e-5
    assert row["b_position"] <= 1.1e-5
    assert 1 < row["f_lane_evaluations"] <= row["f_evaluations"]
    assert 1 < row["b_lane_evaluations"] <= row["b_evaluations"]
    assert 0 < row["inside_f"] < 1
    assert row["f_ms"] + row["b_ms"] < row["step_ms"]


def test_exact_gradients_are_near_the_truth_and_one_step_is_not(outcome):
    rows = outcome[0]["rows"]
    assert rows["anderson+ift"]["gradient_error"] < 1e-3
    assert rows["anderson+gmres"]["gradient_error"] < 1e-3
    assert rows["anderson+jfb"]["gradient_error"] > 10 * rows["anderson+ift"]["gradient_error"]


def test_checkpointing_saves_memory_and_changes_no_gradient(outcome):
    rows = outcome[0]["rows"]
    plain, saved = rows["stack of 12"], rows["stack of 12, checkpointed"]
    assert saved["peak_mib"] < 0.6 * plain["peak_mib"]
    assert saved["gradient_error"] == pytest.approx(plain["gradient_error"], rel=1e-3)


def test_a_text_too_short_is_refused_in_one_sentence(data_bin, deq_checkpoint, capsys):
    assert command.main([str(data_bin), "--path", str(deq_checkpoint), "--tokens", "5000"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fairseq-deq-benchmark: --split valid has ")
    assert error.endswith("lower --batch or --tokens\n")


def test_a_recurrence_under_a_probe_is_still_one():
    decoder = build_trellis(dtype=torch.float32).decoder
    with torch.no_grad():
        u = decoder.injection(decoder.embed_tokens(tokens(2, 5)))
        f = decoder.layer.prepare(decoder.layer.draw(2, 5, 0, u)).bind(u, None)
    z = torch.zeros(2, 5, decoder.layer.state_dim)
    probed = probe.ProbedMap(f, probe.Probe(z.numel()))
    assert isinstance(probed, Recurrent)
    assert isinstance(probed.adjoint(z, z), Recurrent)  # type: ignore[attr-defined]


def test_a_step_in_subsequences_is_probed_as_a_whole():
    decoder = build_trellis(dtype=torch.float64).decoder.eval()
    x = tokens(2, 6)
    model = layer.Layer(decoder, x, None, torch.randn(2, 6, decoder.dim).double())
    config = SolverConfig(solver="anderson", scope="sample", max_evals=200, rtol=1e-12, atol=0.0)
    method = methods.our_method(config, GradientConfig(solver=config))
    _, _, whole = measure.probed_step(model, method, 2 * 6 * decoder.layer.state_dim)
    chunked = layer.InSubsequences(method, 4)
    _, probe, gradients = measure.probed_step(model, chunked, 2 * 6 * decoder.layer.state_dim)
    found = measure.residuals(model, chunked, probe)
    assert [len(probe.phases[phase].states) for phase in "fb"] == [2, 2]
    assert probe.final.shape == (2, 6, decoder.layer.state_dim)
    assert found["f_sample"] < 1e-11
    assert found["b_sample"] < 1e-11
    torch.testing.assert_close(gradients, whole, rtol=1e-6, atol=1e-9)


def test_every_row_of_a_recurrence_runs_where_its_solves_have_learned():
    """What was learned has the channels of h, and a state of any other scope has those of c too."""
    decoder = build_trellis(dtype=torch.float64, solver_scope="recurrence").decoder.eval()
    x, width = tokens(2, 5), decoder.layer.hidden_dim
    model = layer.Layer(decoder, x, None, torch.randn(2, 5, decoder.dim).double())
    torch.manual_seed(0)
    known = Preconditioner(*(0.1 * torch.randn(width, 2, dtype=torch.float64) for _ in range(2)))
    f, z0, _ = model.bound()
    args = SimpleNamespace(f_thres=60, b_thres=60, rtol=1e-8, lane_factor=10.0)
    rows = methods.methods(args, model)
    rows = {name: run for name, run in rows.items() if "torchdeq" not in name and "stack" not in name}
    assert sum("position after position" in name for name in rows) == 4
    states = {name: run(f, z0, known) for name, run in rows.items()}
    exact = states["picard+ift, position after position"]
    for name, state in states.items():
        assert (state - exact).abs().max() < 1e-5, name
