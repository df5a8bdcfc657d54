"""What a run is estimated to need, and its comparison with what the GPU says after some steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sam3_lora.errors import ConfigError
from sam3_lora.estimation.estimate import Estimate, estimate

STEPS = 5  # the first one has no optimizer state yet


@dataclass(frozen=True)
class BatchSize:
    """What decides the memory of one forward pass; prompts and objects are of an image, rounded up."""

    images: int
    prompts: int
    objects: int

    @classmethod
    def of(cls, batch: Any) -> BatchSize:
        """Read them off a batch of the official collator."""
        images, rows = len(batch.img_batch), len(batch.find_inputs[0].img_ids)
        objects = int(batch.find_targets[0].num_boxes.sum())
        return cls(images, -(-rows // images), -(-objects // images))


def estimated_for(model: Mapping[str, Any], size: BatchSize) -> Estimate | str:
    """Return the estimate for a pass of this size, or why there is none: another base, boxes only, or levers or a preset
    that were not counted.

    Args:
        model: The ``trainer.model`` block of the config.
        size: Of the batch.
    """
    if model.get("base") == "tiny":
        return "base tiny was not counted"
    if model.get("enable_segmentation") is False:
        return "training on boxes only was not counted"
    if changed := [key for key in ("overrides", "quantization", "adapter_path") if model.get(key)]:
        return f"{', '.join(changed)} was not counted"
    try:
        return estimate(
            model["preset"],
            prompts=size.prompts,
            objects=size.objects,
            batch=size.images,
            memory=model.get("memory"),
        )
    except (ConfigError, KeyError) as error:
        return str(error)


class MemoryCheck:
    """Takes the batches of the first :data:`STEPS` steps and the peaks that were measured, and compares once.

    Args:
        model: The ``trainer.model`` block of the config.
    """

    def __init__(self, model: Mapping[str, Any]) -> None:
        self._model = model
        self._estimated = self._measured = self._steps = 0

    def see(self, batch: Any) -> None:
        """Take a batch of the official collator, as one forward pass gets it."""
        if self._steps >= STEPS:
            return
        found = estimated_for(self._model, BatchSize.of(batch))
        if isinstance(found, Estimate):
            self._estimated = max(self._estimated, found.peak_bytes)

    def measured(self, peak_bytes: int) -> None:
        """Take the peak of a step, and log the comparison after the last of them."""
        self._steps += 1
        self._measured = max(self._measured, peak_bytes)
        if self._steps == STEPS and self._estimated:
            logging.info(
                f"Peak memory of {STEPS} steps: {self._measured / 1e9:.2f} GB measured, {self._estimated / 1e9:.2f} GB "
                f"estimated ({self._measured / self._estimated - 1:+.0%})"
            )


def memory_check(model: Mapping[str, Any]) -> MemoryCheck | None:
    """Return the check of a run, or none where there is nothing to compare with."""
    return MemoryCheck(model) if isinstance(estimated_for(model, BatchSize(1, 1, 1)), Estimate) else None
