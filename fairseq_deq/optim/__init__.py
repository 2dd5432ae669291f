"""What the reference code trains with and fairseq lacks, registered with fairseq."""

from ..registration import register

register()

from . import cosine_from_zero, radam  # noqa: E402, F401
