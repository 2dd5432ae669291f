"""A file is read as data, and damage in it is noticed, wherever it is."""

from __future__ import annotations

import io
import json
import random

import pytest
import torch

from fairseq_deq.checkpoint_file import read_checkpoint
from fairseq_deq.errors import OptionError
from fairseq_deq.zip_file import find_damage


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint of a few thousand bytes, so that every bit of it can be tried."""
    path = tmp_path_factory.mktemp("small") / "small.pt"
    weights = {"a": torch.arange(5.0), "b": torch.ones(40), "c": torch.ones(2, dtype=torch.bfloat16)}
    torch.save({"model": weights, "cfg": {"model": {"_name": "small"}}, "extra_state": {}}, path)
    return path


def saved(folder, cfg=None, **entries):
    """A checkpoint with these options."""
    path = folder / "saved.pt"
    state = {"model": {"a": torch.ones(3)}, "cfg": cfg or {"model": {"_name": "small"}}, **entries}
    torch.save(state, path)
    return path


def regions(whole):
    """Names of the byte regions of a zip, with the bytes of each."""
    import zipfile

    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members, directory = archive.infolist(), archive.start_dir
    starts = [member.header_offset for member in members] + [directory]
    parts = {}
    for member, start, stop in zip(members, starts, starts[1:]):
        name_length = int.from_bytes(whole[start + 26 : start + 28], "little")
        extra_length = int.from_bytes(whole[start + 28 : start + 30], "little")
        data = start + 30 + name_length + extra_length
        parts[f"header of {member.filename}"] = range(start, data)
        parts[f"data of {member.filename}"] = range(data, data + member.file_size)
        parts[f"after {member.filename}"] = range(data + member.file_size, stop)
    parts["table of contents"] = range(directory, len(whole))
    return parts


def test_every_bit_that_changes_is_noticed(small):
    whole = small.read_bytes()
    assert find_damage(io.BytesIO(whole)) is None
    for name, places in regions(whole).items():
        missed = []
        for place in places:
            for bit in range(8):
                changed = bytearray(whole)
                changed[place] ^= 1 << bit
                if find_damage(io.BytesIO(bytes(changed))) is None:
                    missed.append((place, bit))
        assert missed == [], name


def test_bits_that_change_in_a_trained_checkpoint_are_refused_in_a_sentence(deq_checkpoint, tmp_path):
    whole, path = deq_checkpoint.read_bytes(), tmp_path / "changed.pt"
    draw = random.Random(3)
    parts = [places for places in regions(whole).values() if places]
    for places in [*parts[:30], *parts[-3:]]:
        changed = bytearray(whole)
        changed[draw.choice(places)] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(OptionError, match="is not a whole fairseq checkpoint") as refused:
            read_checkpoint(path)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("damage", ["zeros", "cut", "grown", "swapped"])
def test_larger_damage_is_noticed(small, tmp_path, damage):
    whole = small.read_bytes()
    middle = len(whole) // 2
    changed = {
        "zeros": whole[:middle] + bytes(64) + whole[middle + 64 :],
        "cut": whole[:middle],
        "grown": whole + b"\0",
        "swapped": whole[:middle] + whole[middle + 1 : middle - 1 : -1] + whole[middle + 2 :],
    }[damage]
    path = tmp_path / "changed.pt"
    path.write_bytes(changed)
    with pytest.raises(OptionError, match="is not a whole fairseq checkpoint"):
        read_checkpoint(path)


OTHER_FILES = {
    "empty": (b"", "it is an empty file"),
    "page": (b"<!DOCTYPE html>\n<html><body>404</body></html>", "it is a web page"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "it is a git-lfs pointer",
    ),
    "gzip": (b"\x1f\x8b\x08" + bytes(30), "it is an archive that is still compressed"),
    "safetensors": (
        len(json.dumps({"a": 1})).to_bytes(8, "little") + json.dumps({"a": 1}).encode(),
        "it is a file of safetensors",
    ),
    "text": (b"the people of the United States\n" * 20, "is not a whole fairseq checkpoint"),
    "noise": (random.Random(1).randbytes(3000), "is not a whole fairseq checkpoint"),
}


@pytest.mark.parametrize(("content", "sentence"), OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_file_of_another_kind_is_named(tmp_path, content, sentence):
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    with pytest.raises(OptionError) as refused:
        read_checkpoint(path)
    assert sentence in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


CONTENTS = {
    "no weights": ({"cfg": {}}, "it has no weights of a model"),
    "no options": ({"model": {"a": torch.ones(1)}}, "it has no options"),
    "a list": ([1, 2], "it holds a list"),
    "a tensor": (torch.ones(2), "it holds a Tensor"),
    "numbers for weights": ({"model": {"a": 1}, "cfg": {}}, "more than named tensors"),
    "numbers for names": ({1: 2}, "it has no weights of a model"),
}


@pytest.mark.parametrize(("state", "sentence"), CONTENTS.values(), ids=CONTENTS)
def test_what_is_missing_in_a_file_is_named(tmp_path, state, sentence):
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(OptionError, match="is not a whole fairseq checkpoint") as refused:
        read_checkpoint(tmp_path / "other.pt")
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    "cfg",
    [
        {"bpe": {"sentencepiece_model": "http://host/x?h=${oc.env:HOME}"}},
        {"bpe": {"_name": "gpt2", "gpt2_encoder_json": "https://host/encoder.json"}},
        {"model": {"a": [{"b": ("c", "${env:HOME}")}]}},
        {"task": {"data": "s3://bucket/data"}},
        {"distributed_training": {"distributed_init_method": "${oc.env:HOME}"}},
    ],
)
def test_interpolations_and_addresses_are_refused(tmp_path, cfg):
    with pytest.raises(OptionError, match="among its options"):
        read_checkpoint(saved(tmp_path, cfg))


def test_addresses_that_the_run_met_at_are_left_out(tmp_path):
    cfg = {"distributed_training": {"distributed_init_method": "tcp://localhost:1234"}, "model": {"n": 3}}
    state = read_checkpoint(saved(tmp_path, cfg))
    assert state["cfg"] == {"distributed_training": {"distributed_init_method": None}, "model": {"n": 3}}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, number):
    weights = {"a": torch.ones(3), "b": torch.ones(2, 4, dtype=torch.float16)}
    weights["b"][1, 2] = number
    with pytest.raises(OptionError, match=r"NaN or infinity in its weights \(b, 1 of 8 numbers\)"):
        read_checkpoint(saved(tmp_path, model=weights))


def test_a_buffer_that_fairseq_never_sets_may_hold_anything(tmp_path):
    weights = {"embed._float_tensor": torch.tensor([float("nan")])}
    assert list(read_checkpoint(saved(tmp_path, model=weights))["model"]) == ["embed._float_tensor"]


def test_a_file_without_checksums_is_read_as_before(tmp_path):
    state = {"model": {"a": torch.ones(3)}, "cfg": {"model": {}}}
    torch.save(state, tmp_path / "older.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(tmp_path / "older.pt")["model"]["a"], torch.ones(3))
