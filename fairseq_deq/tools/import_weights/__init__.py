"""Weights of other programs as checkpoints of fairseq."""
