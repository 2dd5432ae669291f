"""What fails without `np.compat`, which numpy 2 no longer has."""

import numpy as np
import torch
from fairseq.data import TokenBlockDataset


def test_sentences_as_blocks():
    sentences = [torch.tensor([4, 5, 2]), torch.tensor([6, 2])]
    blocks = TokenBlockDataset(sentences, [3, 2], block_size=None, pad=1, eos=2, break_mode="eos")
    assert [block.tolist() for block in (blocks[0], blocks[1])] == [[4, 5, 2], [6, 2]]


def test_interactive_continues_a_prompt(in_process, data_bin, tiny_checkpoint, evaluation):
    options = ("--path", tiny_checkpoint, *evaluation, "--beam", "1")
    output = in_process("fairseq-interactive", data_bin, *options, stdin="We hold these\n")
    hypotheses = [line for line in output.text.splitlines() if line.startswith("H-0\t")]
    assert len(hypotheses) == 1
    assert hypotheses[0].split("\t")[2].startswith("We hold these")


def test_numpy_itself_stays_as_it_is():
    assert hasattr(np, "compat") == (int(np.__version__.split(".")[0]) < 2)
