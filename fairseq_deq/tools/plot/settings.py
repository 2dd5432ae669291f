"""The options of a run that are drawn: budgets, tolerances and the length of the pretraining."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

NAMES = ("f_thres", "b_thres", "f_eps", "b_eps", "pretrain_steps")
_NUMBER = r"([\d.]+(?:e-?\d+)?)"


@dataclass
class Settings:
    """Options by name, as far as they are known.

    Attributes:
        values: of those in `NAMES`.
    """

    values: dict[str, float] = field(default_factory=dict)

    def read_configuration(self, line: str) -> None:
        """Take what fairseq-train logs as its configuration; another line changes nothing.

        Args:
            line: of the log. A resumed run has its configuration again, and the last one holds.
        """
        if "{'_name': None, 'common':" not in line:
            return
        for name in NAMES:
            found = re.search(rf"'{name}': {_NUMBER}[,}}]", line)
            if found:
                self.values[name] = float(found[1])

    def read_command(self, command: str) -> None:
        """Take the command line, which TensorBoard's events hold, and the defaults of its architecture.

        Args:
            command: as fairseq-train was typed; without fairseq what stands there counts alone.
        """
        architecture = re.search(r"--arch[ =](\S+)", command)
        if architecture:
            self.values |= _defaults(architecture[1])
        for name in NAMES:
            found = re.findall(rf"--{name.replace('_', '-')}[ =]{_NUMBER}(?:\s|$)", command)
            if found:
                self.values[name] = float(found[-1])


def _defaults(architecture: str) -> dict[str, float]:
    try:
        from fairseq.models import MODEL_DATACLASS_REGISTRY
    except ImportError:
        return {}
    options = MODEL_DATACLASS_REGISTRY.get(architecture)
    fields = getattr(options, "__dataclass_fields__", {})
    return {name: float(fields[name].default) for name in NAMES if name in fields}
