"""What an exported model runs on: these files are copied beside its weights.

They import each other relatively and nothing else of this package. The model, its configuration and its
tokenizer need transformers, the others torch alone.
"""
