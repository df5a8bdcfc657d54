"""Our configs, put together by Hydra as the official script does it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

#: The groups that ``common`` chooses one file of each from.
GROUPS = ("data", "loss", "optimizer", "schedule", "validation", "logging", "hardware")


def shipped_config(
    changes: Mapping[str, Any] | None = None,
    name: str = "common",
    choices: Mapping[str, str] | None = None,
) -> DictConfig:
    """Return a config of this package, not resolved, for the caller to change.

    Args:
        changes: Dotted key -> value.
        name: Below ``sam3_lora/``.
        choices: Group -> its file, where it is not the one that ``common`` names, as ``{"schedule": "constant"}``.

    Raises:
        hydra.errors.HydraException: If there is no such config, group or choice.
    """
    chosen = tuple(f"sam3_lora/{group}={choice}" for group, choice in (choices or {}).items())
    config = _composed(f"sam3_lora/{name}", chosen).copy()
    for key, value in (changes or {}).items():
        OmegaConf.update(config, key, value)
    return config


def common_defaults() -> list[Any]:
    """Return the defaults list of ``common``, which chooses a file of each group."""
    text = (files("sam3_lora.configs") / "sam3_lora" / "common.yaml").read_text(encoding="utf-8")
    return list(OmegaConf.create(text).defaults)


@lru_cache
def _composed(name: str, overrides: Sequence[str]) -> DictConfig:
    hydra = GlobalHydra.instance()
    # The official script composes its own config with the one global Hydra.
    before, hydra.hydra = hydra.hydra, None
    try:
        with initialize_config_module("sam3_lora.configs", version_base="1.2"):
            return compose(name, overrides=list(overrides))
    finally:
        GlobalHydra.instance().hydra = before
