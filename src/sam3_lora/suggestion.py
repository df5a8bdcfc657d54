"""Settings to start with, for the size of a dataset and of a GPU. Rules of thumb, but for the memory, which is counted."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam3_lora.data.coco import read_split
from sam3_lora.errors import ConfigError, OutputError
from sam3_lora.estimation.estimate import Estimate, estimate
from sam3_lora.estimation.levers import SAMPLED_POINTS
from sam3_lora.output import write_text_atomic
from sam3_lora.presets import TRAINABLE_PARAMETERS
from sam3_lora.training.settings import TrainSettings, run_yaml

#: From so many training images on a preset has enough to learn from. Rules of thumb: not measured on the full model.
FEWEST_IMAGES: Mapping[str, int] = {"full": 1_000, "balanced": 50, "minimal": 1}
OPTIMIZER_STEPS = (
    2_000  # the seed document's 20 epochs of 1,000 images are 5,000; small sets converge earlier
)
_EPOCHS = (5, 60)
_EFFECTIVE_BATCH = 4  # images an optimizer step, as in the shipped configs
_BATCHES = (4, 2, 1)
_SPARE = 0.9  # of the memory: the allocator's blocks never fit together whole
_MOST_PROMPTS = 1_000


@dataclass(frozen=True)
class Suggestion:
    """Settings for ``sam3-lora train``, and why.

    Attributes:
        preset: What to adapt.
        batch_size: Images in a forward pass.
        gradient_accumulation_steps: Forward passes an optimizer step.
        max_epochs: Passes over the training images.
        max_prompts: Prompts of an image that would fit with these settings; no image should show more classes.
        memory: Keys of the config's ``memory`` block that are not as shipped.
        fits: Whether the step of the worst image fits the GPU, with a tenth of it spare.
        estimate: Of a step with these settings.
        reasons: A sentence for each choice.
    """

    preset: str
    batch_size: int
    gradient_accumulation_steps: int
    max_epochs: int
    max_prompts: int
    memory: Mapping[str, Any]
    fits: bool
    estimate: Estimate
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, as ``sam3-lora suggest --json`` prints it."""
        return {**vars(self), "memory": dict(self.memory), "estimate": self.estimate.as_dict()}

    def settings(self, data: Path, output: Path) -> TrainSettings:
        """Return them for :func:`sam3_lora.train`."""
        config: dict[str, Any] = {"training.gradient_accumulation_steps": self.gradient_accumulation_steps}
        config |= {f"memory.{key}": value for key, value in self.memory.items()}
        return TrainSettings(
            data,
            output,
            preset=self.preset,
            max_epochs=self.max_epochs,
            batch_size=self.batch_size,
            config=config,
        )


def suggest(data: str | Path, gpu_memory: float) -> Suggestion:
    """Return settings to start training the full-size model with.

    Presets are tried from the largest that the number of images bears, and batches from 4 images; the first that fits
    is taken. If none does, mask losses at sampled points are, and at last what needs least, with ``fits`` false.

    Args:
        data: Folder with ``train/_annotations.coco.json``.
        gpu_memory: Of the GPU, in GB (10^9 bytes).

    Raises:
        DataError: If there is no usable dataset.
        ConfigError: If the memory is no positive number.
    """
    images = len(read_split(Path(data) / "train").images)
    tried = list(_candidates(Path(data), images, gpu_memory))
    fitting = [found for found in tried if _fits(found)]
    chosen = fitting[0] if fitting else min(tried, key=lambda found: _needed(found))
    accumulation = max(1, min(_EFFECTIVE_BATCH, images) // chosen.batch)
    epochs = OPTIMIZER_STEPS * chosen.batch * accumulation // max(1, images)
    epochs = min(max(epochs, _EPOCHS[0]), _EPOCHS[1])
    memory = {} if chosen.memory["mask_points"] is None else {"mask_points": SAMPLED_POINTS}
    return Suggestion(
        preset=chosen.preset,
        batch_size=chosen.batch,
        gradient_accumulation_steps=accumulation,
        max_epochs=epochs,
        max_prompts=_max_prompts(chosen, gpu_memory),
        memory=memory,
        fits=bool(fitting),
        estimate=chosen,
        reasons=tuple(_reasons(chosen, images, epochs, accumulation, gpu_memory)),
    )


def write_suggestion(suggestion: Suggestion, data: Path, file: Path) -> None:
    """Write a run file that ``python -m sam3.train.train -c`` takes, with the reasons on top. Its folder is the run's.

    Raises:
        OutputError: If the file exists.
    """
    if file.exists():
        raise OutputError(f"{file} exists; name another --output, or remove it")
    run = file.with_suffix("")
    text = "".join(f"# {reason}\n" for reason in suggestion.reasons)
    settings = suggestion.settings(data, run)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Hydra wants its package in the first line.
    first, _, rest = run_yaml(settings).partition("\n")
    write_text_atomic(file, f"{first}\n{text}{rest}")


def as_command(suggestion: Suggestion, data: Path) -> str:
    """Return the ``sam3-lora train`` that does the same."""
    words = [
        "sam3-lora",
        "train",
        "--data",
        str(data),
        "--preset",
        suggestion.preset,
        "--batch-size",
        str(suggestion.batch_size),
        "--max-epochs",
        str(suggestion.max_epochs),
    ]
    for key, value in suggestion.settings(data, Path("run")).config.items():
        words.append(f"{key}={value}")
    return shlex.join(words)


def _candidates(data: Path, images: int, gpu_memory: float) -> Iterator[Estimate]:
    presets = [preset for preset, fewest in FEWEST_IMAGES.items() if images >= fewest] or ["minimal"]
    for memory in ({}, {"mask_points": SAMPLED_POINTS}):
        for preset in presets:
            for batch in (n for n in _BATCHES if n <= max(1, images)):
                try:
                    yield estimate(preset, data=data, batch=batch, gpu_memory=gpu_memory, memory=memory)
                except ConfigError:
                    if not memory:  # these levers may not have been counted for this preset
                        raise


def _needed(found: Estimate) -> int:
    return (found.worst_image or found).device_bytes


def _fits(found: Estimate) -> bool:
    assert found.gpu_memory_bytes is not None
    return _needed(found) <= _SPARE * found.gpu_memory_bytes


def _max_prompts(found: Estimate, gpu_memory: float) -> int:
    """Return how many prompts fit, 0 if not even one does, by halving."""
    least, most = 0, _MOST_PROMPTS
    objects = (found.worst_image or found).objects
    while least < most:
        middle = (least + most + 1) // 2
        tried = estimate(
            found.preset,
            prompts=middle,
            objects=objects,
            batch=found.batch,
            gpu_memory=gpu_memory,
            memory=found.memory,
        )
        least, most = (middle, most) if _fits(tried) else (least, middle - 1)
    return least


def _reasons(
    found: Estimate, images: int, epochs: int, accumulation: int, gpu_memory: float
) -> Iterator[str]:
    needed = _needed(found) / 1e9
    largest = next(preset for preset, fewest in FEWEST_IMAGES.items() if images >= fewest or fewest == 1)
    size = f"{TRAINABLE_PARAMETERS[found.preset]:,} parameters"
    if found.preset == largest:
        yield f"preset {found.preset}: {size}, what {images} training images can fill (a rule of thumb)"
    else:
        yield f"preset {found.preset}: {size}; {largest} would suit {images} images, but does not fit"
    verdict = "fit" if _fits(found) else "do NOT fit"
    yield f"batch_size {found.batch}: {needed:.1f} GB for the worst image {verdict} into {gpu_memory:g} GB with a tenth spare"
    yield (
        f"gradient_accumulation_steps {accumulation}: {found.batch * accumulation} images an optimizer step, which the "
        "learning rate of the config is made for"
    )
    steps = epochs * images // (found.batch * accumulation)
    yield f"max_epochs {epochs}: {steps:,} optimizer steps (a rule of thumb; best_metric picks the epoch)"
    if found.memory["mask_points"] is not None:
        yield f"memory.mask_points {SAMPLED_POINTS}: the mask loss at sampled points, which is another loss but fits"
    if not _fits(found):
        yield f"nothing fits: {found.advice[0].change if found.advice else 'take a larger GPU'}"
