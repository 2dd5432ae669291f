"""Faults of fairseq in what it reads and scores: checkpoints, dictionaries, texts, probabilities."""

from __future__ import annotations

from . import (
    adaptive,
    batching,
    checkpoints,
    data,
    dictionaries,
    evaluation,
    inputs,
    literals,
    numpy2,
    prompts,
    solves,
    words,
)
from ._patch import ALL, Patch


def _in_tasks(registry: dict[str, type]) -> dict[str, type]:
    from ..tasks.language_modeling import in_place_of_fairseqs

    return in_place_of_fairseqs(registry)


_EVALUATED = "Strings of a configuration are evaluated as Python code, also those from a checkpoint."
_SOLVES = "Scores and texts are printed without saying whether the solves behind them have succeeded."

READING = (
    Patch(
        "language-modeling",
        "fairseq.tasks.TASK_REGISTRY",
        "--task language_modeling skips blocks, makes new batches after a resume and takes prompts word "
        "by word; this package's class takes its place.",
        ALL,
        _in_tasks,
    ),
    Patch(
        "numpy-compat",
        "fairseq.data.token_block_dataset.np",
        "--sample-break-mode eos needs np.compat.long, which is gone since numpy 2.",
        ALL,
        numpy2.with_np_compat,
        numpy2.numpy_has_no_compat,
    ),
    Patch(
        "numpy-compat",
        "fairseq.data.language_pair_dataset.np",
        "fairseq-interactive needs np.compat.long, which is gone since numpy 2.",
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
        "A checkpoint is loaded without checking its checksums; addresses and interpolations in it are "
        "looked up, and torch now refuses its argparse.Namespace.",
        ALL,
        checkpoints.reading_data,
    ),
    Patch(
        "checkpoint-data",
        "fairseq.checkpoint_utils.load_checkpoint_to_cpu",
        "For overrides without names the checkpoint is blamed, and a model of another kind fails later.",
        ALL,
        checkpoints.with_overrides_checked,
    ),
    Patch(
        "checkpoint-data",
        "fairseq.checkpoint_utils.load_model_ensemble_and_task",
        "A model that cannot be built ends in an unrelated error, and --add-bos-token of the training is "
        "forgotten.",
        ALL,
        checkpoints.with_settings_of_the_file,
    ),
    Patch(
        "safe-globals",
        "fairseq.distributed.utils._broadcast_object_slow",
        "torch now refuses to load the checkpoint that rank 0 sends, so that no run of several processes "
        "resumes.",
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
        "Weights that do not fit end in a list of tensor names; fairseq-eval-lm reads the names of an "
        "ensemble as one name.",
        ALL,
        inputs.explaining_other_weights,
    ),
    Patch(
        "other-model",
        "fairseq.trainer.Trainer.load_checkpoint",
        "For a checkpoint of another model there is advice, but the difference is not named.",
        ALL,
        inputs.explaining_other_model,
    ),
    Patch(
        "restore-file",
        "fairseq.checkpoint_utils.load_checkpoint",
        "--restore-file with a file that is not there trains from scratch without a warning.",
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
        "A text that does not fit its index or its dictionary is accepted without a warning.",
        ALL,
        data.after_checking,
    ),
    Patch(
        "fingerprint",
        "fairseq_cli.preprocess.main",
        "A data folder does not record the dictionary with which its texts were binarised.",
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
        "<pad> in a text becomes the padding symbol, which each tool counts differently.",
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
        "It changes in place a tensor that autograd needs, so --criterion cross_entropy cannot train an "
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
        "Tokens with an infinite score are left out of the perplexity, and with a NaN it is nan, with "
        "status 0.",
        ALL,
        evaluation.with_finite_scores,
    ),
    Patch(
        "words",
        "fairseq_cli.eval_lm.eval_lm",
        "The perplexity is per piece of a word, and --post-process sentencepiece ends in a "
        "NotImplementedError.",
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
)
