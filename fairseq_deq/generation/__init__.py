"""Raw text in and out: fairseq's search with prompts that are solved at once, and the Python interface."""

from ..registration import register

register()
