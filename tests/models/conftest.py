"""The device of tests of recorded solves."""

from recording import device  # noqa: F401  (a fixture)
