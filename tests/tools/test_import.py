"""What is imported computes what the original does, and begins a training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from models.builders import decode
from runs import json_lines, read_losses, read_perplexity
from selection import few_of
from tools.original import DIM, HEADS, Original, random_state

import fairseq_deq  # noqa: F401  (registers the models)
from fairseq_deq.checkpoint_file import read_checkpoint
from fairseq_deq.layers.memory import MemoryCarrier
from fairseq_deq.tools.import_weights.command import main

TYPES, UNK = 61, 7
WORDS = ["<eos>", *(f"w{i}" for i in range(1, TYPES))]
WORDS[UNK] = "<unk>"
CUTOFFS = (20, 31, 47)
RELEASED = {"cutoffs": CUTOFFS, "div_val": 2}
EXACT = {"f_solver": "broyden", "f_eps": 1e-12, "f_thres": 400}
# The text that is scored: words of all bands, <eos> and <unk> among them.
TEXT = [int(x) for x in torch.randint(0, TYPES, (23,), generator=torch.Generator().manual_seed(5))] + [0, UNK]


def _save(folder: Path, state, words=WORDS) -> tuple[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "weights.pth")
    (folder / "words.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    return str(folder / "weights.pth"), str(folder / "words.txt")


def _load(path: Path, **overrides):
    models, cfg, _ = checkpoint_utils.load_model_ensemble_and_task(
        [str(path)], arg_overrides={"data": str(path.parent), **overrides}
    )
    return models[0].eval(), cfg


def _numbers(folder: Path, words=WORDS) -> torch.Tensor:
    """fairseq's number of each word of the reference."""
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    names = {"<eos>": "</s>"}
    numbers = torch.tensor([dictionary.index(names.get(word, word)) for word in words])
    assert len(set(numbers.tolist())) == len(words)
    return numbers


@torch.no_grad()
def _scores(model, tokens: torch.Tensor, segment: int) -> torch.Tensor:
    """Log-probabilities of everything after each of the tokens (S,), read in segments with a memory."""
    carrier, found = None, []
    for begin in range(0, len(tokens), segment):
        carrier = MemoryCarrier(carrier)
        output = model(tokens[None, begin : begin + segment], memory=carrier)
        assert all(bool(e.result.converged.all()) for e in output[1]["equilibria"])
        if model.decoder.adaptive_softmax is None:  # fairseq would round to float32
            found.append(output[0][0].log_softmax(-1))
        else:
            found.append(model.get_normalized_probs(output, log_probs=True)[0])
    return torch.cat(found)


CASES = {
    "released": (RELEASED, {}, []),
    "projections that came apart": (RELEASED | {"tied_projections": False}, {}, []),
    "words that are not tied": (RELEASED | {"tied_words": False}, {}, []),
    "without weight norm": (RELEASED | {"weight_norm": False}, {}, []),
    "pre-norm": (RELEASED | {"gain": 3.0}, {"pre_norm": True}, ["--pre-lnorm"]),
    "a horizon": (RELEASED, {"horizon": 5}, ["--local-size", "5"]),
    "one table, bands": ({"cutoffs": CUTOFFS}, {}, ["--cutoffs", "20,31,47"]),
    "one table, bands, not tied": (
        {"cutoffs": CUTOFFS, "tied_words": False},
        {},
        ["--cutoffs", "20,31,47"],
    ),
    "one table, bands, narrow": (
        {"cutoffs": CUTOFFS, "embedding_dim": 10},
        {},
        ["--cutoffs", "20,31,47"],
    ),
    "one table": ({}, {}, []),
    "one table, not tied": ({"tied_words": False}, {}, []),
    "one table, narrow": ({"embedding_dim": 10}, {}, []),
    "bands, narrow": (RELEASED | {"embedding_dim": 12}, {}, []),
}


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_are_those_of_the_original(case, tmp_path):
    layout, maths, options = CASES[case]
    state = random_state(1, TYPES, **layout)
    out = tmp_path / "new" / "checkpoint.pt"
    sizes = ["--mem-len", "6", "--tgt-len", "8"]
    assert main([*_save(tmp_path, state), str(out), *options, *sizes]) == 0
    bands = {name: layout[name] for name in ("cutoffs", "div_val") if name in layout}
    expected = Original(state, **bands, **maths).log_probs(TEXT, 8, 6)
    model, _ = _load(out, **EXACT)
    numbers = _numbers(out.parent)
    found = _scores(model.double(), numbers[torch.tensor(TEXT)], 8)
    # Products of projections are rounded to float32.
    precision = 1e-5 if "narrow" in case else 1e-9
    torch.testing.assert_close(found[:, numbers], expected, rtol=0, atol=precision)
    others = [i for i in range(found.shape[1]) if i not in set(numbers.tolist())]
    assert others == [0, 1]  # <s> and <pad>
    assert bool((found[:, others].exp() == 0).all())
    assert expected.std() > 1


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A random state_dict of the released layout, and the checkpoint that it becomes."""
    folder = tmp_path_factory.mktemp("released")
    state = random_state(1, TYPES, **RELEASED)
    out = folder / "new" / "checkpoint.pt"
    assert main([*_save(folder, state), str(out), "--mem-len", "6", "--tgt-len", "8"]) == 0
    return state, out


def test_the_checkpoint_has_the_sizes_of_the_original(released):
    state, out = released
    model, cfg = _load(out)
    options = cfg.model
    assert (options.decoder_embed_dim, options.decoder_attention_heads) == (DIM, HEADS)
    assert (options.adaptive_softmax_cutoff, options.local_size) == ("22,33,49", 1000)
    assert options.tie_adaptive_weights == options.tie_adaptive_proj == options.wnorm == "true"
    # Every number of the state_dict once, two rows and biases for <s> and <pad>, and nothing beside.
    tied = sum(t.numel() for name, t in state.items() if "out_layers" in name and "weight" in name)
    tied += sum(t.numel() for name, t in state.items() if "out_projs" in name and ".0." not in name)
    stored = sum(t.numel() for t in state.values()) - tied - state["pos_emb.inv_freq"].numel()
    assert sum(p.numel() for p in model.parameters()) == stored + 2 * DIM + 2


def test_decoding_gives_the_scores_of_the_original(released):
    state, out = released
    model, _ = _load(out, **EXACT)
    numbers = _numbers(out.parent)
    features, _ = decode(model.double(), numbers[torch.tensor(TEXT[:9])][None])
    found = model.get_normalized_probs((features, {}), log_probs=True)[0]
    expected = Original(state, **RELEASED).log_probs(TEXT[:9], 9, 0)
    torch.testing.assert_close(found[:, numbers], expected, rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, text):
    """A text with <unk>, empty lines and words of equal counts; its first words are what the test has."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = (text / "train.txt").read_text(encoding="utf-8").splitlines()[:40]
    lines = [" ".join("<unk>" if w == "the" else w for w in line.split()) for line in lines]
    (folder / "train.txt").write_text("\n".join([*lines, "", " "]) + "\n", encoding="utf-8")
    (folder / "test.txt").write_text("\n".join([*lines[:3], "", lines[5]]) + "\n", encoding="utf-8")
    return folder


def _counted(path: Path) -> list[str]:
    """Words as the reference numbers them: the most frequent first, and then those that come first."""
    words = path.read_text(encoding="utf-8").split()
    return ["<eos>", *sorted(dict.fromkeys(words), key=lambda word: (-words.count(word), words.index(word)))]


def test_fairseq_eval_lm_gives_the_perplexity_of_the_original(corpus, in_process, tmp_path, capsys):
    words = _counted(corpus / "train.txt")
    bands = {"cutoffs": (30, 70, 110), "div_val": 2}
    state = random_state(1, len(words), **bands)
    torch.save(state, tmp_path / "weights.pth")
    out = tmp_path / "new" / "checkpoint.pt"
    arguments = [str(tmp_path / "weights.pth"), str(corpus / "train.txt"), str(out), "--count-words"]
    assert main([*arguments, "--mem-len", "12", "--tgt-len", "8", "--f-eps", "1e-6", "--f-thres", "300"]) == 0
    assert f"{len(words) + 2} types" in capsys.readouterr().out
    data = tmp_path / "bin"
    in_process(
        *("fairseq-preprocess", "--only-source", "--srcdict", out.parent / "dict.txt"),
        *("--testpref", corpus / "test.txt", "--destdir", data, "--workers", "1"),
    )
    options = "--task deq_language_modeling --gen-subset test --batch-size 1 --num-workers 0 --cpu".split()
    output = in_process(
        "fairseq-eval-lm", data, "--path", out, *options, "--tokens-per-sample", "8"
    ).checked()
    stream = []
    for line in (corpus / "test.txt").read_text(encoding="utf-8").splitlines():
        stream += [*(words.index(word) for word in line.split()), 0]
    # fairseq scores the first word too, after an end of a line.
    found = Original(state, **bands).log_probs([0, *stream[:-1]], 8, 12)
    loss = -found[torch.arange(len(stream)), torch.tensor(stream)].mean()
    count, perplexity = read_perplexity(output.text)
    assert count == len(stream)
    assert perplexity == pytest.approx(loss.exp().item(), rel=2e-4)


def _training(data: Path, log: str) -> tuple[str, ...]:
    """The arguments of fairseq-train that the command printed, for a short run."""
    line = next(line for line in log.splitlines() if line.startswith("train on: fairseq-train DATA "))
    words = line.removeprefix("train on: fairseq-train DATA ").split()
    place = words.index("--user-dir")
    del words[place : place + 2]
    small = (
        "--optimizer adam --lr 0.003 --batch-size 4 --max-update 12 --num-workers 0 --cpu --log-format json"
    )
    return (str(data), *words, *small.split(), "--log-interval", "1", "--disable-validation")


def test_an_imported_model_trains_on(in_process, released, tmp_path, capsys):
    state, _ = released
    out = tmp_path / "checkpoint.pt"
    assert main([*_save(tmp_path, state), str(out), "--mem-len", "6", "--tgt-len", "8"]) == 0
    log = capsys.readouterr().out
    text = "".join(" ".join(WORDS[i] for i in TEXT if WORDS[i] != "<eos>") + "\n" for _ in range(12))
    (tmp_path / "train.txt").write_text(text, encoding="utf-8")
    in_process(
        *("fairseq-preprocess", "--only-source", "--srcdict", tmp_path / "dict.txt"),
        *("--trainpref", tmp_path / "train.txt", "--destdir", tmp_path / "bin", "--workers", "1"),
    )
    ran = in_process(
        "fairseq-train", *_training(tmp_path / "bin", log), "--save-dir", tmp_path / "run"
    ).checked()
    losses = read_losses(ran.text)
    assert losses[-1] < losses[0] - 0.5
    trained = read_checkpoint(tmp_path / "run" / "checkpoint_last.pt")["model"]
    begun = read_checkpoint(out)["model"]
    for name in ("head.word_proj.bias", "head.class_proj.bias", "head.projection.weight", "tail.1.2.bias"):
        name = f"decoder.adaptive_softmax.{name}"
        assert not torch.equal(trained[name], begun[name]), name
    assert bool((trained["decoder.adaptive_softmax.head.word_proj.bias"][:2] == -10000).all())


# ------------------------------------------------------------------ a stock model's words

STOCK = {
    "shared": "--share-decoder-input-output-embed",
    "own softmax": "",
    "adaptive": "--adaptive-input --adaptive-input-cutoff 50,200 --adaptive-input-factor 2 "
    "--adaptive-softmax-cutoff 50,200 --adaptive-softmax-factor 2 --tie-adaptive-weights --tie-adaptive-proj",
}


BEGINNINGS = {
    "--finetune-from-model": (),
    "--restore-file": ("--reset-optimizer", "--reset-dataloader", "--reset-meters", "--reset-lr-scheduler"),
}


@pytest.mark.parametrize(("case", "way"), few_of((case, way) for case in STOCK for way in BEGINNINGS))
def test_a_stock_models_words_begin_a_training(
    case, way, in_process, tiny_training, data_bin, tmp_path, capsys
):
    in_process(
        *("fairseq-train", *tiny_training, *STOCK[case].split()),
        *("--save-dir", tmp_path / "stock", "--disable-validation"),
    )
    stock = tmp_path / "stock" / "checkpoint_last.pt"
    out = tmp_path / "start" / "checkpoint.pt"
    options = "--decoder-ffn-embed-dim 32 --decoder-attention-heads 2 --tokens-per-sample 32 --f-thres 12"
    assert main(["--from-transformer-lm", str(stock), str(out), *options.split()]) == 0
    log = capsys.readouterr().out
    assert (out.parent / "dict.txt").read_bytes() == (data_bin / "dict.txt").read_bytes()
    begun, old = read_checkpoint(out)["model"], read_checkpoint(stock)["model"]
    words = [name for name in begun if "embed_tokens" in name or "output_proj" in name or "softmax" in name]
    taken = [n for n in words if not n.endswith(("_float_tensor", "version"))]
    assert len(taken) == {"shared": 1, "own softmax": 2, "adaptive": 12}[case]
    assert all(torch.equal(begun[name], old[name]) for name in taken)
    assert begun["decoder.layer.qkv.weight_v"].std() > 0.01
    words = list(_training(data_bin, log))
    place = words.index("--finetune-from-model")
    words[place : place + 2] = [way, str(out), *BEGINNINGS[way]]
    ran = in_process("fairseq-train", *words, "--save-dir", tmp_path / "run").checked().text
    assert json_lines(ran)[0]["num_updates"] == "1"
    losses = read_losses(ran)
    assert losses[-1] < losses[0]


def test_what_was_learned_of_words_helps(in_process, data_bin, tmp_path, capsys, tiny_training):
    """The first losses of a training are lower with the words of a stock model that was trained longer."""
    words = ("--max-update", "60", "--share-decoder-input-output-embed", "--disable-validation")
    in_process("fairseq-train", *tiny_training, *words, "--save-dir", tmp_path / "stock")
    stock, out = tmp_path / "stock" / "checkpoint_last.pt", tmp_path / "start" / "checkpoint.pt"
    options = "--decoder-ffn-embed-dim 32 --decoder-attention-heads 2 --tokens-per-sample 32 --f-thres 12"
    assert main(["--from-transformer-lm", str(stock), str(out), *options.split()]) == 0
    arguments = list(_training(data_bin, capsys.readouterr().out))
    begun = read_losses(in_process("fairseq-train", *arguments, "--save-dir", tmp_path / "a").checked().text)
    place = arguments.index("--finetune-from-model")
    del arguments[place : place + 2]
    drawn = read_losses(in_process("fairseq-train", *arguments, "--save-dir", tmp_path / "b").checked().text)
    assert sum(begun) / len(begun) < sum(drawn) / len(drawn)
