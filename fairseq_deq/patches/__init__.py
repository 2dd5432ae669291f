"""Patches for faults of fairseq on today's torch and numpy.

Each patch is a function whose docstring names the fault. None edits a file of fairseq, does anything where
the fault is absent, or acts twice; `install` applies all of them.
"""

from __future__ import annotations

from .adaptive import initialise_float_tensors, make_adaptive_log_prob_differentiable
from .batching import batch_alike_after_resuming, keep_last_batch
from .checkpoints import (
    broadcast_checkpoints_with_safe_globals,
    copy_and_rename_atomically,
    read_checkpoints_as_data,
)
from .data import check_texts_when_opened, keep_fingerprints_of_data
from .dictionaries import refuse_other_dictionaries
from .distributed import (
    leave_process_groups,
    refuse_sharded_equilibria,
    start_processes_as_asked,
    wrap_cpu_models_without_devices,
)
from .divergence import stop_diverged_runs_with_advice
from .evaluation import (
    evaluate_context_windows_in_order,
    refuse_scores_that_are_not_finite,
    refuse_to_skip_blocks,
)
from .inputs import explain_missing_text, explain_unusable_checkpoints
from .literals import read_strings_as_literals
from .numpy2 import give_fairseq_np_compat
from .options import (
    accept_user_dir_of_imported_package,
    check_model_overrides,
    check_syntax_of_model_overrides,
    explain_precision_without_device,
)
from .precision import autocast_on_the_cpu
from .prompts import read_names_of_symbols_as_words, read_prompts_as_text, take_prompts_whole
from .sentences import say_option_errors_in_one_sentence
from .solves import report_solves_of_tools
from .updates import announce_finished_updates
from .words import count_words_of_subwords

# Where several wrap the same function, a later one is the outer one.
PATCHES = (
    give_fairseq_np_compat,
    read_strings_as_literals,
    read_checkpoints_as_data,
    broadcast_checkpoints_with_safe_globals,
    copy_and_rename_atomically,
    refuse_other_dictionaries,
    explain_unusable_checkpoints,
    check_texts_when_opened,
    keep_fingerprints_of_data,
    explain_missing_text,
    keep_last_batch,
    batch_alike_after_resuming,
    make_adaptive_log_prob_differentiable,
    initialise_float_tensors,
    refuse_to_skip_blocks,
    refuse_scores_that_are_not_finite,
    evaluate_context_windows_in_order,
    count_words_of_subwords,
    check_model_overrides,
    accept_user_dir_of_imported_package,
    start_processes_as_asked,
    leave_process_groups,
    refuse_sharded_equilibria,  # before processes start
    explain_precision_without_device,  # before processes start
    check_syntax_of_model_overrides,
    wrap_cpu_models_without_devices,
    autocast_on_the_cpu,
    stop_diverged_runs_with_advice,
    announce_finished_updates,
    read_prompts_as_text,
    read_names_of_symbols_as_words,
    take_prompts_whole,
    report_solves_of_tools,
    say_option_errors_in_one_sentence,  # last: it catches what the others raise
)


def install() -> None:
    """Apply every patch; calling it again changes nothing."""
    for patch in PATCHES:
        patch()
