"""What cannot be imported is refused in one sentence, and nothing is written."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from tools.original import DIM, random_state

from fairseq_deq.checkpoint_file import read_checkpoint
from fairseq_deq.tools.import_weights.command import main

TYPES, CUTOFFS = 40, (12, 20, 30)
STATE = random_state(1, TYPES, CUTOFFS, 2)
WORDS = ["<eos>", "<unk>", *(f"w{i}" for i in range(2, TYPES))]


def _refused(capsys, arguments: list[str], folder: Path) -> str:
    """The sentence of a refusal, after which `folder` has what it had."""
    before = sorted(path.name for path in folder.rglob("*"))
    assert main(arguments) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("fairseq-deq-import: ")
    assert error.count("\n") == 1, error
    assert sorted(path.name for path in folder.rglob("*")) == before
    return error


def _files(folder: Path, state=STATE, words=WORDS) -> list[str]:
    if state is not None:
        torch.save(state, folder / "weights.pth")
    (folder / "words.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    return [str(folder / name) for name in ("weights.pth", "words.txt", "new/checkpoint.pt")]


def _changed(**tensors):
    """The state_dict with some of its tensors changed, or left out where they are None."""
    names = {"heads": "func.dec_attn.r_w_bias", "gain": "func.pos_ff.ff1_net.weight_g"}
    names |= {"waves": "pos_emb.inv_freq", "class_bias": "crit.cluster_bias", "u": "inject_conv.bias"}
    state = dict(STATE)
    for name, tensor in tensors.items():
        state.pop(names.get(name, name))
        if tensor is not None:
            state[names.get(name, name)] = tensor
    return state


STATES = {
    "a whole module": (torch.nn.Linear(2, 2), "holds more than weights (torch.nn.modules.linear.Linear)"),
    "a list": ([1, 2], "holds a list; save model.state_dict()"),
    "nothing": ({}, "holds a dict"),
    "a checkpoint of fairseq": ({"model": STATE, "cfg": {}}, "is a checkpoint of fairseq already"),
    "weights of another model": ({"a.weight": torch.ones(2)}, "has no inject_conv.weight"),
    "one is missing": (_changed(class_bias=None), "has no crit.cluster_bias"),
    "one is left over": (STATE | {"func.more": torch.ones(2)}, "has not (func.more; 1 in all)"),
    "another shape": (_changed(u=torch.ones(5)), "inject_conv.bias is 5, where the other weights need 48"),
    "NaN": (_changed(u=torch.full((48,), torch.nan)), "holds NaN or infinity in inject_conv.bias"),
    "heads": (_changed(heads=torch.ones(3, 8)), "3 heads of 8 channels are not the 16 channels"),
    "other wavelengths": (_changed(waves=torch.ones(DIM // 2)), "pos_emb.inv_freq are not 10000^(-2i/16)"),
    "no g beside v": (_changed(gain=None), "has no func.pos_ff.ff1_net.weight_g"),
}


@pytest.mark.parametrize("case", STATES)
def test_other_weights_are_refused(case, tmp_path, capsys):
    state, sentence = STATES[case]
    assert sentence in _refused(capsys, _files(tmp_path, state), tmp_path)


def test_a_refused_module_is_not_run_and_the_way_to_its_weights_is_said(tmp_path, capsys):
    sentence = _refused(capsys, _files(tmp_path, torch.nn.Linear(2, 2)), tmp_path)
    assert "model_state_dict.pth" in sentence
    assert "state_dict()" in sentence


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "it is an empty file"),
        (b"<html>Sign in</html>", "it is a web page"),
        (b"hello", "torch cannot read it"),
        (None, "it is damaged"),
    ],
)
def test_other_files_are_refused(content, sentence, tmp_path, capsys):
    arguments = _files(tmp_path)
    path = Path(arguments[0])
    if content is None:
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2] ^= 255
        content = bytes(whole)
    path.write_bytes(content)
    assert sentence in _refused(capsys, arguments, tmp_path)


WORD_LISTS = {
    "too few": (WORDS[:-1], "has 39 words (<eos> counted), and the weights are for 40"),
    "a word twice": ([*WORDS[:-1], "w2"], "has the word w2 twice"),
    "a text": (["w2 w3 w4", *WORDS[1:]], "has more than a word in line 1"),
    "fairseq's own": ([*WORDS[:-1], "<pad>"], "has the word <pad>, which fairseq's"),
    "rare <unk>": (
        ["<eos>", *WORDS[2:], "<unk>"],
        "has <unk> as number 39, beyond the softmax's first band of 12",
    ),
}


@pytest.mark.parametrize("case", WORD_LISTS)
def test_other_vocabularies_are_refused(case, tmp_path, capsys):
    words, sentence = WORD_LISTS[case]
    assert sentence in _refused(capsys, _files(tmp_path, words=words), tmp_path)


def test_the_cache_of_the_reference_is_not_loaded(tmp_path, capsys):
    arguments = _files(tmp_path)
    Path(arguments[1]).write_bytes(pickle.dumps({"words": list(range(300))}))
    assert "is not a text in UTF-8" in _refused(capsys, arguments, tmp_path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--lower-case"], "--lower-case needs --count-words"),
        (["--data", "x"], "--data needs --from-transformer-lm"),
        (["--local-size", "-1"], "--local-size must be at least 0, got -1"),
        (["--tgt-len", "0"], "--tgt-len must be at least 1"),
        (["--cutoffs", "9,3"], "--cutoffs must be increasing positive numbers"),
        (["--cutoffs", "a"], "--cutoffs must be increasing positive numbers"),
        (["--f-thres", "0"], "--f-thres must be in [1, 100000], got 0"),
        (["--f-thres", "few"], "invalid int value"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_options_that_cannot_work_are_refused(options, sentence, tmp_path, capsys):
    assert sentence in _refused(capsys, [*_files(tmp_path), *options], tmp_path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "--cutoffs 20000,40000,200000 must be increasing and below the 40 words"),
        (["--cutoffs", "12,20"], "has 4 bands of words in its softmax, and --cutoffs make 3"),
    ],
)
def test_cutoffs_that_a_table_does_not_tell_must_fit(options, sentence, tmp_path, capsys):
    state = random_state(1, TYPES, CUTOFFS)
    assert sentence in _refused(capsys, [*_files(tmp_path, state), *options], tmp_path)


def test_files_that_are_there_are_left_alone(tmp_path, capsys):
    arguments = _files(tmp_path)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "dict.txt").write_text("other 1\n")
    assert "already exists with other words" in _refused(capsys, arguments, tmp_path)
    (tmp_path / "new" / "dict.txt").unlink()
    assert main(arguments) == 0
    capsys.readouterr()
    assert "already exists; give the name of a new file" in _refused(capsys, arguments, tmp_path)


def test_a_list_without_eos_begins_with_it_and_one_without_unk_is_told_of(tmp_path, capsys):
    words = ["w1", *WORDS[2:]]
    assert main(_files(tmp_path, words=words)) == 0
    assert "has no <unk>: words that it does not know get the probability 0" in capsys.readouterr().out
    assert (tmp_path / "new" / "dict.txt").read_text().split()[::2] == words
    weights = read_checkpoint(tmp_path / "new" / "checkpoint.pt")["model"]
    bias = weights["decoder.adaptive_softmax.head.word_proj.bias"]
    assert [i for i, b in enumerate(bias.tolist()) if b == -10000] == [0, 1, 3]  # <s>, <pad>, <unk>
    assert torch.equal(bias[2], STATE["crit.out_layers.0.bias"][0])
    assert torch.equal(bias[4:], STATE["crit.out_layers.0.bias"][1:])


def test_lower_case_counts_both_ways_of_writing(tmp_path, capsys):
    arguments = _files(tmp_path)
    text = "".join(f"w{i} W{i}\n" for i in range(1, TYPES - 1)) + "End end END\n"
    Path(arguments[1]).write_text(text, encoding="utf-8")
    assert "has 78 words" not in _refused(capsys, [*arguments, "--count-words"], tmp_path)
    assert main([*arguments, "--count-words", "--lower-case"]) == 0
    assert (tmp_path / "new" / "dict.txt").read_text().startswith("end 3\nw1 2\nw2 2\n")


# ------------------------------------------------------------------ a stock model


def _start(checkpoint: Path, folder: Path, *options: str) -> list[str]:
    return ["--from-transformer-lm", str(checkpoint), str(folder / "new" / "start.pt"), *options]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--decoder-embed-dim", "32"], "--decoder-embed-dim is that of"),
        (["--share-decoder-input-output-embed"], "--share-decoder-input-output-embed is that of"),
        (["--arch", "transformer_lm"], "--arch must be a DEQ language model, got transformer_lm"),
        (["--arch", "nothing"], "invalid choice"),
        (["--data", "nowhere"], "there is no nowhere/dict.txt"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--f-eps", "3"], "--f-eps must be in (0, 1)"),
    ],
)
def test_options_that_contradict_a_stock_model_are_refused(
    options, sentence, tiny_checkpoint, tmp_path, capsys
):
    assert sentence in _refused(capsys, _start(tiny_checkpoint, tmp_path, *options), tmp_path)


def test_other_models_are_refused(deq_checkpoint, tmp_path, capsys):
    sentence = _refused(capsys, _start(deq_checkpoint, tmp_path), tmp_path)
    assert "is a checkpoint of deq_transformer_lm_tiny; --from-transformer-lm takes one of" in sentence
    sentence = _refused(capsys, _start(tmp_path / "none.pt", tmp_path), tmp_path)
    assert "there is no checkpoint" in sentence


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"decoder_input_dim": 8}, "has --decoder-input-dim 8 and --decoder-embed-dim 16"),
        ({"no_scale_embedding": True}, "was trained with --no-scale-embedding"),
        ({"character_embeddings": True}, "was trained with --character-embeddings"),
    ],
)
def test_stock_models_of_other_words_are_refused(change, sentence, tiny_checkpoint, tmp_path, capsys):
    state = read_checkpoint(tiny_checkpoint)
    state["cfg"]["model"] |= change
    torch.save(state, tmp_path / "stock.pt")
    assert sentence in _refused(capsys, _start(tmp_path / "stock.pt", tmp_path), tmp_path)
