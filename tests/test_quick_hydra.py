"""The tests' short cut through hydra gives the options that hydra gives."""

import pytest
from conftest import TINY_DEQ, TINY_TRANSFORMER_LM, TRAINING
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from hydra._internal.hydra import Hydra

from fairseq_deq.patches.noise import quiet
from fairseq_deq.registration import register

TRAININGS = [
    (*TINY_DEQ, *TRAINING),
    (*TINY_DEQ, *TRAINING, "--update-freq", "2,3", "--f-eps", "0.5", "--lr-scheduler", "cosine_from_zero"),
    (*TINY_TRANSFORMER_LM, *TRAINING, "--adam-betas", "(0.5, 0.9)", "--bpe", "sentencepiece"),
    (*TINY_DEQ, *TRAINING, "--task", "copy_memory", "--optimizer", "sgd"),
]


@pytest.mark.parametrize("arguments", TRAININGS)
def test_options_are_those_that_hydra_composes(monkeypatch, arguments):
    data = () if "copy_memory" in arguments else ("data-bin",)

    def composed():
        parser = options.get_training_parser()
        with quiet():
            return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, [*data, *arguments]))

    register()
    monkeypatch.setattr("sys.argv", ["fairseq-train"])
    found = [composed(), composed()]  # what was kept is used again, and stays as it is
    monkeypatch.setattr(Hydra, "compose_config", Hydra.compose_config.__wrapped__)
    assert found == [composed()] * 2
