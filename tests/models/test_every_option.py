"""Every option of the models counts: another value makes another run, or is refused."""

from dataclasses import fields
from enum import Enum
from functools import cache

import pytest
import torch
from models.builders import task, tokens

from fairseq_deq.criterions.deq_lm_loss import DEQLanguageModelLoss
from fairseq_deq.errors import OptionError
from fairseq_deq.layers.memory import MemoryCarrier
from fairseq_deq.models.deq_transformer_lm import DEQTransformerConfig, DEQTransformerLanguageModel
from fairseq_deq.models.deq_trellisnet_lm import DEQTrellisNetConfig, DEQTrellisNetLanguageModel
from fairseq_deq.options import Range, ignored

SMALL = {"decoder_embed_dim": 16, "init_std": 0.2, "f_thres": 8, "b_thres": 8, "f_eps": 1e-3, "b_eps": 1e-3}
OF_THE_TASK = {
    "seed": 1,
    "tokens_per_sample": 16,
    "max_target_positions": None,
    "add_bos_token": False,
    "max_update": 10,
}
ADAPTIVE = {"adaptive_input": "true", "adaptive_input_cutoff": "10,20", "adaptive_softmax_cutoff": "10,20"}
TIED = ADAPTIVE | {"tie_adaptive_weights": "true"}

# Where all positions converge, some before others.
CALM = {"f_eps": 0.05, "f_thres": 60, "init_std": 0.05, "solver_scope": "position"}

# option -> another value than its default, and what it takes to count
SHARED = {
    "decoder_embed_dim": (24, {}),
    "dropout": (0.3, {}),
    "wnorm": ("other", {}),
    "init": ("uniform", {}),
    "init_std": (0.1, {}),
    "init_range": (0.2, {"init": "uniform"}),
    "embed_std": (0.5, {}),
    "share_decoder_input_output_embed": ("true", {}),
    "adaptive_input": ("true", {"adaptive_input_cutoff": "10,20"}),
    "adaptive_input_cutoff": ("20,30", ADAPTIVE),
    "adaptive_input_factor": (2.0, ADAPTIVE),
    "adaptive_softmax_cutoff": ("20,30", {}),
    "adaptive_softmax_factor": (2.0, ADAPTIVE),
    "adaptive_softmax_dropout": (0.3, ADAPTIVE),
    "adaptive_softmax_projection": ("true", ADAPTIVE),
    "output_bias": ("true", {}),
    "tie_adaptive_weights": ("true", ADAPTIVE),
    "tie_adaptive_proj": ("true", TIED),
    "f_solver": ("picard", {}),
    "b_solver": ("picard", {}),
    "f_thres": (3, {}),
    "b_thres": (3, {}),
    "f_eps": (0.3, {}),
    "b_eps": (0.3, {}),
    "early_precision": ("bfloat16", {"early_precision": "full", "f_thres": 40, "b_thres": 40}),
    "stop_mode": ("abs", CALM),
    "solver_scope": ("sample", {}),
    "f_memory": (3, {}),
    "b_memory": (3, {}),
    "f_damping": (0.5, {}),
    "active_set": ("always", CALM | {"active_set": "never"}),
    "cuda_graph": ("auto", CALM),
    "preconditioner_rank": (4, {}),
    "learned_start": ("other", {}),
    "keep_converged": (0.0, {}),
    "early_eps": (0.3, {}),
    "early_share": (0.1, {"early_eps": 0.3}),
    "solver_policy": ("raise", {"f_eps": 1e-9}),
    "gradient": ("jfb", {}),
    "phantom_steps": (2, {"gradient": "phantom"}),
    "phantom_damping": (0.5, {"gradient": "phantom"}),
    "shine_refine": (1, {"gradient": "shine", "solver_scope": "position"}),
    "jac_loss_weight": (1.0, {}),
    "jac_loss_freq": (0.0, {"jac_loss_weight": 1.0}),
    "jac_incremental": (1, {}),
    "spectral_radius": (3, {}),
    "pretrain_steps": (9, {}),
    "pretrain_layers": (3, {"pretrain_steps": 9}),
    "pretrain_random_layers": ("true", {"pretrain_steps": 9}),
    "mem_len": (4, {}),
    "subseq_len": (3, {}),
    "subseq_forget": ("true", {"subseq_len": 2}),
}
TRANSFORMER = SHARED | {
    "decoder_ffn_embed_dim": (24, {}),
    "decoder_attention_heads": (4, {}),
    "decoder_head_dim": (4, {}),
    "decoder_normalize_before": ("true", {}),
    "decoder_layers": (2, {}),
    "decoder_closing_norm": ("other", {"decoder_normalize_before": "true"}),
    "activation_fn": ("gelu", {}),
    "decoder_gated_ffn": ("true", {}),
    "decoder_norm": ("rms", {}),
    "decoder_norm_affine": ("true", {}),
    "decoder_input_residual": ("true", {}),
    "decoder_positions": ("rotary", {}),
    "attention_dropout": (0.3, {}),
    "local_size": (3, {}),
}
TRELLIS = SHARED | {
    "nhid": (12, {}),
    "nout": (8, {}),
    "ksize": (3, {}),
    "dilation": (2, {}),  # refused: an equilibrium has one layer
    "dropouti": (0.3, {}),
    "dropouth": (0.3, {}),
    "emb_dropout": (0.3, {}),
    "wdrop": (0.3, {}),
    "solver_scope": ("position", {}),
    "subseq_forget": ("true", {"subseq_len": 2, "ksize": 5}),
}
FAMILIES = {
    "transformer": (
        DEQTransformerLanguageModel,
        DEQTransformerConfig,
        {"decoder_ffn_embed_dim": 32, "decoder_attention_heads": 2},
        TRANSFORMER,
    ),
    "trellis": (DEQTrellisNetLanguageModel, DEQTrellisNetConfig, {"nhid": 8, "f_damping": 0.9}, TRELLIS),
}
# A Transformer's f closes with a norm: its states have a root mean square of 1, and rel is abs. So few
# positions are one multiple of 16, none of which can be left out. And a CPU records no graphs.
EQUAL = [
    ("transformer", "stop_mode"),
    *((family, name) for family in FAMILIES for name in ("active_set", "cuda_graph")),
]
CASES = [
    (family, name)
    for family, (*_, table) in FAMILIES.items()
    for name in table
    if (family, name) not in EQUAL
]


class Task:
    """What the criterion asks of a task."""

    target_dictionary = task().target_dictionary


def fingerprint(family, options, dtype=torch.float64):
    """Numbers that tell two runs apart: losses, statistics and gradients in training, statistics at
    validation."""
    model_class, config, small, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class.build_model(config(**(SMALL | small | OF_THE_TASK | options)), task()).to(dtype)
    criterion = DEQLanguageModelLoss(Task(), sentence_avg=False)
    model.set_num_updates(3)
    found = []
    for training in (True, False):
        model.train(training)
        carrier = MemoryCarrier()
        for segment in range(2):  # the second has something to remember
            source, carrier = tokens(2, 6, seed=segment), MemoryCarrier(carrier)
            net_input = {"src_tokens": source, "memory": carrier}
            sample = {
                "id": torch.arange(2),
                "net_input": net_input,
                "target": source.roll(1, 1),
                "ntokens": 12,
            }
            with torch.set_grad_enabled(training):
                loss, _, log = criterion(model, sample)
            if training:
                loss.backward()
            found += [float(value) for _, value in sorted(log.items())]
    found.append(sum(entry.numel() for entry in model.state_dict().values()))  # what it can learn as well
    return found + [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]


def ending(family, options):
    return _ending(family, tuple(options.items()))


@cache  # many options are compared with the same run
def _ending(family, options):
    options = dict(options)
    # An early precision is for float32 alone; everything else is compared without its rounding.
    dtype = torch.float32 if "early_precision" in options else torch.float64
    try:
        return fingerprint(family, options, dtype)
    except (ValueError, RuntimeError) as error:
        return str(error)


@pytest.mark.parametrize(("family", "name"), CASES, ids=[f"{family}-{name}" for family, name in CASES])
def test_another_value_makes_another_run_or_is_refused(family, name):
    _, config, _, table = FAMILIES[family]
    value, context = table[name]
    default = config.__dataclass_fields__[name].default
    if value == "other":
        value = "false" if default == "true" else "true"
    assert str(getattr(default, "value", default)) != str(value)
    assert ending(family, context) != ending(family, context | {name: value})


@pytest.mark.parametrize("family", FAMILIES)
def test_no_option_is_left_out_above(family):
    _, config, _, table = FAMILIES[family]
    assert {one.name for one in fields(config)} - {"_name"} == {*table, *OF_THE_TASK}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_has_a_range_and_a_value_outside_is_refused(family):
    model_class, config, small, _ = FAMILIES[family]
    for one in fields(config):
        if one.type not in (int, float) or one.name in OF_THE_TASK:
            continue
        valid = one.metadata.get("valid")
        assert isinstance(valid, Range), one.name
        outside = -1 if one.type is int else -1.0
        options = SMALL | small | OF_THE_TASK | {one.name: outside}
        with pytest.raises(OptionError, match=f"^--{one.name.replace('_', '-')} must be .*, got -1"):
            model_class.build_model(config(**options), task())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_choice_is_checked_where_argparse_does_not(family):
    model_class, config, small, _ = FAMILIES[family]
    for one in fields(config):
        if isinstance(one.type, type) and issubclass(one.type, Enum):
            options = SMALL | small | OF_THE_TASK | {one.name: "none of them"}
            with pytest.raises(OptionError, match=f"^--{one.name.replace('_', '-')} must be one of "):
                model_class.build_model(config(**options), task())


def test_an_option_that_does_not_count_is_told_from_one_that_does():
    def told(**options):
        return dict(ignored(DEQTransformerConfig(**options), DEQTransformerConfig))

    assert told() == {}
    assert told(phantom_steps=3) == {"phantom_steps": "--gradient phantom, and --gradient is ift"}
    assert told(phantom_steps=3, gradient="phantom") == {}
    assert [*told(pretrain_layers=3)] == ["pretrain_layers"]
    assert told(pretrain_layers=3, pretrain_steps=5) == {}
    assert [*told(b_memory=3, b_solver="picard")] == ["b_memory"]


def test_max_target_positions_bounds_the_positions():
    _, config, small, _ = FAMILIES["transformer"]
    options = SMALL | small | OF_THE_TASK | {"max_target_positions": 12}
    model = DEQTransformerLanguageModel.build_model(config(**options), task())
    assert model.max_positions() == model.max_decoder_positions() == 12
