"""Training says once that its solves no longer converge, and again only when it gets worse."""

import logging

import pytest
import torch

from fairseq_deq.criterions.watch import ConvergenceWatch
from fairseq_deq.equilibrium import SolveStats


def batch(share, lanes=100):
    """The statistics of a solve of which this share converged."""
    return SolveStats(torch.tensor([lanes, 0.0, 0.0, 0.0, share * lanes, 0.0]))


def warnings_of(caplog, shares, window=2, name="f_conv"):
    """What is said while batches of these shares go by."""
    watch = ConvergenceWatch(window)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for share in shares:
            watch.add({name: batch(share)})
    return [record.getMessage() for record in caplog.records]


def test_it_says_nothing_while_enough_converge(caplog):
    assert warnings_of(caplog, [1.0, 0.99] * 10) == []


def test_a_single_bad_batch_is_averaged_away(caplog):
    assert warnings_of(caplog, [1.0, 0.95, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], window=8) == []


def test_it_says_what_to_do_once_and_again_when_twice_as_many_fail(caplog):
    said = warnings_of(caplog, [0.9] * 20 + [0.85] * 20 + [0.7] * 20 + [0.9] * 20)
    assert len(said) == 2
    assert "f_conv is low: 90.0% of the positions converged in the forward solves" in said[0]
    assert "--f-thres" in said[0]
    assert "f_conv has fallen further: 70.0%" in said[1]


def test_the_backward_solve_has_its_own_advice(caplog):
    (said,) = warnings_of(caplog, [0.5] * 5, name="b_conv")
    assert "--b-thres" in said


def test_a_stack_solves_nothing(caplog):
    watch = ConvergenceWatch(1)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            watch.add({"f_conv": SolveStats.empty(torch.device("cpu"))})
    assert caplog.records == []


def test_backward_passes_that_come_later_count(caplog):
    watch, stats = ConvergenceWatch(1), SolveStats.empty(torch.device("cpu"))
    watch.add({"b_conv": stats})
    stats.sums.add_(batch(0.2).sums)
    with caplog.at_level(logging.WARNING):
        watch.add({"b_conv": SolveStats.empty(torch.device("cpu"))})
    assert "20.0%" in caplog.text


@pytest.mark.parametrize(("eps", "said"), [("1e-6", 1), ("0.9", 0)])
def test_a_training_run_says_it(in_process, deq_training, tmp_path, eps, said):
    output = in_process(
        *("fairseq-train", *deq_training, "--save-dir", tmp_path, "--disable-validation"),
        *("--f-eps", eps, "--b-eps", eps, "--log-interval", "2", "--max-update", "8"),
    )
    assert output.text.count("f_conv is low") == said
