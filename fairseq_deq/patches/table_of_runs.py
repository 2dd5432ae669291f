"""Faults of fairseq in how it runs: saving, processes, options, and messages about mistakes."""

from __future__ import annotations

from . import (
    checkpoints,
    configuration,
    disk,
    distributed,
    divergence,
    help,
    noise,
    overrides,
    sentences,
)
from ._patch import ALL, VE, Patch

_TOOLS = ("train", "eval_lm", "validate", "interactive")
_SENTENCES = (
    "A mistake ends in a traceback of twenty lines or more; at best the last of them says what to type."
)
_QUIET = "Warnings about how fairseq calls torch and hydra stand between the lines that a user needs."
_OPTIONS = "Options that are out of range, without effect or contradictory are accepted, and fail later."

RUNNING = (
    Patch(
        "atomic-copy",
        "fairseq.file_io.PathManager.copy",
        "checkpoint_last.pt and checkpoint_best.pt are written in place, and a kill leaves half a file.",
        ALL,
        disk.with_atomic_copy,
    ),
    Patch(
        "whole-saves",
        "fairseq.checkpoint_utils.torch_persistent_save",
        "A save is not flushed, all processes use one temporary name, and a failed save leaves that file.",
        ALL,
        disk.with_whole_saves,
    ),
    Patch(
        "plain-numbers",
        "fairseq.checkpoint_utils.torch_persistent_save",
        "torch now refuses to load a checkpoint that contains a number of numpy.",
        ALL,
        checkpoints.with_plain_numbers,
    ),
    Patch(
        "save-dir",
        "fairseq.checkpoint_utils.verify_checkpoint_directory",
        "A --save-dir that cannot be written to ends in a traceback that does not name the option.",
        ALL,
        disk.with_save_dir_explained,
    ),
    Patch(
        "task-state",
        "fairseq.checkpoint_utils.save_checkpoint",
        "A task is asked for its state in one process only, where it cannot collect that of the others.",
        ALL,
        disk.after_gathering,
    ),
    Patch(
        "model-overrides",
        "fairseq.checkpoint_utils.overwrite_args_by_name",
        "--model-overrides with a misspelt name evaluates with the old value.",
        ALL,
        overrides.with_known_names,
    ),
    Patch(
        "user-dir",
        "fairseq.utils.import_user_module",
        "--user-dir of a package that is imported already is refused with advice to rename it.",
        ALL,
        overrides.with_imported_copy,
    ),
    Patch(
        "torchrun",
        "fairseq.distributed.utils._infer_torch_distributed_launch_init",
        "torchrun without GPUs ends in a ZeroDivisionError.",
        ALL,
        distributed.without_division_by_zero,
    ),
    Patch(
        "process-group",
        "fairseq.distributed.utils.distributed_main",
        "The process group is never left, and sometimes a finished run aborts with status 1.",
        ALL,
        distributed.then_leaving_the_group,
    ),
    Patch(
        "cpu-devices",
        "fairseq.models.distributed_fairseq_model.DistributedDataParallel",
        "device_ids is passed on every device, and torch refuses it on the CPU.",
        ALL,
        distributed.without_devices_on_cpu,
    ),
    Patch(
        "divergence",
        "fairseq.trainer.Trainer.train_step",
        'A diverged training ends in a traceback of "gradients are Nan/Inf" that does not say '
        "what to change.",
        ALL,
        divergence.with_advice,
    ),
    Patch(
        "processes",
        "fairseq.distributed.utils.call_main",
        "Without GPUs several processes are not started, or not counted; those that were started outlive "
        "their launcher.",
        ALL,
        distributed.with_processes_as_asked,
    ),
    Patch(
        "options", "fairseq.distributed.utils.call_main", _OPTIONS, ALL, configuration.with_options_checked
    ),
    Patch("options", "fairseq_cli.generate.main", _OPTIONS, ALL, configuration.main_with_options_checked),
    Patch(
        "options",
        "fairseq_cli.train.add_defaults",
        _OPTIONS,
        ALL,
        configuration.defaults_with_options_checked,
    ),
    Patch(
        "help",
        "fairseq.options.parse_args_and_arch",
        "--help shows no option of the model, the task, the criterion and the optimizer.",
        ALL,
        help.with_help_of_everything,
    ),
    Patch(
        "root-logger",
        "fairseq.models.wav2vec.wav2vec2_classification",
        "Importing fairseq leaves the root logger at DEBUG, also for matplotlib and other libraries.",
        VE,
        noise.with_root_logger_put_right,
        noise.root_logger_is_at_debug,
    ),
    *(
        row
        for tool in _TOOLS
        for target in [f"fairseq_cli.{tool}.convert_namespace_to_omegaconf"]
        for row in (
            Patch("quiet", target, _QUIET, ALL, noise.in_quiet),
            Patch("sentences", target, _SENTENCES, ALL, sentences.ending_in_one_sentence),
        )
    ),
    *(
        row
        for target in (
            "fairseq.distributed.utils.call_main",
            "fairseq_cli.generate.main",
            "fairseq_cli.preprocess.main",
        )
        for row in (
            Patch("quiet", target, _QUIET, ALL, noise.in_quiet),
            Patch("sentences", target, _SENTENCES, ALL, sentences.ending_in_one_sentence),
        )
    ),
    Patch(
        "sentences",
        "hydra.core.utils.JobReturn.return_value",
        _SENTENCES,
        ALL,
        sentences.with_failed_jobs_explained,
    ),
)
