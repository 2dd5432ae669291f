"""Options that fairseq ignores, or answers with a crash elsewhere."""

import argparse
import shutil

import pytest
import torch
from fairseq import utils
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import utils as distributed_utils
from omegaconf import OmegaConf

import fairseq_deq
from fairseq_deq.errors import OptionError
from fairseq_deq.patches import distributed


def evaluate(run, data_bin, checkpoint, evaluation, overrides):
    options = ("--path", checkpoint, *evaluation, "--model-overrides", overrides)
    return run("fairseq-eval-lm", data_bin, *options).text


def test_an_unknown_override_is_refused_with_the_name_that_was_meant(
    refused, data_bin, deq_checkpoint, evaluation
):
    sentence = evaluate(refused, data_bin, deq_checkpoint, evaluation, "{'f_tresh': 2}")
    assert "'f_tresh'" in sentence
    assert "did you mean 'f_thres'?" in sentence


@pytest.mark.parametrize("overrides", ["{'f_thres': 1}", "{'model': {'f_thres': 1}}"])
def test_a_known_override_counts(in_process, data_bin, deq_checkpoint, evaluation, overrides):
    without, with_it = (
        evaluate(in_process, data_bin, deq_checkpoint, evaluation, text).rpartition("Loss")[2]
        for text in ("{}", overrides)
    )
    assert with_it != without


def test_an_override_that_an_older_checkpoint_lacks_counts(
    in_process, data_bin, deq_checkpoint, evaluation, tmp_path
):
    state = torch.load(deq_checkpoint, weights_only=False)
    del state["cfg"]["model"]["f_thres"]
    torch.save(state, tmp_path / "older.pt")
    older = evaluate(in_process, data_bin, tmp_path / "older.pt", evaluation, "{'f_thres': 1}")
    newer = evaluate(in_process, data_bin, deq_checkpoint, evaluation, "{'f_thres': 1}")
    assert older.rpartition("Loss")[2] == newer.rpartition("Loss")[2]


def test_an_override_of_the_task_is_known(in_process, data_bin, deq_checkpoint, evaluation):
    evaluate(in_process, data_bin, deq_checkpoint, evaluation, "{'sample_break_mode': 'none'}")


def test_validate_passes_its_command_line_as_overrides(in_process, data_bin, deq_checkpoint, evaluation):
    options = (
        "--path",
        deq_checkpoint,
        *evaluation,
        "--batch-size",
        "8",
        "--model-overrides",
        "{'f_thres': 2}",
    )
    assert "f_nfe 2 " in in_process("fairseq-validate", data_bin, *options, "--log-format", "simple").text


@pytest.mark.parametrize("overrides", ["{'f_thres'", "{f_thres: 2}"])
def test_overrides_that_are_no_dictionary_are_refused(
    refused, data_bin, deq_checkpoint, evaluation, overrides
):
    sentence = evaluate(refused, data_bin, deq_checkpoint, evaluation, overrides)
    assert "--model-overrides must be a dictionary" in sentence


def test_user_dir_by_name_away_from_the_checkout_means_the_imported_copy(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    utils.import_user_module(argparse.Namespace(user_dir="fairseq_deq"))


def test_user_dir_of_the_imported_copy_may_end_in_a_slash():
    utils.import_user_module(argparse.Namespace(user_dir=f"{fairseq_deq.__path__[0]}/"))


def test_user_dir_of_a_second_copy_says_what_to_type(tmp_path):
    copy = shutil.copytree(fairseq_deq.__path__[0], tmp_path / "fairseq_deq")
    with pytest.raises(OptionError, match=f"type --user-dir {fairseq_deq.__path__[0]}"):
        utils.import_user_module(argparse.Namespace(user_dir=str(copy)))


def test_other_user_dirs_are_imported_as_before(tmp_path):
    (tmp_path / "other_plugin").mkdir()
    (tmp_path / "other_plugin" / "__init__.py").write_text("LOADED = True\n")
    utils.import_user_module(argparse.Namespace(user_dir=str(tmp_path / "other_plugin")))
    import other_plugin

    assert other_plugin.LOADED


def test_bf16_trains_on_a_cpu(in_process, tiny_training, tmp_path):
    in_process("fairseq-train", *tiny_training, "--bf16", "--save-dir", tmp_path, "--disable-validation")
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    weight = state["model"]["decoder.embed_tokens.weight"]
    assert torch.equal(weight, weight.bfloat16().float())


def test_bf16_keeps_the_optimizer(in_process, monkeypatch, tiny_training, tmp_path):
    built = []
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **kwargs: built.append(args))
    in_process("fairseq-train", *tiny_training, "--bf16", "--save-dir", tmp_path, "--disable-validation")
    assert built == []


@pytest.fixture
def config():
    """fairseq's configuration of a run on the CPU."""
    cfg = OmegaConf.structured(FairseqConfig())
    cfg.common.cpu = True
    return cfg


def test_precision_is_settled_before_processes_start(monkeypatch, config):
    started = []
    monkeypatch.setattr(
        distributed, "run_processes", lambda cfg, main, kwargs, count: started.append(cfg.common.tpu)
    )
    config.common.bf16 = config.common.tpu = True  # as the command line has it after --bf16
    config.distributed_training.distributed_world_size = 2
    distributed_utils.call_main(config, None)
    assert started == [False]


def test_fp16_on_a_cpu_is_refused(refused, tiny_training, tmp_path):
    sentence = refused("fairseq-train", *tiny_training, "--fp16", "--save-dir", tmp_path / "save").text
    assert "--fp16 needs a GPU" in sentence
    assert not (tmp_path / "save").exists()


def test_tpu_without_its_package_is_refused(refused, tiny_training, tmp_path):
    sentence = refused("fairseq-train", *tiny_training, "--tpu", "--save-dir", tmp_path).text
    assert "torch_xla" in sentence
