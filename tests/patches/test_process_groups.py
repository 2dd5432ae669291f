"""Processes leave their group, and evaluate together only what they can."""

import socket

import pytest
import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import utils as distributed_utils
from fairseq_cli import eval_lm
from omegaconf import OmegaConf

import fairseq_deq  # noqa: F401  (installs the patches)


@pytest.fixture
def config():
    """fairseq's configuration of a run on the CPU."""
    cfg = OmegaConf.structured(FairseqConfig())
    cfg.common.cpu = True
    cfg.model = None
    return cfg


def test_a_process_leaves_its_group_at_the_end(config):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    config.distributed_training.distributed_backend = "gloo"
    config.distributed_training.distributed_init_method = f"tcp://localhost:{port}"
    groups = []
    for _ in range(2):  # the second run must not find the group of the first
        main = lambda cfg: groups.append(distributed_utils.get_global_group())  # noqa: E731
        distributed_utils.distributed_main(0, main, config, {})
        assert not torch.distributed.is_initialized()
    assert groups[0] is not groups[1]


def test_eval_lm_of_several_processes_is_refused(config):
    config.common_eval.path = "checkpoint_last.pt"
    config.distributed_training.distributed_world_size = 2
    with pytest.raises(SystemExit, match="--distributed-world-size must be 1"):
        distributed_utils.call_main(config, eval_lm.main)
