"""Deep equilibrium language models for fairseq."""

__version__ = "0.1.0"
