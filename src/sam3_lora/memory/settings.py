"""The ``memory`` block of a config: what a training run does to hold less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from sam3_lora.components import unknown_names
from sam3_lora.errors import ConfigError, as_report

AUTO = "auto"
_SWITCHES = {"eval_frozen": "", "bf16_base": " or auto", "recompute_box_bias": "", "recompute_neck": ""}


@dataclass(frozen=True)
class MemorySettings:
    """Levers on the memory of a training step; with the defaults here the step is the official one.

    Attributes:
        eval_frozen: Parts without anything trainable run in eval mode: no DropPath or dropout in them.
        bf16_base: Hold the frozen weights of matrix products and convolutions as bfloat16. ``"auto"`` on CUDA with autocast;
            True on the CPU too, where autocast must be on.
        segmentation_chunk: Prompts that go through the segmentation head at once, each time under one activation
            checkpoint; ``None``: all of them, under the official two.
        recompute_box_bias: Make the decoder's box position bias inside the checkpoint of each layer.
        recompute_neck: Make what the neck computes again in the backward, and its position tables in each step.
        mask_loss_chunk: Matched masks whose loss is computed at once, under an activation checkpoint; ``None``: all.
        mask_points: Points of each mask at which its loss is taken; ``None``: every pixel.

    Raises:
        ConfigError: For values out of range, all at once.
    """

    eval_frozen: bool = False
    bf16_base: bool | Literal["auto"] = False
    segmentation_chunk: int | None = None
    recompute_box_bias: bool = False
    recompute_neck: bool = False
    mask_loss_chunk: int | None = None
    mask_points: int | None = None

    def __post_init__(self) -> None:
        problems = [
            f"memory.{name} must be true or false{more}, got {value!r}"
            for name, more in _SWITCHES.items()
            if not isinstance(value := getattr(self, name), bool) and not (more and value == AUTO)
        ]
        problems += [
            f"memory.{name} must be a whole number of 1 or more, or null, got {value!r}"
            for name in ("segmentation_chunk", "mask_loss_chunk", "mask_points")
            if (value := getattr(self, name)) is not None
            and (isinstance(value, bool) or not isinstance(value, int) or value < 1)
        ]
        if problems:
            raise ConfigError(as_report(problems))


def memory_settings(values: Mapping[str, Any] | None) -> MemorySettings:
    """Return the settings of a ``memory`` block; ``None`` is the official step.

    Raises:
        ConfigError: For unknown keys, with the close match, and values out of range.
    """
    values = dict(values or {})
    if problems := unknown_names("key", values, [field.name for field in fields(MemorySettings)]):
        raise ConfigError(as_report([f"memory: {problem}" for problem in problems]))
    return MemorySettings(**values)
