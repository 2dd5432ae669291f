"""What the command writes and says."""

import ast
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from export.small import TIED, small

from fairseq_deq.export.folder import REMOTE
from fairseq_deq.tools.export import main

safetensors = pytest.importorskip("safetensors.torch")

CASES = [
    pytest.param("transformer", {"share_decoder_input_output_embed": "true"}, 52 * 16, id="softmax"),
    pytest.param("transformer", {}, 0, id="nothing"),
    pytest.param("trellisnet", TIED, 10 * 16 + 10 * 4 + 32 * 1, id="words"),
    pytest.param(
        "transformer",
        TIED | {"tie_adaptive_proj": "true"},
        10 * 16 + 10 * 4 + 32 * 1 + 16 * 4 + 16 * 1,
        id="words and projections",
    ),
]


@pytest.mark.parametrize(("family", "options", "twice"), CASES)
def test_parameters_stored_and_in_effect(tmp_path, capsys, family, options, twice):
    one = small(tmp_path, family, wnorm="false", **options)
    out = tmp_path / "deep" / "out"
    assert main([str(one.path), str(out), "--data", str(tmp_path), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["parameters_stored"] == sum(p.numel() for p in one.model.parameters())
    assert numbers["parameters_in_effect"] == numbers["parameters_stored"] + twice
    assert bool(numbers["tied"]) == bool(twice)
    saved = safetensors.load_file(out / "model.safetensors")
    assert sum(t.numel() for t in saved.values()) == numbers["parameters_stored"]
    assert all(t.dtype == torch.float32 for t in saved.values())


def test_what_it_prints_and_writes(tmp_path, capsys):
    one = small(tmp_path, "transformer", teach=True, share_decoder_input_output_embed="true")
    out = tmp_path / "out"
    assert main([str(one.path), str(out), "--model-overrides", "{'f_eps': 1e-3}"]) == 0
    said = capsys.readouterr().out
    assert "in effect; embedding.weight: tied, and used for the softmax too" in said
    assert "a preconditioner of rank 16 and a learned start; tolerance 0.001" in said
    code = {path.name for path in REMOTE.glob("*_deq.py")} - {"tokenization_deq.py"}
    names = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == {*names, *code, "tokenizer.json", "tokenizer_config.json"}
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_deq.DEQForCausalLM"
    assert config["f_eps"] == 1e-3
    # Others may read what is written, as far as this user's other files.
    assert len({path.stat().st_mode for path in out.iterdir() if path.suffix != ".py"}) == 1


def test_neither_the_command_nor_the_code_it_writes_needs_fairseq(tmp_path):
    code = (
        "import sys; sys.modules['fairseq'] = None; sys.modules['transformers'] = None\n"
        "import fairseq_deq.tools.export\n"
        "assert 'fairseq_deq.models' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("path", sorted(REMOTE.glob("*_deq.py")), ids=lambda path: path.stem)
def test_the_code_imports_torch_transformers_and_itself_alone(path):
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))
    named = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            named.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1
            assert (REMOTE / f"{node.module}.py").exists()
    named -= set(sys.stdlib_module_names)
    allowed = {"torch"}
    allowed |= (
        {"transformers"} if path.stem.startswith(("modeling", "configuration", "tokenization")) else set()
    )
    allowed |= {"sentencepiece"} if path.stem.startswith("tokenization") else set()
    assert named <= allowed


def test_transformers_copies_every_file_that_the_model_is_made_of():
    """It copies what modeling_deq names itself, and not what those files name."""
    text = (REMOTE / "modeling_deq.py").read_text(encoding="utf-8")
    others = {path.stem for path in REMOTE.glob("*_deq.py")} - {"modeling_deq", "tokenization_deq"}
    assert {name for name in others if f"from .{name} import" in text} == others
    configuration = (REMOTE / "configuration_deq.py").read_text(encoding="utf-8")
    assert [line for line in configuration.splitlines() if line.startswith("from .")] == [
        "from .options_deq import ModelOptions"
    ]
    assert "from ." not in (REMOTE / "options_deq.py").read_text(encoding="utf-8")
