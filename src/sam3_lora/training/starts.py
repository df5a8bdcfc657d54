"""Batches of a dataset with their losses, for adapters that start from data (EVA, LoRA-GA)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from sam3_lora.base.cpu import enable_cpu_training
from sam3_lora.data.coco import Split, read_split
from sam3_lora.errors import DataError
from sam3_lora.evaluation.batches import batch_of, open_split
from sam3_lora.inference import resolution_of
from sam3_lora.training.losses import noise_free_loss

_IMAGES = 16  # LoRA-GA's paper takes 64 short texts, EVA's a few batches; each image has thousands of places


def dataset_losses(data: str | Path, images: int = _IMAGES) -> list[Callable[[Any], Tensor]]:
    """Return functions that each run a model on an image of a dataset and return the loss of our training configs.

    They are the ``init_data`` of :func:`sam3_lora.get_peft_sam3`. Each asks every category of the dataset, up to 32, and
    runs as in training, but without dropout and DropPath. Images are read when they are needed, and again in each pass.

    Args:
        data: Folder with ``train/_annotations.coco.json``.
        images: How many images of ``train/``, evenly over it; all of them if there are fewer.

    Raises:
        DataError: If the annotations are missing or cannot be read.
    """
    if isinstance(images, bool) or not isinstance(images, int) or images < 1:
        raise DataError(f"images must be 1 or more, got {images!r}")
    split = read_split(Path(data) / "train")
    if not split.images:
        raise DataError(f"{split.annotation_file} has no images to start from")
    total = len(split.images)
    open_once = functools.lru_cache(maxsize=1)(functools.partial(_open, split))
    numbers = range(0, total, max(1, total // images))[:images]
    return [functools.partial(_loss, open_once, number) for number in numbers]


def _loss(open_once: Callable[[int], Any], number: int, model: Any) -> Tensor:
    enable_cpu_training()
    dataset = open_once(resolution_of(model))
    return noise_free_loss(model, batch_of([dataset[number]], model.device))


def _open(split: Split, resolution: int) -> Any:
    return open_split(split.folder, split.annotation_file, resolution, masks=True)
