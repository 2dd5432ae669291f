"""Mistakes x tools: each ends in one sentence that names what is wrong, with a status that is not 0.

Nothing is lost by a mistake: the checkpoints and the data that were there are there afterwards, as they were.
"""

import hashlib

import pytest
from selection import covering, slow_unless

TRAIN, EVAL_LM, VALIDATE = "fairseq-train", "fairseq-eval-lm", "fairseq-validate"
GENERATE, INTERACTIVE = "fairseq-generate", "fairseq-interactive"
READERS = (EVAL_LM, VALIDATE, GENERATE, INTERACTIVE)
EVERY = (TRAIN, *READERS)

# the mistake, the tools that it is made with, and what the sentence says
MISTAKES = [
    ("DATA", EVERY, "the data folder none does not exist in "),
    ("--path none.pt", READERS, "there is no checkpoint none.pt"),
    ("--path .", READERS, "--path .: is a directory"),
    ("--model-overrides {f_thres:60}", READERS, "--model-overrides must be a dictionary such as"),
    ("--model-overrides {1:2}", READERS, "--model-overrides must be a dictionary such as"),
    ("--model-overrides {'f_tresh':6}", READERS, "did you mean 'f_thres'?"),
    ("--model-overrides {'f_thres':'many'}", READERS, "--f-thres"),
    ("--model-overrides {'f_eps':3}", READERS, "--f-eps must be in (0, 1), got 3.0"),
    ("--gen-subset none", (EVAL_LM, GENERATE), "has no text 'none'; it has: test, train, valid"),
    ("--valid-subset none", (VALIDATE,), "has no text 'none'; it has: test, train, valid"),
    ("--train-subset none", (TRAIN,), "has no text 'none'; it has: test, train, valid"),
    ("--fp16", EVERY, "--fp16 needs a GPU"),
    ("--batch-size -1", EVERY, "--batch-size must be at least 1, got -1"),
    ("--max-tokens 0", EVERY, "--max-tokens must be at least 1, got 0"),
    ("--num-workers -1", EVERY, "--num-workers must be in [0, 1024], got -1"),
    ("--seed -1", EVERY, "--seed must be in [0, 4294967295], got -1"),
    ("--distributed-world-size 0", EVERY, "--distributed-world-size must be at least 1, got 0"),
    ("--num-shards 2 --shard-id 2", EVERY, "--shard-id 2 must be below --num-shards 2"),
    ("--tokens-per-sample 0", (TRAIN, EVAL_LM, GENERATE), "--tokens-per-sample must be at least 1, got 0"),
    (
        "--output-dictionary-size 100",
        (TRAIN, EVAL_LM, GENERATE),
        "--output-dictionary-size 100 does not work",
    ),
    ("--self-target", (TRAIN, EVAL_LM, GENERATE), "--self-target does not work with these models"),
    ("--max-target-positions 16", (TRAIN, EVAL_LM), "give --tokens-per-sample 16 or less"),
    ("--max-tokens 8", (TRAIN, EVAL_LM), "--max-tokens 8 is less than --tokens-per-sample 32"),
    ("--log-interval 0", (TRAIN,), "--log-interval must be at least 1, got 0"),
    ("--update-freq 0", (TRAIN,), "--update-freq must be at least 1, got 0"),
    ("--update-freq a", (TRAIN,), "argument --update-freq: invalid"),
    ("--lr -1", (TRAIN,), "--lr must be at least 0, got -1.0"),
    ("--clip-norm -1", (TRAIN,), "--clip-norm must be at least 0, got -1.0"),
    ("--max-update -1", (TRAIN,), "--max-update must be at least 0, got -1"),
    ("--save-interval 0", (TRAIN,), "--save-interval must be at least 1, got 0"),
    ("--validate-interval 0", (TRAIN,), "--validate-interval must be at least 1, got 0"),
    ("--adam-betas (0.9,)", (TRAIN,), "--adam-betas must be two numbers in [0, 1)"),
    ("--adam-betas open('x')", (TRAIN,), "--adam-betas must be two numbers in [0, 1)"),
    ("--optimizer-overrides {a:1}", (TRAIN,), "--optimizer-overrides must be a dictionary"),
    ("--lr-scheduler inverse_sqrt --warmup-updates 0", (TRAIN,), "--warmup-updates must be at least 1"),
    ("--criterion adaptive_loss", (TRAIN,), "--ddp-backend=legacy_ddp"),
    ("--ddp-backend slowmo", (TRAIN,), "--ddp-backend must be pytorch_ddp or legacy_ddp"),
    ("--restore-file none.pt", (TRAIN,), "--restore-file: there is no checkpoint none.pt"),
    ("--tensorboard-logdir /proc/none", (TRAIN,), "--tensorboard-logdir /proc/none: no such file"),
    ("--save-dir /proc/none", (TRAIN,), "--save-dir /proc/none cannot be written to"),
    ("--best-checkpoint-metric bleu", (TRAIN,), "it may be one of loss, nll_loss, ppl, f_nfe"),
    ("--write-checkpoints-asynchronously", (TRAIN,), "needs the package iopath"),
    ("--f-memory 1000000000", (TRAIN,), "--f-memory must be in [0, 1000], got 1000000000"),
    ("--init-std -1", (TRAIN,), "--init-std must be above 0, got -1.0"),
    ("--mem-len 8", (TRAIN,), "--mem-len 8 needs --task deq_language_modeling"),
    ("--jac-loss-weight 5 --criterion cross_entropy", (TRAIN,), "needs --criterion deq_lm_loss"),
    ("--spectral-radius 5 --criterion cross_entropy", (TRAIN,), "needs --criterion deq_lm_loss"),
    ("--jac-loss-freq 0.5", (TRAIN,), "--jac-loss-freq needs --jac-loss-weight"),
    ("--phantom-steps 3", (TRAIN,), "--phantom-steps 3 needs --gradient phantom"),
    ("--init-range 0.2", (TRAIN,), "--init-range 0.2 needs --init uniform"),
    ("--context-window 32", (EVAL_LM,), "--context-window 32 must be below --tokens-per-sample 32"),
    ("--softmax-batch 0", (EVAL_LM,), "--softmax-batch must be at least 1, got 0"),
    ("--distributed-world-size 2", (EVAL_LM,), "--distributed-world-size must be 1 for fairseq-eval-lm"),
    ("--path a.pt:b.pt", (VALIDATE,), "fairseq-validate takes one checkpoint"),
    ("--path a.pt:b.pt", (EVAL_LM, GENERATE, INTERACTIVE), "there is no checkpoint a.pt"),
    ("--sample-break-mode none", (GENERATE,), "give --sample-break-mode eos"),
    ("--lm-path none.pt", (GENERATE,), "--lm-path: there is no checkpoint none.pt"),
    ("--lm-path none.pt", (INTERACTIVE,), "--lm-path is not used by fairseq-interactive"),
    ("--beam 0", (GENERATE, INTERACTIVE), "--beam must be at least 1, got 0"),
    ("--nbest 3", (GENERATE, INTERACTIVE), "--nbest 3 must be at most --beam 1"),
    ("--temperature 0", (GENERATE, INTERACTIVE), "--temperature must be above 0, got 0.0"),
    ("--max-len-b -1", (GENERATE, INTERACTIVE), "--max-len-b must be at least 0, got -1"),
    ("--sampling --beam 2", (GENERATE, INTERACTIVE), "--sampling needs --nbest equal to --beam, got 1 and 2"),
    ("--sampling-topk 3", (GENERATE, INTERACTIVE), "need --sampling"),
    ("--constraints", (GENERATE, INTERACTIVE), "--constraints has no effect on language models"),
    ("--print-alignment", (GENERATE, INTERACTIVE), "--print-alignment has no effect on language models"),
    ("--score-reference", (GENERATE, INTERACTIVE), "--score-reference has no effect on language models"),
    ("--retain-dropout", (GENERATE, INTERACTIVE), "--retain-dropout does not work with these models"),
    ("--bpe sentencepiece", (GENERATE, INTERACTIVE), "--sentencepiece-model: Missing mandatory value"),
    ("--buffer-size 2 --batch-size 3", (INTERACTIVE,), "--batch-size 3 must be at most --buffer-size 2"),
    ("--input none.txt", (INTERACTIVE,), "--input: there is no text none.txt"),
]
PAIRS = [(row, tool) for row, (_, tools, _) in enumerate(MISTAKES) for tool in tools]
DEFAULT = covering(PAIRS)
CASES = [
    pytest.param(
        *(tool, mistake, sentence),
        id=f"{tool}:{mistake}",
        marks=slow_unless((row, tool) in DEFAULT),
    )
    for row, (mistake, tools, sentence) in enumerate(MISTAKES)
    for tool in tools
]


@pytest.fixture(scope="module")
def commands(data_bin, deq_training, deq_checkpoint, evaluation, tmp_path_factory):
    """A command for each tool that works, as the tool's name -> arguments; the data folder is the first."""
    reading = (str(data_bin), "--path", str(deq_checkpoint), *evaluation)
    save_dir = tmp_path_factory.mktemp("mistakes")
    (save_dir / "checkpoint_last.pt").write_bytes(deq_checkpoint.read_bytes())
    generating = (*reading, "--beam", "1")
    return {
        TRAIN: (*deq_training, "--save-dir", str(save_dir), "--max-update", "5"),
        EVAL_LM: reading,
        VALIDATE: (*reading, "--batch-size", "8"),
        GENERATE: (*generating, "--sample-break-mode", "eos"),
        INTERACTIVE: generating,
    }


def contents(*folders):
    """Every file in the folders, with a hash of what it holds."""
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(("tool", "mistake", "sentence"), CASES)
def test_a_mistake_ends_in_one_sentence(
    refused, commands, data_bin, deq_checkpoint, monkeypatch, tmp_path, tool, mistake, sentence
):
    monkeypatch.chdir(tmp_path)
    command = commands[tool]
    folders = (data_bin, deq_checkpoint.parent, tmp_path)
    before = contents(*folders)
    options = ("none", *command[1:]) if mistake == "DATA" else (*command, *mistake.split())
    ending = refused(tool, *options)  # one line, and a status that is not 0
    assert sentence in ending.text
    assert contents(*folders) == before


def test_fusion_with_a_model_of_other_words_is_refused(
    in_process, refused, commands, data_bin, deq_training, text, tmp_path
):
    # as many words, in another order
    words = (data_bin / "dict.txt").read_text().splitlines()
    (tmp_path / "dict.txt").write_text("\n".join(reversed(words)) + "\n")
    prefixes = ("--trainpref", text / "train.txt", "--validpref", text / "valid.txt")
    dictionary = ("--srcdict", tmp_path / "dict.txt", "--destdir", tmp_path / "bin")
    in_process("fairseq-preprocess", "--only-source", *prefixes, *dictionary, plugin=False)
    training = (tmp_path / "bin", *deq_training[1:], "--save-dir", tmp_path / "other")
    in_process("fairseq-train", *training, "--max-update", "1", "--disable-validation")
    fusion = ("--lm-path", tmp_path / "other" / "checkpoint_last.pt", "--lm-weight", "0.5")
    assert "has other words or another order" in refused(GENERATE, *commands[GENERATE], *fusion).text


def test_the_commands_work_without_a_mistake(in_process, commands):
    for tool in (EVAL_LM, VALIDATE):
        in_process(tool, *commands[tool]).checked()
