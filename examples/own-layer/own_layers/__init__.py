"""Two layers of one's own: `--user-dir` names this folder, and fairseq imports it."""

from . import gated_convolution, mixer  # noqa: F401  (each registers its model)
