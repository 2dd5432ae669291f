"""An exported model computes what the package computes, for every option that changes a forward pass."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from export.small import ADAPTIVE, CONFIGS, TIED, scores, small
from models.builders import tokens
from selection import slow_unless

from fairseq_deq.export.checkpoint import SHARED, TRANSFORMER, TRELLISNET, read_model
from fairseq_deq.export.remote.decoder_deq import DEQDecoder

# Nats. Both solve to 1e-6; at the tolerance of a user they take the same steps.
CLOSE = 1e-4
# Where the positions of a TrellisNet converge side by side.
CALM = {"init_std": 0.2}

# option -> values, each with what it takes to count
BOTH = {
    "decoder_embed_dim": [{"decoder_embed_dim": 32}],
    "wnorm": [{"wnorm": "true"}, {"wnorm": "false"}],
    "share_decoder_input_output_embed": [{"share_decoder_input_output_embed": "true"}],
    "adaptive_input": [{"adaptive_input": "true", "adaptive_input_cutoff": "10,20"}],
    "adaptive_input_cutoff": [{"adaptive_input": "true", "adaptive_input_cutoff": "7,52"}],
    "adaptive_input_factor": [ADAPTIVE | {"adaptive_input_factor": 2.0}],
    "adaptive_softmax_cutoff": [{"adaptive_softmax_cutoff": "10,20"}, {"adaptive_softmax_cutoff": "30,52"}],
    "adaptive_softmax_factor": [{"adaptive_softmax_cutoff": "10,20", "adaptive_softmax_factor": 2.0}],
    "adaptive_softmax_projection": [
        ADAPTIVE | {"adaptive_softmax_projection": "true"},
        TIED | {"adaptive_softmax_projection": "true"},
    ],
    "output_bias": [
        {"output_bias": "true"},
        {"output_bias": "true", "share_decoder_input_output_embed": "true"},
        ADAPTIVE | {"output_bias": "true"},
        TIED | {"output_bias": "true", "tie_adaptive_proj": "true", "adaptive_softmax_projection": "true"},
    ],
    "tie_adaptive_weights": [TIED],
    "tie_adaptive_proj": [TIED | {"tie_adaptive_proj": "true"}],
    "f_solver": [{"f_solver": "picard"}],
    "f_thres": [{"f_thres": n, "f_eps": 1e-9} for n in (1, 2, 3, 13, 14, 30)],
    "f_eps": [{"f_eps": 0.05}, {"f_eps": 1e-3}],
    "stop_mode": [{"stop_mode": "abs", "f_eps": 1e-3}],
    "f_memory": [{"f_memory": 3, "f_thres": 9, "f_eps": 1e-9}],
    "f_damping": [{"f_damping": 0.6, "f_thres": 9, "f_eps": 1e-9}],
    "preconditioner_rank": [{"teach": True, "preconditioner_rank": 4}],
    "learned_start": [{"teach": True}, {"teach": True, "f_eps": 1e-2}],
    "subseq_len": [{"subseq_len": 5}, {"subseq_len": 8, "f_eps": 1e-2}],
}
OF_A_TRANSFORMER = BOTH | {
    "decoder_ffn_embed_dim": [{"decoder_ffn_embed_dim": 24}],
    "decoder_attention_heads": [{"decoder_attention_heads": 4}],
    "decoder_head_dim": [{"decoder_head_dim": 12}],
    "decoder_normalize_before": [
        {"decoder_normalize_before": "true"},
        {"decoder_normalize_before": "true", "f_thres": 9, "f_eps": 1e-9},
    ],
    "decoder_closing_norm": [
        {"decoder_normalize_before": "true", "decoder_closing_norm": "false"},
        {"decoder_normalize_before": "true", "decoder_closing_norm": "false", "f_thres": 9, "f_eps": 1e-9},
    ],
    "activation_fn": [{"activation_fn": "gelu"}, {"activation_fn": "silu"}],
    "decoder_gated_ffn": [{"decoder_gated_ffn": "true", "wnorm": "true"}],
    "decoder_norm": [{"decoder_norm": "rms"}],
    "decoder_norm_affine": [
        {"decoder_norm_affine": "true"},
        {"decoder_norm_affine": "true", "decoder_norm": "rms", "decoder_normalize_before": "true"},
        {
            "decoder_norm_affine": "true",
            "decoder_normalize_before": "true",
            "decoder_closing_norm": "false",
            "decoder_layers": 2,
        },
    ],
    "decoder_input_residual": [
        {"decoder_input_residual": "true"},
        {
            "decoder_input_residual": "true",
            "decoder_normalize_before": "true",
            "decoder_layers": 2,
            "local_size": 4,
        },
    ],
    "decoder_positions": [
        {"decoder_positions": "rotary"},
        {
            "decoder_positions": "rotary",
            "local_size": 4,
            "decoder_normalize_before": "true",
            "decoder_layers": 2,
        },
    ],
    "decoder_layers": [{"decoder_layers": 2}, {"decoder_layers": 3, "local_size": 4, "teach": True}],
    "local_size": [{"local_size": 3}],
}
OF_A_TRELLISNET = BOTH | {
    "nhid": [{"nhid": 12}],
    "nout": [{"nout": 12}],
    "ksize": [{"ksize": 3}, {"ksize": 4, "solver_scope": "position"} | CALM],
    "solver_scope": [
        {"solver_scope": "position"} | CALM,
        {"solver_scope": "position", "f_thres": 9, "f_eps": 1e-9},
        {"solver_scope": "position", "teach": True} | CALM,
        {"solver_scope": "recurrence", "teach": True, "f_eps": 1e-2},
    ],
}
REFUSED = {
    "solver_scope",
    "subseq_forget",
    "solver_policy",
    "gradient",
    "pretrain_steps",
}  # see test_refusals
# Of training, of the command line of other tools, or of how fast a solve is found.
WITHOUT_EFFECT = {
    *("dropout", "attention_dropout", "dropouti", "dropouth", "emb_dropout", "wdrop"),
    *("adaptive_softmax_dropout", "init", "init_std", "init_range", "embed_std", "keep_converged"),
    *("b_solver", "b_thres", "b_eps", "b_memory", "early_eps", "early_share", "early_precision"),
    *("active_set", "cuda_graph"),
    *("phantom_steps", "phantom_damping", "shine_refine", "jac_loss_weight", "jac_loss_freq"),
    *("jac_incremental", "spectral_radius", "pretrain_layers", "pretrain_random_layers", "seed"),
    *("max_update", "tokens_per_sample", "max_target_positions"),
    "add_bos_token",  # of the tokenizer: see test_tokenizer
    "mem_len",  # a text is read from its beginning, and all of it remembered
    "dilation",  # 1
}
TABLES = {"transformer": OF_A_TRANSFORMER, "trellisnet": OF_A_TRELLISNET}
# Embeddings and softmax, the same code for both families: by default a TrellisNet has those of one option.
OF_WORDS = {name for name in BOTH if name.startswith(("adaptive", "output_bias", "share_", "tie_"))}
NOT_AGAIN = {("trellisnet", name) for name in OF_WORDS - {"tie_adaptive_proj"}}
CASES = [
    pytest.param(
        family, options, id=f"{family}-{name}-{i}", marks=slow_unless((family, name) not in NOT_AGAIN)
    )
    for family, table in TABLES.items()
    for name, values in table.items()
    for i, options in enumerate(values)
]


@pytest.mark.parametrize("family", TABLES)
def test_every_option_of_the_package_is_compared_refused_or_of_no_effect(family):
    _, config, _, _ = CONFIGS[family]
    known = {*TABLES[family], *REFUSED, *WITHOUT_EFFECT}
    assert {one.name for one in fields(config)} - {"_name"} <= known


@pytest.mark.parametrize(("family", "table"), [("transformer", TRANSFORMER), ("trellisnet", TRELLISNET)])
def test_what_an_older_checkpoint_lacks_has_the_default_of_the_package(family, table):
    _, config, _, _ = CONFIGS[family]
    for name, value in table.items():
        default = config.__dataclass_fields__[name].default
        assert str(getattr(default, "value", default)) == str(value), name


@pytest.mark.parametrize(("family", "options"), CASES)
def test_log_probabilities_and_evaluations_are_those_of_the_package(tmp_path, family, options):
    one = small(tmp_path, family, **options)
    source = tokens(3, 13)
    found, cache = scores(one.exported(), source)
    with torch.no_grad():
        x, extra = one.model(source)
    expected = one.model.get_normalized_probs((x, extra), log_probs=True)
    assert found.exp().sum(-1).allclose(torch.ones(3, 13), atol=1e-5)
    assert (found - expected).abs().max() < CLOSE
    solves = [equilibrium.result for equilibrium in extra["equilibria"]]
    assert cache.positions == source.numel()
    evaluations = sum(int(solve.lane_nfe.sum()) for solve in solves)
    assert (
        abs(cache.evaluations - evaluations) <= evaluations // 50
    )  # rounding may let a solve stop sooner or later
    assert cache.converged == sum(int(solve.converged.sum()) for solve in solves)


@pytest.mark.parametrize("family", TABLES)
def test_options_of_the_solve_can_be_changed(tmp_path, family):
    one = small(tmp_path, family, f_eps=1e-6)
    source = tokens(2, 9)
    loose, _ = scores(one.exported(f_eps=0.3, f_thres=3), source)
    assert (loose - one.log_probs(source)).abs().max() > CLOSE
    assert set(SHARED) <= set(TRANSFORMER)


@pytest.mark.parametrize("family", TABLES)
def test_bfloat16_follows_that_of_the_package(tmp_path, family):
    one = small(tmp_path, family, teach=True, f_eps=1e-3)
    source = tokens(3, 21)
    exact = one.log_probs(source)
    found, cache = scores(one.exported().bfloat16(), source)
    one.model.bfloat16()
    theirs = (one.log_probs(source).float() - exact).abs().mean()
    ours = (found.float() - exact).abs().mean()
    with torch.no_grad():
        _, extra = one.model(source)
    converged = torch.cat([solved.result.converged for solved in extra["equilibria"]], 1)
    assert cache.converged_share >= converged.float().mean() - 0.02
    assert cache.converged_share > 0.95
    assert ours < 1.5 * theirs
    assert ours < 0.1


STORED = Path(__file__).resolve().parents[1] / "data" / "checkpoints"


@pytest.mark.parametrize("name", sorted(path.stem for path in STORED.glob("*.pt")))
def test_checkpoints_of_earlier_versions_score_as_they_did(name):
    """See tests/test_stored_checkpoints.py, whose text and numbers these are."""
    found = read_model(STORED / f"{name}.pt", {"f_eps": 1e-6, "f_thres": 300})
    decoder = DEQDecoder(found.options)
    decoder.load_state_dict(found.weights.tensors)
    text = torch.randint(4, 28, (2, 12), generator=torch.Generator().manual_seed(3))
    log_probs, _ = scores(decoder, text[:, :-1])
    picked = log_probs.gather(-1, text[:, 1:].unsqueeze(-1)).squeeze(-1)
    stored = torch.tensor(json.loads((STORED / "scores.json").read_text())[name])
    torch.testing.assert_close(picked, stored, rtol=0, atol=2e-5)
