"""The loss, registered with fairseq."""

from ..registration import register

register()

from . import deq_lm_loss  # noqa: E402, F401
