"""Plain text, made ready for fairseq-preprocess."""
