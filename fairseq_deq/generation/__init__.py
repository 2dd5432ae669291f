"""Text in and out: fairseq's search with whole prompts solved at once, and the interface from Python."""

from ..registration import register

register()
