"""The formulas behind an estimate: sums of prompts, objects and images, fitted to counted steps. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

#: What bytes and FLOPs are sums of. The last two are steps: the official segmentation head copies features where a batch
#: has more images than one, and chunks of one prompt are joined where there are more than one.
FEATURES = (
    "1",
    "images",
    "prompts",
    "images x prompts",
    "images x objects",
    "images x prompts, with 2 images or more",
    "1, with 2 images x prompts or more",
)


def features(prompts: int, objects: int, batch: int) -> tuple[int, ...]:
    """Return the values of :data:`FEATURES`."""
    rows = batch * prompts
    return (1, batch, prompts, rows, batch * objects, rows if batch > 1 else 0, rows > 1)


@dataclass(frozen=True)
class Formula:
    """What a step costs with one preset and one set of levers, for any batch.

    Attributes:
        flops: A weight for each of :data:`FEATURES`.
        phases: The same of the bytes alive, for each phase that can be the peak of a step.
        weights_bytes: Of the base and the adapter.
        gradient_bytes: Of what is trained.
        trainable_parameters: As counted.
        worst_error: Largest relative difference between the formula and a counted peak.
        counted: ``(prompts, objects, images)`` of every step that was counted.
    """

    flops: tuple[float, ...]
    phases: Mapping[str, tuple[float, ...]]
    weights_bytes: int
    gradient_bytes: int
    trainable_parameters: int
    worst_error: float
    counted: tuple[tuple[int, int, int], ...]

    @property
    def optimizer_bytes(self) -> int:
        """Of AdamW: two moments in fp32 for each trainable parameter."""
        return 8 * self.trainable_parameters

    def step_flops(self, prompts: int, objects: int, batch: int) -> int:
        return round(_sum(self.flops, features(prompts, objects, batch)))

    def peak(self, prompts: int, objects: int, batch: int) -> tuple[str, int]:
        """Return the phase with the most bytes alive, and these bytes."""
        values = features(prompts, objects, batch)
        return max(
            ((phase, round(_sum(weights, values))) for phase, weights in self.phases.items()),
            key=lambda item: item[1],
        )


@lru_cache(maxsize=1)
def counted_formulas() -> Mapping[str, Any]:
    """Return what ``benchmarks/count.py`` wrote: ``levers`` by name of the setting, ``formulas`` by preset and setting,
    and ``made_with``, the versions that were counted."""
    document: dict[str, Any] = json.loads(
        (files("sam3_lora") / "estimation/coefficients.json").read_text("utf-8")
    )
    formulas = {
        preset: {name: _formula(values) for name, values in by_setting.items()}
        for preset, by_setting in document["formulas"].items()
    }
    return {**document, "formulas": formulas}


def _formula(values: Mapping[str, Any]) -> Formula:
    phases = {phase: tuple(weights) for phase, weights in values["phases"].items()}
    counted = tuple((p, o, b) for p, o, b in values["counted"])
    return Formula(**{**values, "flops": tuple(values["flops"]), "phases": phases, "counted": counted})


def _sum(weights: tuple[float, ...], values: tuple[int, ...]) -> float:
    return sum(weight * value for weight, value in zip(weights, values, strict=True))
