"""What cannot be exported is refused in one sentence, and nothing is written."""

import os
import pickle
import sys

import pytest
import torch
from export.small import CONFIGS, EXACT, SOLVE, TIED, save, small
from models.builders import build

from fairseq_deq.errors import OptionError
from fairseq_deq.export.checkpoint import read_model
from fairseq_deq.tools.export import main

pytest.importorskip("safetensors")

REFUSED = {
    "broyden": ({"f_solver": "broyden"}, "--f-solver broyden cannot be exported"),
    "sample": ({"solver_scope": "sample"}, "--solver-scope sample cannot be exported"),
    "batch": ({"solver_scope": "batch"}, "--solver-scope batch cannot be exported"),
    "raise": ({"solver_policy": "raise"}, "--solver-policy raise cannot be exported"),
    "unroll": ({"gradient": "unroll"}, "--gradient unroll cannot be exported"),
    "forget": ({"subseq_len": 4, "subseq_forget": "true"}, "--subseq-forget cannot be exported"),
    "stack": ({"pretrain_steps": 9}, "still a stack of tied layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_an_export_would_ignore(tmp_path, capsys, name):
    options, sentence = REFUSED[name]
    one = small(tmp_path, "transformer", **options)
    assert main([str(one.path), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("fairseq-deq-export: ")
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["broyden", "sample", "raise", "forget"])
def test_the_sentence_says_what_to_type(tmp_path, name):
    options, _ = REFUSED[name]
    one = small(tmp_path, "transformer", **options)
    with pytest.raises(OptionError, match=r"--model-overrides \"(\{.*\})\"") as refused:
        read_model(one.path, {})
    typed = str(refused.value).split('"')[1]
    assert read_model(one.path, eval(typed)).options.solver_scope == "position"


def test_a_stranger_s_checkpoint_runs_no_code(tmp_path, capsys):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    small(tmp_path, "transformer")
    path = tmp_path / "evil.pt"
    torch.save({"model": {"w": torch.ones(1)}, "cfg": {"model": Evil()}}, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert main([str(path), str(tmp_path / "out")]) == 1
    assert "holds more than data" in capsys.readouterr().err
    assert not ran.exists()


def test_another_model_another_size_and_another_dictionary(tmp_path, capsys):
    one = small(tmp_path, "transformer")
    _, config, sizes, _ = CONFIGS["transformer"]
    cfg = config(**(EXACT | sizes | SOLVE | {"max_update": 9}))

    def said(*arguments):
        assert main([*map(str, arguments)]) == 1
        return capsys.readouterr().err

    out = tmp_path / "out"
    save(tmp_path / "other.pt", one.model, "transformer_lm", cfg)
    assert "is a checkpoint of transformer_lm" in said(tmp_path / "other.pt", out)
    assert "there is no checkpoint" in said(tmp_path / "none.pt", out)
    assert "has no option nonsense" in said(one.path, out, "--model-overrides", "{'nonsense': 1}")
    assert "must be a dictionary" in said(one.path, out, "--model-overrides", "[1]")
    assert "f_thres must be at least 1" in said(one.path, out, "--model-overrides", "{'f_thres': 0}")
    sizes = "{'decoder_ffn_embed_dim': 48}"
    assert "are not those of its options" in said(one.path, out, "--model-overrides", sizes)
    assert "has no dict.txt" in said(one.path, out, "--data", tmp_path / "none")
    (tmp_path / "dict.txt").write_text("one 1\ntwo 1\n")
    assert "has 6 types with fairseq's own, and the model 52" in said(one.path, out)
    (tmp_path / "dict.txt").write_text("no number\n")
    assert "is not a dictionary of fairseq" in said(one.path, out)
    assert not out.exists()
    assert not list(tmp_path.glob("out.tmp*"))


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    one = small(tmp_path, "transformer")
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("all of it")
    assert main([str(one.path), str(out)]) == 1
    assert "already exists" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_weights_that_an_export_does_not_know_are_no_small_matter(tmp_path):
    _, config, sizes, _ = CONFIGS["transformer"]
    model = build(0, torch.float32, **SOLVE)
    cfg = config(**(EXACT | sizes | SOLVE | {"max_update": 9}))
    save(
        tmp_path / "more.pt",
        model,
        "deq_transformer_lm",
        cfg,
        model=model.state_dict() | {"decoder.x": torch.ones(1)},
    )
    with pytest.raises(OptionError, match=r"has weights that an export does not know \(decoder.x"):
        read_model(tmp_path / "more.pt", {})
    less = {name: w for name, w in model.state_dict().items() if not name.endswith("out.bias")}
    save(tmp_path / "less.pt", model, "deq_transformer_lm", cfg, model=less)
    with pytest.raises(OptionError, match=r"has no weights decoder.layer.out.bias"):
        read_model(tmp_path / "less.pt", {})


def test_tied_weights_that_differ_are_noticed(tmp_path):
    one = small(tmp_path, "transformer", **TIED)
    state = torch.load(one.path, weights_only=True)
    name = "decoder.adaptive_softmax.tail.0.2.weight"
    state["model"][name] = state["model"][name] + 1
    torch.save(state, one.path)
    with pytest.raises(OptionError, match="differs from the tensor that its options tie it to"):
        read_model(one.path, {})


def test_what_is_to_be_installed_is_said(tmp_path, capsys, monkeypatch):
    one = small(tmp_path, "transformer")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert main([str(one.path), str(tmp_path / "out")]) == 1
    assert 'pip install "fairseq-deq[export]"' in capsys.readouterr().err
