"""Two processes train as one with the doubled batch, and go on as if they had not been interrupted."""

from __future__ import annotations

import pytest
import torch
from fairseq.data import Dictionary, data_utils
from runs import differences, json_lines, read_losses, read_weights, resumed_state
from tasks.known import ADAM, FAMILIES, RENEWALS, TASK, check_known, read_knowledge
from tasks.pair import Pair, train_alone

COMMON = (
    *("--task", "deq_language_modeling", "--arch", "deq_transformer_lm_tiny", "--criterion", "deq_lm_loss"),
    *("--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "32", "--decoder-attention-heads", "2"),
    *("--mem-len", "8", "--tokens-per-sample", "8", "--num-workers", "0", "--cpu", "--seed", "3"),
    *("--disable-validation", "--log-format", "json", "--log-interval", "1"),
)
# Probes are drawn for the rows of a process, as dropout is: what they find, and where solves that have not
# converged stand for it, is that of one process to the noise of sampling only. The last tests are about both.
NO_PROBES = ("--keep-converged", "0", "--preconditioner-rank", "0")
# Columns that are about time, or about the moment.
TIMES = {"train_wall", "wall", "wps", "ups", "epoch", "update"}


@pytest.fixture(scope="module")
def pair():
    """Two processes that are started once."""
    processes = Pair()
    yield processes
    processes.stop()


def _lines(log: str) -> list[dict[str, float]]:
    lines = [line for line in json_lines(log) if "gnorm" in line]
    return [{key: float(value) for key, value in line.items() if key not in TIMES} for line in lines]


def _equals(name: str, found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To the precision of float64; what solves teach is summed up in float32."""
    if "knowledge" in name:
        return torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    return torch.allclose(found, expected, rtol=1e-6, atol=1e-9)


@pytest.fixture(scope="module")
def rare(data_bin) -> int:
    """A cut-off above which no type occurs in what the first process reads of two updates of two batches."""
    words = Dictionary.load(str(data_bin / "dict.txt"))
    sentences = data_utils.load_indexed_dataset(str(data_bin / "train"), words)
    tokens = torch.cat([sentences[i] for i in range(len(sentences))])
    length = len(tokens) // 4 // 8 * 8
    read = torch.cat([tokens[row * length : row * length + 32] for row in range(2)])
    assert int(read.max()) < len(words) - 8
    return int(read.max()) + 1


@pytest.fixture(scope="module")
def gradients(data_bin, rare):
    """A training in float64 of a stack's update and one of the equilibrium, 2 batches each, by plain SGD."""
    return (
        *(data_bin, *COMMON, "--optimizer", "sgd", "--lr", "1.0", "--max-update", "2", "--update-freq", "2"),
        # fairseq's adaptive input is float32 whatever the weights are
        *("--pretrain-steps", "1", "--pretrain-layers", "5", "--pretrain-random-layers"),
        *("--adaptive-softmax-cutoff", f"100,{rare}"),
        *("--share-decoder-input-output-embed", "false", *NO_PROBES),
    )


@pytest.fixture(scope="module")
def alone(in_process, gradients, tmp_path_factory):
    """The folder of one process, with the weights of the first and second update, and its log."""
    folder = tmp_path_factory.mktemp("alone")
    options = ("--batch-size", "4", "--save-dir", folder, "--save-interval-updates", "1")
    return folder, _lines(train_alone(in_process, *gradients, *options, dtype="float64"))


@pytest.mark.parametrize("backend", ["pytorch_ddp", "legacy_ddp"])
def test_gradients_are_those_of_one_process_with_the_doubled_batch(backend, pair, gradients, alone, tmp_path):
    options = ("--batch-size", "2", "--save-dir", tmp_path, "--ddp-backend", backend)
    log = pair.train(*gradients, *options, dtype="float64")
    folder, expected_log = alone
    before, expected = (read_weights(folder / f"checkpoint_1_{update}.pt") for update in (1, 2))
    weights = read_weights(tmp_path / "checkpoint_last.pt")
    moved = 0
    for name, weight in weights.items():
        assert weight.dtype == torch.float64 or not weight.is_floating_point(), name
        # with a learning rate of 1 and no clipping, the step is the gradient
        gradient = before[name] - expected[name]
        assert _equals(name, before[name] - weight, gradient), name
        moved += int(gradient.abs().max() > 1e-6)
    assert moved > 10
    assert _lines(log) == expected_log  # the statistics are those of the whole job
    one, two = resumed_state(folder), resumed_state(tmp_path)
    assert torch.allclose(two["memory"]["memory_state"], one["memory"]["memory_state"], rtol=1e-6, atol=1e-9)
    assert two["position"] == one["position"]


def test_jacobian_penalty_is_that_of_the_whole_job(pair, in_process, gradients, tmp_path):
    penalised = (*gradients, "--jac-loss-weight", "0.5")
    options = ("--batch-size", "4", "--save-dir", tmp_path / "alone")
    alone = _lines(train_alone(in_process, *penalised, *options, dtype="float64"))
    expected = read_weights(tmp_path / "alone" / "checkpoint_last.pt")
    assert alone[-1]["jac"] > 0
    for backend in ("pytorch_ddp", "legacy_ddp"):
        options = ("--batch-size", "2", "--save-dir", tmp_path / backend, "--ddp-backend", backend)
        assert _lines(pair.train(*penalised, *options, dtype="float64")) == alone
        for name, weight in read_weights(tmp_path / backend / "checkpoint_last.pt").items():
            assert _equals(name, weight, expected[name]), name


def test_loss_curve_in_float32_is_that_of_one_process(pair, in_process, data_bin, tmp_path):
    # Picard, since Anderson's mixing makes much of a rounding error where nothing has converged yet.
    training = (
        *(data_bin, *COMMON, "--optimizer", "adam", "--lr", "0.002", "--clip-norm", "1"),
        *("--max-update", "12"),
        *("--f-solver", "picard", "--b-solver", "picard", "--f-thres", "10", "--b-thres", "10", *NO_PROBES),
    )
    two = _lines(pair.train(*training, "--batch-size", "4", "--save-dir", tmp_path / "two"))
    one = _lines(train_alone(in_process, *training, "--batch-size", "8", "--save-dir", tmp_path / "one"))
    assert len(one) == len(two) >= 12
    for ours, theirs in zip(one, two):
        assert ours.keys() == theirs.keys()
        for column, value in ours.items():
            tolerance = 2e-4 if column == "loss" else 2e-3
            assert theirs[column] == pytest.approx(value, rel=tolerance, abs=tolerance), column
    assert one[-1]["loss"] < one[0]["loss"]


@pytest.mark.parametrize("stop", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_two_processes_resume_bit_for_bit_on_either_side_of_the_switch(stop, pair, data_bin, tmp_path):
    training = (
        *(data_bin, *COMMON, "--optimizer", "adam", "--lr", "0.01", "--clip-norm", "1", "--update-freq", "2"),
        *("--dropout", "0.1", "--attention-dropout", "0.1", "--pretrain-steps", "2", "--max-update", "5"),
        *("--lr-scheduler", "inverse_sqrt", "--warmup-updates", "3", "--batch-size", "2"),
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pair.train(*training, "--save-dir", whole, "--save-interval-updates", str(stop))
    first = whole / f"checkpoint_1_{stop}.pt"
    log = pair.train(*training, "--save-dir", parts, "--restore-file", first)
    assert f"Loaded checkpoint {first} (epoch 1 @ {stop} updates)" in log
    kept = resumed_state(whole)
    assert kept["memory"]["memory_state"].shape == (4, 8, 16)
    assert differences(resumed_state(parts), kept) == []


# ---------------------------------------------------------------------- what solves teach

# Solved to the end, so that states do not depend on how they were reached: the first updates are a stack's,
# since new weights do not converge. The keeper's penalty has random probes.
EXACT = (
    *("--f-eps", "1e-9", "--b-eps", "1e-9", "--f-thres", "200", "--b-thres", "200", "--keep-converged", "0"),
    *("--optimizer", "sgd", "--lr", "0.5", "--pretrain-steps", "8"),
)


@pytest.mark.parametrize(
    "family",
    [
        "transformer",
        *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "transformer"),
    ],
)
def test_two_processes_learn_what_one_with_the_doubled_batch_learns(
    family, pair, in_process, data_bin, tmp_path
):
    arguments = (data_bin, *TASK, *FAMILIES[family], *EXACT)
    two = pair.train(*arguments, "--batch-size", "2", "--save-dir", tmp_path / "two", dtype="float64")
    one = train_alone(
        in_process, *arguments, "--batch-size", "4", "--save-dir", tmp_path / "one", dtype="float64"
    )
    paths = [tmp_path / name / "checkpoint_last.pt" for name in ("one", "two")]
    for path in paths:
        check_known(path)
    ours, theirs = (read_weights(path) for path in paths)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        if "learned_preconditioner" in name:
            continue  # its probes are drawn for the rows of a process
        scale = 1 + float(weight.double().abs().max())
        assert torch.allclose(theirs[name].double(), weight.double(), rtol=0, atol=1e-4 * scale), name
    known = [
        {n.split(".")[-1]: t.double() for n, t in read_knowledge(p).items() if "preconditioner" in n}
        for p in paths
    ]
    assert known[0]["positions"] == known[1]["positions"] > 0
    jacobians = [torch.linalg.lstsq(k["gram"], k["cross"]).solution for k in known]
    assert (jacobians[0] - jacobians[1]).norm() < 0.5 * jacobians[0].norm()
    assert read_losses(two) == pytest.approx(read_losses(one), abs=2e-3)
    assert len(json_lines(two)) >= 23
    shares = [float(line["f_conv"]) for log in (one, two) for line in json_lines(log) if "f_conv" in line]
    assert min(shares) == 1


# It is renewed after updates 1, 11 and 21.
@pytest.mark.parametrize(
    ("stop", "end", "renewals"), [(10, 13, 2), pytest.param(11, 23, RENEWALS, marks=pytest.mark.slow)]
)
def test_two_processes_resume_bit_for_bit_with_what_they_know(stop, end, renewals, pair, data_bin, tmp_path):
    arguments = (data_bin, *TASK, *ADAM, *FAMILIES["transformer"], "--batch-size", "2", "--update-freq", "2")
    arguments = (*arguments, "--max-update", str(end))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pair.train(*arguments, "--save-dir", whole, "--save-interval-updates", str(stop))
    (first,) = whole.glob(f"checkpoint_*_{stop}.pt")
    log = pair.train(*arguments, "--save-dir", parts, "--restore-file", first)
    assert f"@ {stop} updates" in log
    check_known(whole / "checkpoint_last.pt", renewals)
    assert differences(resumed_state(parts), resumed_state(whole)) == []
