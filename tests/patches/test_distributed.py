"""Runs of several processes without GPUs do what the command line or torchrun asks for."""

import socket
import subprocess
import sys

import pytest
import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model
from omegaconf import OmegaConf

from fairseq_deq.patches import distributed


@pytest.fixture
def config():
    """fairseq's configuration of a run on the CPU."""
    cfg = OmegaConf.structured(FairseqConfig())
    cfg.common.cpu = True
    return cfg


@pytest.fixture
def torchrun(monkeypatch):
    """The variables of the second of two processes that torchrun started."""
    variables = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29400", "WORLD_SIZE": "2", "RANK": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def started(monkeypatch):
    """What would run: (how, size, rank, backend), instead of running it."""
    runs = []

    def note(how, cfg):
        options = cfg.distributed_training
        runs.append(
            (
                how,
                options.distributed_world_size,
                options.distributed_rank,
                options.distributed_backend,
            )
        )

    monkeypatch.setattr(
        distributed_utils, "distributed_main", lambda i, main, cfg, kwargs: note("process", cfg)
    )
    monkeypatch.setattr(
        distributed, "run_processes", lambda cfg, main, kwargs, count: note(f"{count} spawned", cfg)
    )
    return runs


def alone(cfg):
    pytest.fail("trains alone")


def test_torchrun_without_a_world_size_is_one_run_of_all_its_processes(torchrun, config, started):
    distributed_utils.call_main(config, alone)
    assert started == [("process", 2, 1, "gloo")]


def test_torchrun_with_a_world_size_needs_no_gpu(torchrun, config, started):
    config.distributed_training.distributed_world_size = 2
    distributed_utils.call_main(config, alone)
    assert started == [("process", 2, 1, "gloo")]


def test_evaluation_under_torchrun_stays_with_each_process(torchrun, config):
    calls = []
    config.common_eval.path = "checkpoint_last.pt"
    distributed_utils.call_main(config, calls.append)
    assert len(calls) == 1


def test_a_world_size_alone_starts_that_many_processes(config, started):
    config.distributed_training.distributed_world_size = 2
    distributed_utils.call_main(config, alone)
    assert started == [("2 spawned", 2, 0, "gloo")]


def test_an_init_method_that_would_start_nothing_is_refused(config, started):
    config.distributed_training.distributed_world_size = 2
    config.distributed_training.distributed_init_method = "tcp://localhost:29512"
    with pytest.raises(SystemExit, match="--distributed-no-spawn"):
        distributed_utils.call_main(config, alone)
    assert started == []


def test_an_init_method_with_a_rank_runs_that_rank(config, started):
    options = config.distributed_training
    options.distributed_world_size, options.distributed_rank = 2, 1
    options.distributed_init_method = "tcp://localhost:29512"
    options.distributed_no_spawn = True
    distributed_utils.call_main(config, alone)
    assert started == [("process", 2, 1, "gloo")]


def test_a_backend_that_was_chosen_stays(config, started):
    config.distributed_training.distributed_world_size = 2
    config.distributed_training.distributed_backend = "mpi"
    distributed_utils.call_main(config, alone)
    assert started == [("2 spawned", 2, 0, "mpi")]


def test_one_process_is_as_before(config, started):
    calls = []
    distributed_utils.call_main(config, calls.append)
    assert len(calls) == 1
    assert started == []


@pytest.fixture
def group():
    """A process group of this process alone."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    torch.distributed.init_process_group("gloo", f"tcp://localhost:{port}", world_size=1, rank=0)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_the_default_backend_wraps_a_model_on_the_cpu(group, config):
    options = config.distributed_training
    assert options.ddp_backend == "pytorch_ddp"
    wrapped = distributed_fairseq_model.DistributedFairseqModel(
        options, torch.nn.Linear(2, 2), group, torch.device("cpu")
    )
    wrapped(torch.ones(1, 2)).sum().backward()


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_processes_train_one_model_and_resume(in_process, deq_training, tmp_path, parts):
    # the default --ddp-backend, and a batch size of its own for each process
    training = (*deq_training, "--distributed-world-size", "2", "--batch-size", "4", "--save-dir", tmp_path)
    for updates in range(1, parts + 1):
        in_process("fairseq-train", *training, "--disable-validation", "--max-update", str(updates))
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    assert state["optimizer_history"][-1]["num_updates"] == parts
    assert state["cfg"]["distributed_training"]["distributed_world_size"] == 2
    # both halves of a batch count: one process would be twice as far in batches of 4
    assert state["extra_state"]["train_iterator"]["iterations_in_epoch"] == parts


@pytest.mark.slow
def test_a_sentence_of_a_started_process_is_a_sentence(refused, deq_training, tmp_path):
    options = ("--distributed-world-size", "2", "--f-solver", "newton", "--save-dir", tmp_path)
    assert "--f-solver must be one of" in refused("fairseq-train", *deq_training, *options).text


def test_a_process_that_has_left_the_group_collects_nothing_at_its_end(tmp_path):
    code = f"""
import atexit, gc, torch
from fairseq_deq.patches.distributed import then_leaving_the_group
# At the end of the process, after all that is registered later.
atexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count() > 0))
store = "file://{tmp_path}/store"
torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
then_leaving_the_group(lambda *arguments: None)(0, None, None, {{}})
print(gc.isenabled())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "False", "True"], done.stderr
