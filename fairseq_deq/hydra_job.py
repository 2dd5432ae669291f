"""How `fairseq-hydra-train` gets to know this package before it begins."""

from __future__ import annotations

from hydra.experimental.callback import Callback

from .registration import register


class Register(Callback):
    """Registers the package when hydra starts, so that the whole run has its models, checks and sentences.

    `common.user_dir` is looked at within the run only, after fairseq has started processes. In a yaml:

        hydra:
          callbacks:
            fairseq_deq:
              _target_: fairseq_deq.hydra_job.Register
    """

    def __init__(self) -> None:
        register()
