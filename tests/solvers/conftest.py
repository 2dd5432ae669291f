"""The device of tests of recorded solves."""

from recording import device, made  # noqa: F401  (fixtures)
