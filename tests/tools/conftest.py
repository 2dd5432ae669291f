"""What tests of tools share."""

from pieces import pieces

__all__ = ["pieces"]  # a fixture for this folder
