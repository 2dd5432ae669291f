"""The models, registered with fairseq under the names of their architectures."""

from .._requirements import require_fairseq

require_fairseq()

from . import deq_transformer_lm  # noqa: E402, F401
