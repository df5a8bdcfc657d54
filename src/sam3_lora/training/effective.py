"""Whether each name in a composed config has an effect. Hydra takes any, and most would be ignored. Imports no torch."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sam3_lora.errors import did_you_mean
from sam3_lora.renamed import RENAMED_KEYS, seed_block_problems
from sam3_lora.training.composition import shipped_config
from sam3_lora.training.overrides import OWN_BLOCKS

_REFERENCE = re.compile(r"\$\{(?:oc\.select:)?([\w.]+)")


def ineffective_problems(config: DictConfig) -> list[str]:
    """Return a text for each name in a composed config that nothing reads: unknown names of blocks, and unknown keys of
    the blocks that only our own code reads. What any other value refers to as ``${...}`` has an effect.

    Args:
        config: The whole, not resolved. One that is not built on ``common`` has blocks of its own, and no problems.
    """
    blocks: Any = OmegaConf.to_container(config, resolve=False)
    if not set(OWN_BLOCKS) <= set(blocks):
        return []
    # constant is the one schedule without keys of its own, which have an effect only with it
    known: Any = OmegaConf.to_container(shipped_config(choices={"schedule": "constant"}))
    referred = set(_references(blocks))
    problems = []
    for name in blocks:
        if name == "lora":
            problems += seed_block_problems(blocks[name] or {})
        elif not _has_effect(str(name), known, referred):
            problems.append(
                f"{name}: no config of ours has such a block, and nothing refers to it{did_you_mean(str(name), known)}"
            )
    for block in OWN_BLOCKS:
        for key in blocks[block] or {}:
            dotted = f"{block}.{key}"
            if not _has_effect(key, known[block], referred, dotted):
                hint = (
                    f"; {RENAMED_KEYS[dotted]}" if dotted in RENAMED_KEYS else did_you_mean(key, known[block])
                )
                problems.append(f"{dotted}: nothing reads this key{hint}")
    return problems


def ineffective_in_file(composed: str | Path | None) -> list[str]:
    """Return the problems of the config in a file of the official script; none where there is no such file."""
    if composed is None or not Path(composed).is_file():
        return []
    config = OmegaConf.load(composed)
    return ineffective_problems(config) if isinstance(config, DictConfig) else []


def unknown_keywords(keywords: Iterable[str], trainers: Iterable[type]) -> list[str]:
    """Return a text for each key below ``trainer`` that none of these classes takes."""
    known = [
        name
        for trainer in trainers
        for name, parameter in inspect.signature(trainer.__init__).parameters.items()  # type: ignore[misc]
        if parameter.kind is not parameter.VAR_KEYWORD and name != "self"
    ]
    return [
        f"trainer.{name}: the trainer has no such key{did_you_mean(name, known)}"
        for name in keywords
        if name not in known
    ]


def _has_effect(name: str, known: Collection[str], referred: set[str], dotted: str = "") -> bool:
    dotted = dotted or name
    return name in known or any(word == dotted or word.startswith(f"{dotted}.") for word in referred)


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for child in value.values():
            yield from _references(child)
    elif isinstance(value, list):
        for child in value:
            yield from _references(child)
    elif isinstance(value, str):
        yield from _REFERENCE.findall(value)
