"""What a guard asks: every image for the classes of its dataset, and for phrases that name nothing in it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sam3_lora.data.coco import Split
from sam3_lora.errors import ConfigError


@dataclass(frozen=True)
class Probe:
    """Images and what they are asked for.

    Attributes:
        images: Files.
        prompts: The classes of the dataset, then the phrases; the same for every image.
        present: ``(images, prompts)``, whether an image shows what a prompt names.
        classes: How many of the prompts are classes.
    """

    images: Sequence[Path]
    prompts: Sequence[str]
    present: NDArray[np.bool_]
    classes: int

    @property
    def phrases(self) -> Sequence[str]:
        """The prompts that name nothing in any image."""
        return self.prompts[self.classes :]


def shipped_phrases() -> tuple[str, ...]:
    """Return the phrases of the shipped probe: things that few datasets for one trade show, from many walks of life."""
    text = (files("sam3_lora.evaluation") / "probe_phrases.txt").read_text("utf-8")
    return tuple(text.split("\n")[:-1])


def make_probe(
    split: Split,
    phrases: Sequence[str] | None = None,
    max_images: int | None = None,
    seed: int = 0,
    prompt_of: Mapping[str, str] | None = None,
) -> Probe:
    """Return the probe of a split.

    Args:
        split: Its images, annotations and classes.
        phrases: Name nothing in any of the images; by default :func:`shipped_phrases`. Those that are a class, or a part
            of one's name or the other way round, are left out.
        max_images: Draw so many of the images; ``None`` takes all.
        seed: Of the draw.
        prompt_of: Name of a class -> what to ask for it instead.

    Raises:
        ConfigError: If no phrase is left, or ``max_images`` is below 1.
    """
    if max_images is not None and max_images < 1:
        raise ConfigError(f"max_images must be 1 or more, got {max_images!r}")
    chosen = list(split.images)
    if max_images is not None and max_images < len(chosen):
        chosen = random.Random(seed).sample(chosen, max_images)
    given = prompt_of or {}
    classes = [given.get(name, name) for name in split.prompts]
    asked = shipped_phrases() if phrases is None else tuple(dict.fromkeys(phrases))
    kept = [phrase for phrase in asked if not any(_overlap(phrase, name) for name in classes)]
    if not kept:
        raise ConfigError(
            f"no phrase is left to probe with: each shares a word with a class ({', '.join(classes)}); give phrases that "
            "name nothing in these images"
        )
    place = {name: column for column, name in enumerate(classes)}
    names = {c["id"]: given.get(c["name"], c["name"]) for c in split.categories}
    row = {image["id"]: number for number, image in enumerate(chosen)}
    present = np.zeros((len(chosen), len(classes) + len(kept)), dtype=bool)
    for annotation in split.annotations:
        if annotation["image_id"] in row:
            present[row[annotation["image_id"]], place[names[annotation["category_id"]]]] = True
    images = [split.folder / image["file_name"] for image in chosen]
    return Probe(images, [*classes, *kept], present, len(classes))


def _overlap(phrase: str, name: str) -> bool:
    """Whether two prompts share a word, so that one may name what the other does."""
    return bool({*phrase.lower().split()} & {*name.lower().split()})
