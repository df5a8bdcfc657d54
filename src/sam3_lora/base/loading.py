"""One function for all base models."""

from __future__ import annotations

from pathlib import Path

import torch

from sam3_lora.base import official, tiny
from sam3_lora.base.checkpoint import DEFAULT, find_checkpoint
from sam3_lora.base.cpu import enable_cpu_training
from sam3_lora.base.quantization import quantize_base

from sam3.model.sam3_image import Sam3Image  # isort: skip  (the modules above stand in for triton)


def load_base(
    base: str | Path = DEFAULT,
    *,
    device: str | torch.device | None = None,
    eval_mode: bool = True,
    enable_segmentation: bool = True,
    quantization: str | None = None,
) -> Sam3Image:
    """Return a SAM3 image model of the official class ``Sam3Image``, fp32, without adapters.

    Args:
        base: ``"facebook/sam3"`` (Hub, gated, 3.4 GB), the path of a ``sam3.pt``, ``"tiny"`` (5 M parameters,
            pretrained on shapes, ships with this package), or ``"random"`` (full size, untrained).
        device: Where to put it; ``None`` takes CUDA when there is one, else the CPU.
        eval_mode: ``False`` returns it in training mode. The full-size model has the matcher that training needs
            only then.
        enable_segmentation: Build the segmentation head; without it the model gives boxes only.
        quantization: Hold the Linears of both encoders in 8 or 4 bits: ``int8``, ``bnb-8bit`` or ``bnb-4bit``, see
            :func:`sam3_lora.base.quantization.quantize_base`. They must stay frozen.

    Raises:
        CheckpointError: If the weights cannot be had; says how to get them.
        ConfigError: If the quantization is unknown or its package is missing.
    """
    name = str(base)
    checkpoint = find_checkpoint(name)
    enable_cpu_training()
    if name == "tiny":
        model = tiny.load_tiny_sam3(eval_mode=eval_mode)
        model.segmentation_head = model.segmentation_head if enable_segmentation else None
    elif checkpoint is None:
        model = official.build_random_sam3(eval_mode=eval_mode, enable_segmentation=enable_segmentation)
    else:
        model = official.load_official_sam3(checkpoint, eval_mode, enable_segmentation)
    model.name_or_path = name  # PEFT writes it into adapter_config.json
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model if quantization is None else quantize_base(model, quantization)
