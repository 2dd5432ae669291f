"""Checks of exported models in an environment with transformers and without fairseq: it runs there by itself.

    python in_transformers.py FOLDER...

Each folder has an export and `expected.pt`. The figures are printed, a JSON object a line.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

CLOSE = 1e-4  # nats


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def log_probs(model, tokens, **inputs):
    return model(tokens, **inputs).logits.float().log_softmax(-1)


def check_scores(model, expected):
    """Log-probabilities, loss, and what is told of the solves."""
    tokens, theirs = expected["tokens"], expected["log_probs"]
    output = model(tokens, labels=tokens)
    found = output.logits.log_softmax(-1)
    parity = float((found - theirs).abs().max())
    assert parity < CLOSE, parity
    picked = theirs[:, :-1].gather(2, tokens[:, 1:, None])
    assert abs(float(output.loss + picked.mean())) < CLOSE
    assert output.evaluations.shape == output.converged.shape == output.residual.shape == tokens.shape
    assert int(output.evaluations.min()) >= 1
    assert abs(float(output.converged_share) - expected["converged"]) < 0.02
    assert torch.allclose(model(tokens, logits_to_keep=1).logits, output.logits[:, -1:], atol=1e-5)
    assert torch.equal(model(tokens, return_dict=False)[0], output.logits)
    return parity


def cache_of(output):
    return output["cache"] if "cache" in output else output["past_key_values"]


def check_cache(model, expected):
    """A text read in two calls, and in single tokens."""
    tokens, theirs = expected["tokens"], expected["log_probs"]
    first = model(tokens[:, :9])
    cache = cache_of(first)
    parts = [first.logits]
    for t in range(9, tokens.shape[1]):
        parts.append(model(tokens[:, t : t + 1], past_key_values=cache).logits)
    distance = float((torch.cat(parts, 1).log_softmax(-1) - theirs).abs().max())
    assert distance < CLOSE, (model.config.f_eps, distance)
    assert cache.get_seq_length() == tokens.shape[1]
    assert cache.positions == tokens.numel()
    assert cache.converged_share > 0.98 * expected["converged"]


def check_generation(model, prompts, pad):
    """With its cache and without, alone and in a batch, greedily, with beams and at random."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    for options in (
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 0, "temperature": 1.5},
        {"do_sample": True, "top_p": 0.8, "num_beams": 2},
    ):
        made = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            made.append(
                model.generate(ids, attention_mask=mask, max_new_tokens=12, use_cache=use_cache, **options)
            )
        assert torch.equal(*made), options
        assert made[0].shape[1] > width
        assert not (made[0][:, width:] == pad).all()
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    for row, prompt in zip(batch, prompts):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0]
        end = min(len(alone), 12 + len(prompt))
        assert torch.equal(row[width - len(prompt) :][:end], alone[:end])
    output = model.generate(ids, attention_mask=mask, max_new_tokens=4, return_dict_in_generate=True)
    cache = cache_of(output)
    assert cache.positions >= sum(map(len, prompts))
    assert 0.98 < cache.converged_share <= 1.0
    return round(cache.evaluations / cache.positions, 2)


def check_bfloat16(folder, expected):
    model = load(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    output = model(expected["tokens"])
    assert output.logits.dtype == torch.bfloat16
    assert float(output.converged_share) == 1.0
    distance = float((output.logits.float().log_softmax(-1) - expected["log_probs"]).abs().mean())
    assert distance < 2 * expected["bfloat16"] + 1e-3, (distance, expected["bfloat16"])
    assert model.generate(expected["tokens"], max_new_tokens=3, do_sample=False).shape[1] > 3
    return distance


def check_tokenizer(folder, expected):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert len(tokenizer) == expected["types"]
    for text, numbers, decoded in expected["texts"]:
        assert tokenizer(text)["input_ids"] == numbers, text
        assert tokenizer.decode(numbers, skip_special_tokens=True) == decoded, text
        if hasattr(tokenizer, "pieces"):  # a continuation follows its prompt, with the space between
            for k in range(2, len(numbers)):
                head, tail = (
                    tokenizer.decode(x, skip_special_tokens=True) for x in (numbers[:k], numbers[k:])
                )
                assert head + tail == decoded, (text, k)
    texts = [text for text, _, _ in expected["texts"]]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    lengths = [len(numbers) for _, numbers, _ in expected["texts"]]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["attention_mask"][:, -1].all()  # padded on the left, as generation needs
    tokenizer.save_pretrained(folder / "again")
    again = AutoTokenizer.from_pretrained(folder / "again", trust_remote_code=True)
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    return tokenizer


def check_file_round_trip(model, folder, expected):
    model.save_pretrained(folder / "again")
    assert torch.equal(load(folder / "again")(expected["tokens"]).logits, model(expected["tokens"]).logits)


def refusal(call):
    """The sentence that a call is refused with."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing"


def check_refusals(model, folder, tokens):
    for call, word in (
        (lambda: load(folder, f_solver="newton"), "f_solver must be anderson or picard"),
        (lambda: load(folder, f_thres=0), "f_thres must be at least 1"),
        (lambda: model.train()(tokens), "call model.eval()"),
        (lambda: model.eval()(tokens, past_key_values=[1]), "must be what an earlier call returned"),
        (lambda: model.generate(tokens[:1], assistant_model=model), "assisted generation is not supported"),
    ):
        assert word in refusal(call)
        model.eval()


def check(folder):
    expected = torch.load(folder / "expected.pt")
    model = load(folder)
    assert not model.training
    with torch.no_grad():
        figures = {"export": folder.name, "parity": check_scores(model, expected)}
        check_cache(model, expected)
        tokenizer = check_tokenizer(folder, expected)
        prompts = [row[:n].tolist() for row, n in zip(expected["tokens"], (3, 9, 6))]
        figures["evaluations"] = check_generation(model, prompts, tokenizer.pad_token_id)
        figures["bfloat16"] = check_bfloat16(folder, expected)
        loose = load(folder, f_eps=0.3, f_thres=2)
        assert loose.config.f_thres == 2
        assert (log_probs(loose, expected["tokens"]) - expected["log_probs"]).abs().max() > CLOSE
        check_file_round_trip(model, folder, expected)
    check_refusals(model, folder, expected["tokens"])
    write = pipeline("text-generation", model=str(folder), tokenizer=str(folder), trust_remote_code=True)
    text = expected["texts"][0][0]
    assert write(text, max_new_tokens=5, do_sample=True)[0]["generated_text"].startswith(text.split()[0])
    return figures


if __name__ == "__main__":
    for name in ("fairseq", "fairseq_deq", "omegaconf", "hydra"):
        assert importlib.util.find_spec(name) is None, f"{name} is here"
    for argument in sys.argv[1:]:
        print(json.dumps({"transformers": transformers.__version__} | check(Path(argument))), flush=True)
