"""What an exported model runs on: these files are copied beside its weights, and need torch and transformers alone.

They import each other relatively and nothing else of this package. `modeling_deq` and `tokenization_deq` need
transformers, the others torch.
"""
