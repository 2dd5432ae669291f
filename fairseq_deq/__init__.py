"""Deep equilibrium language models for fairseq.

Importing the package (or naming it in `--user-dir`) registers its models, tasks, criterions and optimizers
with fairseq, at once where fairseq is in use and otherwise when it is imported. `fairseq_deq.solvers`,
`.implicit` and `.jacobian` need no fairseq, import none of it, and leave one that is there already as it is.
A program that imports fairseq, then these alone, and later wants the models: `registration.register()`.
"""

from .registration import is_named_by_import, register_with_fairseq

__version__ = "0.2.0"

register_with_fairseq(at_once=is_named_by_import(__name__))
