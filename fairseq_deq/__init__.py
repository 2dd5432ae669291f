"""Deep equilibrium language models for fairseq.

With fairseq installed, importing the package (or naming it in `--user-dir`) registers its models, tasks,
criterions and optimizers. Without fairseq, `solvers`, `implicit` and `jacobian` can be used on their own.
"""

from ._requirements import fairseq_is_installed, require_fairseq

__version__ = "0.1.0"

if fairseq_is_installed():
    require_fairseq()
    from .patches import install

    install()
    from . import criterions, models, optim, tasks  # noqa: F401  (each registers itself with fairseq)
