"""Importing the package installs the patches, for the tests that call fairseq alone."""

import fairseq_deq  # noqa: F401
