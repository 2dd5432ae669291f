"""What the reference code trains with and fairseq lacks, registered with fairseq."""

from .._requirements import require_fairseq

require_fairseq()

from . import cosine_from_zero, radam  # noqa: E402, F401
