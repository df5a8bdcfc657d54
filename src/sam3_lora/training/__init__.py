"""Training through the official trainer. The names here are what the configs and users' own YAML files refer to."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sam3_lora.training.accumulation import AccumulatedLoss as AccumulatedLoss
    from sam3_lora.training.augmentation import TrainImages as TrainImages
    from sam3_lora.training.builder import build_sam3_lora_model as build_sam3_lora_model
    from sam3_lora.training.data import collate_fn as collate_fn
    from sam3_lora.training.data import render_demo_dataset as render_demo_dataset
    from sam3_lora.training.indexed_data import IndexedCoco as IndexedCoco
    from sam3_lora.training.optimizer import lora_plus as lora_plus
    from sam3_lora.training.prompted_data import PromptedCoco as PromptedCoco
    from sam3_lora.training.trainer import LoraTrainer as LoraTrainer

# The launcher lives in this package too and must find errors in a dataset before torch is imported.
_MODULES = {
    "AccumulatedLoss": "accumulation",
    "IndexedCoco": "indexed_data",
    "LoraTrainer": "trainer",
    "PromptedCoco": "prompted_data",
    "TrainImages": "augmentation",
    "build_sam3_lora_model": "builder",
    "collate_fn": "data",
    "lora_plus": "optimizer",
    "render_demo_dataset": "data",
}

__all__ = [
    "AccumulatedLoss",
    "IndexedCoco",
    "LoraTrainer",
    "PromptedCoco",
    "TrainImages",
    "build_sam3_lora_model",
    "collate_fn",
    "lora_plus",
    "render_demo_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'sam3_lora.training' has no attribute {name!r}")
    return getattr(import_module(f"sam3_lora.training.{_MODULES[name]}"), name)
