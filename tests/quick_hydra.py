"""Less work for hydra, where fairseq's tools run hundreds of times in one process.

Each run of a tool lets hydra compose the options anew. hydra then copies all that is registered, and parses
some 240 settings of which nearly all are those of the run before.
"""

from __future__ import annotations

import copy
import functools
from typing import Any


@functools.cache  # once is enough
def make_hydra_quick() -> None:
    """Let hydra read its store where it is, and parse each setting once."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.override_parser.overrides_parser import OverridesParser

    # hydra copies what it loads from the store, so that the store stays as it is.
    ConfigStore.__deepcopy__ = lambda store, memo: store

    parse_rule = OverridesParser.parse_rule

    @functools.cache
    def parsed(setting: str, rule: str) -> Any:
        return parse_rule(OverridesParser.create(), setting, rule)

    OverridesParser.parse_rule = lambda parser, setting, rule: copy.copy(parsed(setting, rule))
