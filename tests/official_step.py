"""A training step on the tiny model with the official losses, as our configs set them up."""

import functools
import json
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sam3.train.utils.train_utils import register_omegaconf_resolvers

from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.shapes import DEMO_CONCEPTS, write_coco


def write_images(folder: Path, with_objects: bool) -> Path:
    """Write a dataset of two images, with objects in them or without any annotation."""
    for split in ("train", "valid"):
        write_coco(folder / split, DEMO_CONCEPTS, 2, seed=1)
        file = folder / split / ANNOTATION_FILE
        content = json.loads(file.read_text())
        if not with_objects:
            file.write_text(json.dumps({**content, "annotations": []}))
    return folder


def register_resolvers() -> None:
    """Let configs compose outside the official script; any number of times."""
    if not OmegaConf.has_resolver("get_method"):
        register_omegaconf_resolvers()


@functools.lru_cache
def loss_and_batch(dataset: Path):
    register_resolvers()
    with initialize_config_module("sam3.train", version_base="1.2"):
        config = compose("sam3_lora/demo", overrides=[f"paths.dataset_root={dataset}"])
    images = instantiate(config.trainer.data.train.dataset)
    batch = instantiate(config.trainer.data.train.collate_fn)([images[0], images[1]])
    loss = instantiate(config.trainer.loss.all, normalization="local")  # "global" asks the other processes
    return loss, (batch[0] if isinstance(batch, list) else batch)["all"]


def backward(model: torch.nn.Module, dataset: Path) -> None:
    """Fill the gradients of a model with those of one step on both images."""
    loss, batch = loss_and_batch(dataset)
    outputs = model(batch)
    loss(outputs, [model.back_convert(target) for target in batch.find_targets])["core_loss"].backward()
