"""The loss, registered with fairseq."""

from .._requirements import require_fairseq

require_fairseq()

from . import deq_lm_loss  # noqa: E402, F401
