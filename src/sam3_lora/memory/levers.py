"""All levers of a model in one call."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from sam3_lora.errors import ConfigError
from sam3_lora.memory.box_bias import recompute_box_bias
from sam3_lora.memory.modes import keep_frozen_in_eval
from sam3_lora.memory.neck import recompute_neck
from sam3_lora.memory.precision import hold_frozen_in_bf16
from sam3_lora.memory.segmentation import chunk_segmentation
from sam3_lora.memory.settings import AUTO, MemorySettings

from sam3.model.sam3_image import Sam3Image  # isort: skip  (after the modules that stand in for triton)


def apply_levers(model: Sam3Image, settings: MemorySettings, amp: bool | Literal["auto"] = "auto") -> None:
    """Let a model with its adapters in it hold less in training, in place; parameter names stay the same.

    Outputs in eval mode stay the same, too, up to what :func:`hold_frozen_in_bf16` says. ``mask_loss_chunk`` and
    ``mask_points`` are not of the model: :class:`ChunkedMasks` takes them.

    Args:
        model: The model inside the ``PeftModel``, as the trainer gets it.
        settings: Which levers.
        amp: Whether it will be trained under bfloat16 autocast; ``"auto"`` where there is CUDA.

    Raises:
        ConfigError: If bfloat16 weights are asked for without autocast.
    """
    cuda = torch.cuda.is_available()
    autocast = cuda if amp == AUTO else bool(amp)
    if settings.bf16_base is True and not autocast:
        raise ConfigError(
            "memory.bf16_base: true needs training.amp_enabled: true, because bfloat16 weights cannot be multiplied with fp32 "
            "inputs; take auto, which casts on CUDA with amp only"
        )
    if settings.eval_frozen:
        parts = keep_frozen_in_eval(model)
        logging.info(f"In eval mode, because nothing in them is trained: {', '.join(parts) or 'no part'}")
    if settings.bf16_base is True or (settings.bf16_base == AUTO and cuda and autocast):
        logging.info(f"Frozen weights as bfloat16: {hold_frozen_in_bf16(model) / 1e9:.2f} GB less")
    if settings.segmentation_chunk is not None:
        chunk_segmentation(model, settings.segmentation_chunk)
    if settings.recompute_box_bias:
        recompute_box_bias(model)
    if settings.recompute_neck:
        recompute_neck(model)
