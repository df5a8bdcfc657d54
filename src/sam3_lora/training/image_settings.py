"""What a config may say about the images of a run: augmentation, resizing, resolution. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sam3_lora.base.checkpoint import base_info
from sam3_lora.errors import did_you_mean

#: In the order in which they are applied.
AUGMENTATIONS = ("flip", "color", "scale")
RESIZES = ("squash", "official")

_WHY_ONE_RESOLUTION = """\
the position tables of its image encoder are made for that size, its weights were trained on no other, and neither sam3 \
nor a checkpoint would know of another. For less memory or time: training.batch_size=1 with \
training.gradient_accumulation_steps, the memory.* keys, base.quantization or a smaller preset ('sam3-lora estimate' \
compares them). For small objects in large images: cut the images into tiles"""


def chosen_augmentations(augment: str | Sequence[str]) -> tuple[str, ...]:
    """Return the augmentations that ``training.augment`` stands for: a name, ``none``, ``all``, or a list of names.

    Unknown names are left out; :func:`image_problems` reports them.
    """
    names = [augment] if isinstance(augment, str) else list(augment)
    return tuple(name for name in AUGMENTATIONS if name in names or "all" in names)


def image_problems(config: Mapping[str, Any], base: str) -> list[str]:
    """Return what is wrong with the image keys among dotted config keys; those that are not there are not wrong.

    Args:
        config: Dotted key -> value; keys of other subjects are passed over.
        base: As for :func:`sam3_lora.load_base`.
    """
    problems = []
    if "training.augment" in config:
        problems += _augment_problems(config["training.augment"])
    resize = config.get("training.resize", "squash")
    if resize not in RESIZES:
        problems.append(
            f"training.resize: unknown {resize!r}{did_you_mean(str(resize), RESIZES)} ({' or '.join(RESIZES)})"
        )
    if "base.resolution" in config:
        problems += resolution_problems(config["base.resolution"], base)
    return problems


def resolution_problems(resolution: Any, base: str) -> list[str]:
    """Return a problem, with the reason and what to do instead, if a base cannot take images of this side."""
    needed = base_info(base).resolution
    if resolution == needed:
        return []
    return [
        f"base.resolution: {base!r} takes {needed} and nothing else, got {resolution!r}: {_WHY_ONE_RESOLUTION}"
    ]


def _augment_problems(augment: Any) -> list[str]:
    alone, together = ("none", "all"), ", ".join(AUGMENTATIONS)
    if isinstance(augment, str):
        known = (*alone, *AUGMENTATIONS)
        if augment in known:
            return []
        return [
            f"training.augment: unknown {augment!r}{did_you_mean(augment, known)} ({', '.join(known)}, or a list)"
        ]
    if not isinstance(augment, Sequence) or not augment:
        return [
            f"training.augment: needs a name or a list of {together}, got {augment!r}; 'none' switches it off"
        ]
    return [
        f"training.augment: unknown {name!r} in the list{did_you_mean(str(name), AUGMENTATIONS)} ({together})"
        for name in augment
        if name not in AUGMENTATIONS
    ]
