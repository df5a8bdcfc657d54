"""The estimate of a run, and its comparison with what the GPU says after some steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from sam3_lora.errors import ConfigError
from sam3_lora.estimation.estimate import estimate

STEPS = 5  # the first one has no optimizer state yet


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
        images = len(batch.img_batch)
        rows, objects = len(batch.find_inputs[0].img_ids), int(batch.find_targets[0].num_boxes.sum())
        found = estimate(
            self._model["preset"],
            prompts=-(-rows // images),
            objects=-(-objects // images),
            batch=images,
            memory=self._model.get("memory"),
        )
        self._estimated = max(self._estimated, found.peak_bytes)

    def measured(self, peak_bytes: int) -> None:
        """Take the peak of a step, and log the comparison after the last of them."""
        self._steps += 1
        self._measured = max(self._measured, peak_bytes)
        if self._steps == STEPS:
            logging.info(
                f"Peak memory of {STEPS} steps: {self._measured / 1e9:.2f} GB measured, {self._estimated / 1e9:.2f} GB "
                f"estimated ({self._measured / self._estimated - 1:+.0%})"
            )


def memory_check(model: Mapping[str, Any]) -> MemoryCheck | None:
    """Return the check of a run, or none where there is nothing to compare with: another base, boxes only, or levers
    or a preset that were not counted."""
    boxes_only = model.get("enable_segmentation") is False
    if (
        boxes_only
        or model.get("base") == "tiny"
        or any(model.get(key) for key in ("overrides", "quantization", "adapter_path"))
    ):
        return None
    try:
        estimate(model["preset"], memory=model.get("memory"))
    except (ConfigError, KeyError):
        return None
    return MemoryCheck(model)
