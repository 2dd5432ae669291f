"""Models for those who have neither fairseq nor this package: safetensors, and code for transformers."""
