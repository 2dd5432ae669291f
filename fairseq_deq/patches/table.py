"""The table of patches: every fault of fairseq that no method of ours can override."""

from __future__ import annotations

from . import (
    adaptive,
    batching,
    checkpoints,
    configuration,
    data,
    dictionaries,
    disk,
    distributed,
    divergence,
    evaluation,
    help,
    inputs,
    literals,
    noise,
    numpy2,
    overrides,
    prompts,
    sentences,
    solves,
    words,
)
from ._patch import ALL, VE, Patch


def _in_tasks(registry: dict[str, type]) -> dict[str, type]:
    from ..tasks.language_modeling import in_place_of_fairseqs

    return in_place_of_fairseqs(registry)


_TOOLS = ("train", "eval_lm", "validate", "interactive")
_SENTENCES = (
    "A mistake ends in a traceback of twenty lines or more, with what to type, if anything, in the last."
)
_QUIET = "Warnings about how fairseq calls torch and hydra stand between what a user wants to read."
_OPTIONS = "Options out of range, without effect or at odds are accepted, and fail later somewhere else."

_EVALUATED = "Strings of a configuration are evaluated, those that a checkpoint brings included."
_SOLVES = "A score or a text is printed whether the solves behind it have succeeded or not."

# Where several replace the same function, a later one is the outer one.
TABLE = (
    Patch(
        "language-modeling",
        "fairseq.tasks.TASK_REGISTRY",
        "--task language_modeling skips blocks, batches anew after a resume and takes prompts word "
        "by word; what "
        "our class overrides.",
        ALL,
        _in_tasks,
    ),
    Patch(
        "numpy-compat",
        "fairseq.data.token_block_dataset.np",
        "np.compat.long, of --sample-break-mode eos, is gone since numpy 2.",
        ALL,
        numpy2.with_np_compat,
        numpy2.numpy_has_no_compat,
    ),
    Patch(
        "numpy-compat",
        "fairseq.data.language_pair_dataset.np",
        "np.compat.long, of fairseq-interactive, is gone since numpy 2.",
        ALL,
        numpy2.with_np_compat,
        numpy2.numpy_has_no_compat,
    ),
    *(
        Patch("evaluated-strings", target, _EVALUATED, ALL, literals.reading_literals)
        for target in (
            "fairseq.checkpoint_utils.load_checkpoint_to_cpu",
            "fairseq.tasks.fairseq_task.FairseqTask.build_model",
            "fairseq.tasks.fairseq_task.FairseqTask.build_criterion",
        )
    ),
    Patch(
        "checkpoint-data",
        "fairseq.checkpoint_utils.torch",
        "A checkpoint is loaded without a look at its checksums, its addresses and interpolations are "
        "looked up, and its argparse.Namespace is not loaded any more.",
        ALL,
        checkpoints.reading_data,
    ),
    Patch(
        "checkpoint-data",
        "fairseq.checkpoint_utils.load_checkpoint_to_cpu",
        "Overrides without names blame the checkpoint, and a model of another kind fails somewhere else.",
        ALL,
        checkpoints.with_overrides_checked,
    ),
    Patch(
        "checkpoint-data",
        "fairseq.checkpoint_utils.load_model_ensemble_and_task",
        "A model that cannot be built ends in any error, and --add-bos-token of the training is forgotten.",
        ALL,
        checkpoints.with_settings_of_the_file,
    ),
    Patch(
        "safe-globals",
        "fairseq.distributed.utils._broadcast_object_slow",
        "What rank 0 sends of a checkpoint is not loaded any more, so that no run of several "
        "processes resumes.",
        ALL,
        checkpoints._with_safe_globals,
    ),
    Patch(
        "other-dictionary",
        "fairseq.checkpoint_utils.load_checkpoint_to_cpu",
        "Training goes on with a dictionary of other words, or the same words in another order.",
        ALL,
        dictionaries._checking_resumed_dictionary,
    ),
    Patch(
        "other-dictionary",
        "fairseq.trainer.Trainer.load_checkpoint",
        "Training goes on with a dictionary of other words, or the same words in another order.",
        ALL,
        dictionaries._telling_its_task,
    ),
    Patch(
        "damaged-checkpoint",
        "fairseq.checkpoint_utils.load_checkpoint_to_cpu",
        'A damaged file ends in "Invalid argument" or an EOFError that does not name it.',
        ALL,
        inputs.explaining_damage,
    ),
    Patch(
        "other-model",
        "fairseq.checkpoint_utils.load_model_ensemble_and_task",
        "Weights that do not fit end in a list of tensor names; eval-lm takes the names of an "
        "ensemble for one.",
        ALL,
        inputs.explaining_other_weights,
    ),
    Patch(
        "other-model",
        "fairseq.trainer.Trainer.load_checkpoint",
        "A checkpoint of another model ends in advice without the difference.",
        ALL,
        inputs.explaining_other_model,
    ),
    Patch(
        "restore-file",
        "fairseq.checkpoint_utils.load_checkpoint",
        "--restore-file with a file that is not there trains from scratch without a word.",
        ALL,
        inputs.requiring_restore_file,
    ),
    Patch(
        "missing-dictionary",
        "fairseq.data.Dictionary.add_from_file",
        "A data folder that is not there ends in a FileNotFoundError about its dict.txt.",
        ALL,
        inputs.explaining_missing_dictionary,
    ),
    Patch(
        "data-files",
        "fairseq.data.data_utils.load_indexed_dataset",
        "A text that does not fit its index or its dictionary is taken in silence.",
        ALL,
        data.after_checking,
    ),
    Patch(
        "fingerprint",
        "fairseq_cli.preprocess.main",
        "A data folder says nothing of the dictionary that its numbers stand for.",
        ALL,
        data.then_fingerprinting,
    ),
    Patch(
        "prompts",
        "fairseq_cli.interactive.buffered_read",
        "A byte order mark becomes an unknown word, and a line that is not UTF-8 ends in a traceback.",
        ALL,
        prompts.reading_text,
    ),
    Patch(
        "symbols",
        "fairseq.data.Dictionary.encode_line",
        "<pad> in a text becomes the padding symbol, which every tool counts in another way.",
        ALL,
        prompts.with_symbols_unknown,
    ),
    Patch(
        "empty-text",
        "fairseq.data.data_utils.load_indexed_dataset",
        'An empty text ends in "cannot mmap an empty file".',
        ALL,
        inputs.explaining_empty_split,
    ),
    Patch(
        "last-batch",
        "fairseq.data.data_utils.batch_by_size",
        "The last batch is dropped if its size is not a multiple of --required-batch-size-multiple.",
        ALL,
        batching.with_last_batch,
    ),
    Patch(
        "adaptive-log-prob",
        "fairseq.modules.adaptive_softmax.AdaptiveSoftmax.get_log_prob",
        "It adds in place to what autograd needs, so --criterion cross_entropy cannot train an "
        "adaptive softmax.",
        ALL,
        adaptive.with_log_prob_that_can_be_trained,
        adaptive.log_prob_cannot_be_trained,
    ),
    Patch(
        "float-tensor",
        "fairseq.modules.adaptive_input.AdaptiveInput.__init__",
        "A buffer of uninitialised memory is saved, so that checkpoints of equal runs differ.",
        ALL,
        adaptive.with_zeroed_float_tensor,
    ),
    Patch(
        "float-tensor",
        "fairseq.modules.adaptive_softmax.TiedHeadModule.__init__",
        "A buffer of uninitialised memory is saved, so that checkpoints of equal runs differ.",
        ALL,
        adaptive.with_zeroed_float_tensor,
    ),
    Patch(
        "finite-scores",
        "fairseq.sequence_scorer.SequenceScorer.generate",
        "Tokens with an infinite score are left out of the perplexity, and NaN gives one of nan with "
        "status 0.",
        ALL,
        evaluation.with_finite_scores,
    ),
    Patch(
        "words",
        "fairseq_cli.eval_lm.eval_lm",
        "The perplexity is one a piece, and --post-process sentencepiece a NotImplementedError.",
        ALL,
        words._counting_words,
    ),
    Patch(
        "checkpoint-data",
        "fairseq_cli.eval_lm.eval_lm",
        "--add-bos-token of the training is forgotten.",
        ALL,
        checkpoints.with_bos_of_training,
    ),
    *(
        Patch("solves", target, _SOLVES, ALL, solves.reporting)
        for target in (
            "fairseq_cli.eval_lm.eval_lm",
            "fairseq_cli.validate.main",
            "fairseq_cli.generate.main",
            "fairseq_cli.interactive.main",
        )
    ),
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
        "A save is not flushed, all processes use one temporary name, and a failed one leaves it there.",
        ALL,
        disk.with_whole_saves,
    ),
    Patch(
        "plain-numbers",
        "fairseq.checkpoint_utils.torch_persistent_save",
        "A number of numpy in a checkpoint makes it one that torch does not load any more.",
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
        "A task is asked for its state in one process, where it cannot collect that of the others.",
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
        "The process group is never left, and now and then a finished run aborts with status 1.",
        ALL,
        distributed.then_leaving_the_group,
    ),
    Patch(
        "cpu-devices",
        "fairseq.models.distributed_fairseq_model.DistributedDataParallel",
        "device_ids is passed whatever the device, which torch refuses on the CPU.",
        ALL,
        distributed.without_devices_on_cpu,
    ),
    Patch(
        "divergence",
        "fairseq.trainer.Trainer.train_step",
        'A diverged training ends in a traceback of "gradients are Nan/Inf" that says nothing of '
        "what to change.",
        ALL,
        divergence.with_advice,
    ),
    Patch(
        "processes",
        "fairseq.distributed.utils.call_main",
        "Without GPUs several processes are not started, or not counted; those that are outlive "
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
        "Importing fairseq leaves the root logger at DEBUG, for matplotlib and all others.",
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
