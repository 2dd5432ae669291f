"""Turn weights that were trained elsewhere into a checkpoint of fairseq.

    fairseq-deq-import STATE_DICT VOCABULARY OUT.pt [options]

takes the state_dict of a DEQ-Transformer of the reference code (locuslab/deq, version 2.0), and its words: a
file with one word per line in the order of their numbers, or with --count-words the text that it was trained
with. OUT.pt computes what the original does; a dict.txt for it is written beside it, to be given to
fairseq-preprocess --srcdict.

    fairseq-deq-import --from-transformer-lm CHECKPOINT OUT.pt --arch deq_transformer_lm [model options]

takes the embeddings and the softmax of a stock transformer_lm, and draws the rest: OUT.pt is the start of a
training, for fairseq-train --finetune-from-model OUT.pt.

No code in a file is run. The command prints what it wrote, and the options of fairseq-train with which to
continue training.

Examples:

    fairseq-deq-import model_state_dict.pth wikitext-103/wiki.train.tokens imported/checkpoint.pt \\
        --count-words
    fairseq-deq-import model_state_dict.pth words.txt imported/checkpoint.pt --pre-lnorm --mem-len 300
    fairseq-deq-import --from-transformer-lm stock/checkpoint_best.pt start/checkpoint.pt \\
        --arch deq_transformer_lm --decoder-ffn-embed-dim 2048
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...data_folder import words_fingerprint
from ...errors import OptionError
from ..command import command_line, describe
from .checkpoint import (
    configuration,
    model_of,
    with_architecture,
    with_weights,
    write_checkpoint,
    write_dictionary,
)
from .conversion import convert
from .reference import read_reference
from .state_dict import Tensors, read_state_dict
from .transformer_lm import dictionary_of, read_words_of
from .vocabulary import Placement, count_words, read_words

PROGRAM = "fairseq-deq-import"
_START = "--from-transformer-lm"
# The reference sees 1000 positions where its --local_size is 0.
_REFERENCE_LOCAL_SIZE = 1000
_CUTOFFS = "20000,40000,200000"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; those of the new model, with `--from-transformer-lm`, as `model_options`.

    Raises:
        OptionError: one is wrong.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    starts = any(word == _START or word.startswith(f"{_START}=") for word in argv)
    parser = describe(argparse.ArgumentParser(allow_abbrev=False), PROGRAM, __doc__)
    add = parser.add_argument
    add(
        _START,
        nargs=2,
        type=Path,
        metavar=("CHECKPOINT", "OUT.pt"),
        help="write a start for a training, with the word vectors of CHECKPOINT; model options of "
        "fairseq-train may follow",
    )
    add(
        "--data",
        type=Path,
        help=f"with {_START}: folder with its dict.txt (default: the data folder of its training)",
    )
    if not starts:
        _add_reference(add)
    args, rest = parser.parse_known_args(argv)
    args.model_options = rest
    if rest and not starts:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if starts:
        args.out = args.from_transformer_lm[1]
        args.model_options = with_architecture(rest)
    else:
        if args.data is not None:
            raise OptionError(f"--data needs {_START}; leave it out")
        _check_reference(args)
    if args.out.exists():
        raise OptionError(f"{args.out} already exists; give the name of a new file")
    return args


def _add_reference(add: Callable[..., Any]) -> None:
    """The options of the reference's weights."""
    add("state_dict", metavar="STATE_DICT", type=Path, help="weights of the reference code")
    add(
        "vocabulary",
        metavar="VOCABULARY",
        type=Path,
        help="file with its words, one per line, or the text they were counted in",
    )
    add("out", metavar="OUT.pt", type=Path, help="the checkpoint to write; dict.txt is written beside it")
    add(
        "--count-words",
        action="store_true",
        help="VOCABULARY is the text in which the reference code counted its words",
    )
    add("--lower-case", action="store_true", help="with --count-words: count words in lower case")
    add("--pre-lnorm", action="store_true", help="the reference was trained with --pre_lnorm")
    add(
        "--local-size",
        type=int,
        default=0,
        metavar="N",
        help="the reference's --local_size (default: 0, which means 1000)",
    )
    add(
        "--cutoffs",
        metavar="N,N",
        help=f"cut-offs of a softmax of --div_val 1, which its weights do not show (default: {_CUTOFFS})",
    )
    add("--mem-len", type=int, default=150, metavar="N", help="positions remembered (default: 150)")
    add("--tgt-len", type=int, default=150, metavar="N", help="positions of a segment (default: 150)")
    add(
        "--f-thres",
        type=int,
        default=30,
        metavar="N",
        help="largest number of evaluations of f (default: 30)",
    )
    add("--f-eps", type=float, default=1e-3, metavar="X", help="relative tolerance (default: 0.001)")


def _check_reference(args: argparse.Namespace) -> None:
    for name, low in (("local_size", 0), ("mem_len", 0), ("tgt_len", 1)):
        if getattr(args, name) < low:
            raise OptionError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(args, name)}")
    if args.lower_case and not args.count_words:
        raise OptionError("--lower-case needs --count-words; leave it out")
    text = args.cutoffs or _CUTOFFS
    try:
        args.cutoffs = [int(number) for number in text.split(",")]
    except ValueError:
        args.cutoffs = [0]
    if args.cutoffs[0] < 1 or sorted(set(args.cutoffs)) != args.cutoffs:
        raise OptionError(f"--cutoffs must be increasing positive numbers with commas between, got {text}")


def import_reference(args: argparse.Namespace) -> str:
    """Write what a state_dict of the reference is here.

    Args:
        args: the options.
    Returns:
        what to tell of it.
    Raises:
        OptionError: it cannot be; nothing is written.
    """
    reference = read_reference(Tensors(read_state_dict(args.state_dict), args.state_dict), args.cutoffs)
    if args.count_words:
        vocabulary = count_words(args.vocabulary, reference.types, args.lower_case)
    else:
        vocabulary = read_words(args.vocabulary, reference.types)
    first_band = reference.bands[0].embedding.shape[0]
    placement = Placement.of(vocabulary, first_band, args.vocabulary)
    converted = convert(reference, placement, args.pre_lnorm, args.local_size or _REFERENCE_LOCAL_SIZE)
    options = ["--arch", "deq_transformer_lm", *converted.options]
    options += ["--mem-len", str(args.mem_len), "--tokens-per-sample", str(args.tgt_len)]
    options += ["--f-thres", str(args.f_thres), "--f-eps", f"{args.f_eps:g}"]
    cfg = configuration(args.out.parent, options)
    symbols = placement.symbols()
    with torch.random.fork_rng(devices=[]):
        weights = with_weights(model_of(cfg, len(symbols)), converted.weights, whole=True)
    write_dictionary(args.out.parent, placement.dictionary())
    write_checkpoint(args.out, cfg, weights, _task_state(symbols))
    bands = " + ".join(str(len(band.bias)) for band in reference.bands)
    lines = [
        f"{args.out}: width {reference.dim}, {len(reference.content_bias)} heads, feed-forward "
        f"{reference.linears['ffn_in'].v.shape[0]}; {reference.types:,} words of the reference ({bands}) are "
        f"{len(symbols):,} types of {args.out.parent / 'dict.txt'}"
    ]
    if converted.multiplied:
        lines.append("projections of its embeddings were multiplied out: more parameters, the same maths")
    if not placement.knows_unknown:
        lines.append("it has no <unk>: words that it does not know get the probability 0")
    return "\n".join([*lines, _how_to_go_on(args.out, options)])


def start_from_transformer_lm(args: argparse.Namespace) -> str:
    """Write a new model with the words of a stock one.

    Args:
        args: the options.
    Returns:
        what to tell of it.
    Raises:
        OptionError: it cannot be; nothing is written.
    """
    path = args.from_transformer_lm[0]
    words = read_words_of(path, args.model_options)
    dictionary = dictionary_of(words, args.data)
    options = [*args.model_options, *words.options]
    cfg = configuration(args.out.parent, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.common.seed)
        weights = with_weights(model_of(cfg, words.types), words.weights, whole=False)
    write_dictionary(args.out.parent, dictionary.read_text(encoding="utf-8"))
    write_checkpoint(args.out, cfg, weights, words.task_state)
    taken = sum(tensor.numel() for tensor in {t.data_ptr(): t for t in words.weights.values()}.values())
    return (
        f"{args.out}: {taken:,} parameters of {words.types:,} types are those of {path}, the rest is drawn\n"
        + _how_to_go_on(args.out, options)
    )


def _task_state(symbols: list[str]) -> dict[str, Any]:
    return {"fairseq_deq.dictionary": words_fingerprint(symbols)}


def _how_to_go_on(out: Path, options: Sequence[str]) -> str:
    return (
        "train on: fairseq-train DATA --user-dir fairseq_deq --task deq_language_modeling --criterion "
        f"deq_lm_loss --finetune-from-model {shlex.quote(str(out))} {shlex.join(options)}"
    )


def run(argv: Sequence[str] | None = None) -> None:
    """Write the checkpoint, and tell of it.

    Args:
        argv: the arguments; those of the process if None.
    Raises:
        OptionError: an option or a file cannot be used.
    """
    args = parse(argv)
    starts = args.from_transformer_lm is not None
    print(start_from_transformer_lm(args) if starts else import_reference(args))


main = command_line(PROGRAM, run)
