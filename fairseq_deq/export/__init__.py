"""Exports models to run without fairseq and without this package: safetensors, and code for transformers."""
