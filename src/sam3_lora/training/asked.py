"""What the training images of a run are asked, as its trainer needs to know it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from sam3_lora.training.presence import Base, OnAsked, verify_negatives
from sam3_lora.training.prompted_data import PromptedCoco

_SECONDS_BETWEEN_REPORTS = 10.0


def prompts_and_images(data: Any) -> tuple[list[str], int]:
    """Return the prompts of the classes in the ``data`` block of a trainer, and the number of training images."""
    annotation_file = OmegaConf.select(OmegaConf.create(data), "train.dataset.ann_file")
    if annotation_file is None:  # a dataset of another kind
        return [], 0
    document = json.loads(Path(annotation_file).read_text(encoding="utf-8"))
    names = given_prompts(data)
    categories = [category["name"] for category in document["categories"]]
    return [names.get(category, category) for category in categories], len(document["images"])


def given_prompts(data: Any) -> dict[str, str]:
    """Return the prompts of the classes that are asked by another one than their name."""
    names = OmegaConf.select(OmegaConf.create(data), "train.dataset.coco_json_loader.prompts.names")
    return {} if names is None else {str(name): str(prompt) for name, prompt in names.items()}


def most_prompts(trainer: Any, classes: int) -> int:
    """Return the most prompts that a training image is asked: all classes, unless our loader says otherwise."""
    prompted = _prompted(trainer)
    return prompted[1].most_prompts() if prompted else classes


def verify_training_data(trainer: Any, report: Callable[..., None]) -> None:
    """Let the base say which negatives are not to be seen in which training image, where the config asks for it.

    Args:
        trainer: With its data set up, in each of its processes.
        report: Called with ``"verifying"``, ``done`` and ``images`` now and then.
    """
    prompted = _prompted(trainer)
    if prompted is None or prompted[1].settings.negatives != "verified":
        return
    dataset, loader = prompted
    verify_negatives(
        loader,
        Path(dataset.root),
        Base(trainer.model_conf["base"], trainer.device, trainer.model_conf.get("quantization")),
        rank=trainer.distributed_rank,
        processes=torch.distributed.get_world_size(),
        together=torch.distributed.barrier,
        on_asked=_now_and_then(report),
    )


def _prompted(trainer: Any) -> tuple[Any, PromptedCoco] | None:
    """Return the dataset of training images and its loader, if that is ours."""
    dataset = getattr(getattr(trainer.train_dataset, "dataset", None), "dataset", None)
    loader = getattr(dataset, "coco", None)
    return (dataset, loader) if isinstance(loader, PromptedCoco) else None


def _now_and_then(report: Callable[..., None]) -> OnAsked:
    last = time.monotonic()

    def tell(done: int, images: int) -> None:
        nonlocal last
        if done == images or time.monotonic() - last > _SECONDS_BETWEEN_REPORTS:
            last = time.monotonic()
            logging.info(f"Verified negatives: {done} of {images} images")
            report("verifying", done=done, images=images)

    return tell
