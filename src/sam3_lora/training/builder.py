"""The Hydra target of ``trainer.model``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sam3_lora.adapter import get_peft_sam3, load_adapter
from sam3_lora.base.checkpoint import DEFAULT
from sam3_lora.base.loading import load_base

from sam3.model.sam3_image import Sam3Image  # isort: skip  (the modules above stand in for triton)


def build_sam3_lora_model(
    base: str = DEFAULT,
    preset: str = "balanced",
    overrides: Mapping[str, Any] | None = None,
    adapter_path: str | None = None,
    enable_segmentation: bool = True,
    eval_mode: bool = False,
) -> Sam3Image:
    """Return a base with LoRA injected, on the CPU, for the official trainer, which moves it.

    The result is the inner model of the ``PeftModel``: of the official class, with the official parameter names, so
    that the patterns of official optimizer settings match.

    Args:
        base: As for :func:`sam3_lora.load_base`.
        preset: As for :func:`sam3_lora.get_peft_sam3`.
        overrides: Keywords of :func:`sam3_lora.get_peft_sam3` that replace parts of the preset.
        adapter_path: Folder of a saved adapter to start from; ``preset`` and ``overrides`` are then not used.
        enable_segmentation: Build the segmentation head.
        eval_mode: Return the model in eval mode.
    """
    model = load_base(base, device="cpu", eval_mode=eval_mode, enable_segmentation=enable_segmentation)
    if adapter_path is not None:
        return load_adapter(model, adapter_path, is_trainable=not eval_mode).get_base_model()
    return get_peft_sam3(model, preset=preset, **(overrides or {})).get_base_model()
