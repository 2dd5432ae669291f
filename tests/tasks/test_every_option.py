"""Every option of the tasks and of the criterion is refused, or stands here with who makes use of it."""

from __future__ import annotations

from dataclasses import fields

import pytest
from fairseq.tasks.language_modeling import LanguageModelingConfig

from fairseq_deq.criterions.deq_lm_loss import DEQLossConfig
from fairseq_deq.errors import OptionError
from fairseq_deq.tasks.copy_memory import CopyMemoryConfig
from fairseq_deq.tasks.deq_language_modeling import DEQLanguageModelingTask

# option -> a value that streams of text cannot have
REFUSED = {
    "sample_break_mode": "eos",
    "output_dictionary_size": 100,
    "self_target": True,
    "past_target": True,
    "add_bos_token": True,
    "pad_to_fixed_length": True,
    "pad_to_fixed_bsz": True,
    "tokens_per_sample": 0,
}
USED = {
    "data": "the folder of the text",
    "future_target": "what a language model predicts, which is the default",
    "max_target_positions": "the model",
    "shorten_method": "fairseq's reading of the text, before it becomes a stream",
    "shorten_data_split_list": "the same",
    "dataset_impl": "fairseq's reading of the text",
    "seed": "the order of what is shuffled",
    "batch_size": "the number of streams",
    "batch_size_valid": "the number of streams",
    "data_buffer_size": "the loader",
    "tpu": "fairseq's trainer",
    "use_plasma_view": "fairseq's reading of the text",
    "plasma_path": "the same",
}


def _names(config: type) -> set[str]:
    return {one.name for one in fields(config)} - {"_name"}


def test_no_option_of_a_task_of_text_is_left_out_above():
    assert _names(LanguageModelingConfig) == {*REFUSED, *USED}


@pytest.mark.parametrize("name", REFUSED)
def test_what_streams_cannot_have_is_refused(name, data_bin):
    options = LanguageModelingConfig(
        data=str(data_bin), sample_break_mode="none", tokens_per_sample=8, max_target_positions=None
    )
    DEQLanguageModelingTask.setup_task(options)
    setattr(options, name, REFUSED[name])
    with pytest.raises(OptionError, match=f"--{name.replace('_', '-')}"):
        DEQLanguageModelingTask.setup_task(options)


def test_the_options_of_copy_memory_and_of_the_criterion_are_the_known_ones():
    # What the loss is divided by, and the window of its warnings; both are fairseq's.
    assert _names(DEQLossConfig) == {"sentence_avg", "log_interval"}
    for one in fields(CopyMemoryConfig):
        if one.type in (int, float):
            assert one.metadata.get("valid") is not None, one.name  # which is checked by the name
