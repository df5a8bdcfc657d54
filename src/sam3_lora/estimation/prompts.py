"""How many prompts and objects the images of a dataset bring into a training step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median_high

from sam3_lora.data.coco import read_split
from sam3_lora.data.prompt_settings import PromptSettings
from sam3_lora.errors import DataError


@dataclass(frozen=True)
class Asked:
    """What training images are asked: ``prompts`` is the most of any. ``typical_objects`` is the median over the images,
    ``most_objects`` the largest."""

    prompts: int
    typical_objects: int
    most_objects: int


def read_asked(data: Path, max_objects: int, settings: PromptSettings) -> Asked:
    """Return what the training images bring. Entries that the check of the dataset will refuse are left out.

    Args:
        data: Dataset folder, or the annotation file of the training images.
        max_objects: ``training.max_objects``: a prompt with more objects in an image is left out of its step.
        settings: The ``prompts`` block.

    Raises:
        DataError: If there is no usable split, or it has no images or categories.
    """
    split = read_split(data.parent, data) if data.is_file() else read_split(data / "train")
    if not split.images or not split.categories:
        raise DataError(
            f"{split.annotation_file} has no {'categories' if split.images else 'images'}; "
            "'sam3-lora train' would list everything that is wrong with the dataset"
        )
    objects = Counter(
        (annotation.get("image_id"), annotation.get("category_id"))
        for annotation in split.annotations
        if isinstance(annotation.get("image_id"), int)
        and isinstance(annotation.get("category_id"), int)
        and not annotation.get("iscrowd")
    )
    of_image: Counter[object] = Counter()
    for (image, _), number in objects.items():
        if number <= max_objects:
            of_image[image] += number
    numbers = [of_image[image["id"]] for image in split.images if isinstance(image.get("id"), int)] or [0]
    present = Counter(image for image, _ in objects)
    prompts = settings.most_prompts(len(split.categories), max(present.values(), default=0))
    return Asked(prompts, median_high(numbers), max(numbers))
