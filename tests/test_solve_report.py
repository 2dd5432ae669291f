"""What the solves came to is added up without padding, and what is not finite is refused."""

import logging

import pytest
import torch
from models.builders import build, dictionary

from fairseq_deq.errors import OptionError
from fairseq_deq.solve_report import SolveReport

PAD = dictionary().pad()


def tokens(*lengths):
    """Rows of these lengths, padded on the right."""
    rows = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in zip(rows, lengths):
        row[:length] = torch.arange(4, 4 + length)
    return rows


@pytest.fixture
def model():
    """A model whose positions come to different residuals in few evaluations."""
    return build(f_thres=3, f_eps=1e-3, dtype=torch.float32)


def test_padding_counts_neither_in_the_report_nor_in_the_statistics(model):
    long, short = tokens(9), tokens(2)
    with torch.no_grad():
        with SolveReport() as alone:
            parts = [model(row)[1]["forward_stats"].sums for row in (long, short)]
        with SolveReport() as together:
            padded = model(tokens(9, 2))[1]["forward_stats"].sums
    assert alone.lanes == together.lanes == 11
    assert alone.converged == together.converged
    assert together.residual == pytest.approx(alone.residual, rel=1e-4)
    expected = sum(parts)
    for entry in (0, 3, 4):  # lanes, residuals, converged
        assert padded[entry] == pytest.approx(float(expected[entry]), rel=1e-4)


def test_padding_is_left_out_of_the_backward_solve_and_of_subsequences():
    for options in ({}, {"subseq_len": 4}, {"b_solver": "gmres"}):
        model = build(f_thres=6, f_eps=1e-3, dtype=torch.float32, **options)
        model.train()
        output, extra = model(tokens(9, 2))
        output[tokens(9, 2).ne(PAD)].sum().backward()
        assert extra["forward_stats"].sums[0] == 11
        assert extra["backward_stats"].sums[0] in ((11,) if options != {"b_solver": "gmres"} else (2,))


def test_each_step_of_decoding_is_counted(model):
    model.eval()
    state = {}  # type: ignore[var-annotated]
    with SolveReport() as report, torch.no_grad():
        model.decoder.prefill(tokens(4, 2), state)
        for length in (1, 2, 3, 4):
            model.decoder(tokens(4, 2)[:, :length], incremental_state=state)
        assert report.lanes == 6
        model.decoder(tokens(5, 5), incremental_state=state)
    assert report.lanes == 8


def test_without_a_report_nothing_is_counted(model):
    report = SolveReport()
    with torch.no_grad():
        model(tokens(3))
    assert report.lanes == 0
    assert report.sentence() == ""


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(model, number):
    with torch.no_grad():
        model.decoder.embed_tokens.weight[5] = number
    with torch.no_grad(), SolveReport():
        model(tokens(1))  # the word does not occur
        with pytest.raises(OptionError, match=r"not finite at \d+ of 3 positions"):
            model(tokens(3))


def test_a_stack_that_is_not_finite_is_refused():
    model = build(pretrain_steps=5, dtype=torch.float32).eval()
    with torch.no_grad():
        model.decoder.embed_tokens.weight[5] = float("nan")
        with SolveReport(), pytest.raises(OptionError, match="not finite"):
            model(tokens(3))


def test_few_converged_positions_are_warned_of(model, caplog):
    with torch.no_grad(), SolveReport() as report:
        model(tokens(9))
    assert report.share < 0.99
    with caplog.at_level(logging.INFO):
        report.log()
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "of 9 positions converged, mean residual" in caplog.text
    exact = build(f_thres=200, f_eps=1e-3, dtype=torch.float32)
    caplog.clear()
    with torch.no_grad(), SolveReport() as report, caplog.at_level(logging.INFO):
        exact(tokens(9))
        report.log()
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "100.00% of 9 positions converged" in caplog.text
