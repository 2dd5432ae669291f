"""The code of an exported model: these files are copied beside its weights.

They import each other, and nothing else of this package. The model, its configuration and its tokenizer need
transformers; the other files need only torch.
"""
