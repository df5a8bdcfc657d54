"""Levers on the memory of a training step: the official model, losses and results, with less held at a time."""

from __future__ import annotations

from sam3_lora.memory.levers import apply_levers
from sam3_lora.memory.mask_loss import ChunkedMasks
from sam3_lora.memory.settings import MemorySettings, memory_settings

__all__ = ["ChunkedMasks", "MemorySettings", "apply_levers", "memory_settings"]
