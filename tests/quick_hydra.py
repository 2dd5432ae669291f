"""Less work for hydra, where fairseq's tools run hundreds of times in one process.

Each run lets hydra compose its options anew: those of the model, the task and so on that it chose, and then
some 240 settings of them. Most runs choose what another one has chosen, and nearly all settings are defaults.
"""

from __future__ import annotations

import copy
import functools
from typing import Any


@functools.cache  # once is enough
def make_hydra_quick() -> None:
    """Let hydra keep what it has composed for each choice, and each setting that it has parsed."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.hydra import Hydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import open_dict

    parse_rule, compose_config = OverridesParser.parse_rule, Hydra.compose_config
    composed: dict[Any, Any] = {}

    @functools.cache
    def parsed(setting: str, rule: str) -> Any:
        return parse_rule(OverridesParser.create(), setting, rule)

    def compose_quickly(hydra: Any, config_name: str, overrides: list[str], **options: Any) -> Any:
        choices = [override for override in overrides if "." not in override.partition("=")[0]]
        settings = [override for override in overrides if override not in choices]
        key = (str(hydra.config_loader.get_search_path()), config_name, *choices)
        if key not in composed:
            config = compose_config(hydra, config_name=config_name, overrides=choices, **options)
            with open_dict(config):
                del config["hydra"]  # fairseq does not ask for it
            composed[key] = config
        config = copy.deepcopy(composed[key])
        ConfigLoaderImpl._apply_overrides_to_config(
            OverridesParser.create().parse_overrides(settings), config
        )
        return config

    OverridesParser.parse_rule = lambda parser, setting, rule: copy.copy(parsed(setting, rule))
    Hydra.compose_config = functools.wraps(compose_config)(compose_quickly)
