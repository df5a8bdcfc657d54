"""What a run wrote about itself while it trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam3_lora.errors import Sam3LoraError
from sam3_lora.training.progress import BEST_METRICS_FILE, PROGRESS_FILE, read_events


class ReportError(Sam3LoraError):
    """A folder that lacks what a report is made of."""


@dataclass(frozen=True)
class Step:
    """One step of the optimizer; epoch and step count from 1, ``steps`` is their number in an epoch."""

    epoch: int
    step: int
    steps: int
    loss: float

    @property
    def epochs_done(self) -> float:
        """The place of the step on an axis of epochs: 1.0 is the end of the first."""
        return self.epoch - 1 + self.step / self.steps


@dataclass(frozen=True)
class History:
    """The course of a run.

    Attributes:
        steps: In order.
        metrics: Epoch -> metric -> value, for each validation.
        best_epoch: The epoch after which ``adapters/best`` was saved.
        best_metric: The metric that decided this.
        start: What the run said of itself when it began, such as ``epochs`` and ``trainable_parameters``.
    """

    steps: Sequence[Step]
    metrics: Mapping[int, Mapping[str, float]]
    best_epoch: int | None = None
    best_metric: str | None = None
    start: Mapping[str, int] | None = None


def read_history(run_folder: str | Path) -> History:
    """Return the course of the run in a folder, finished or not.

    An epoch that was trained again after an interruption counts once, as it was the last time.

    Raises:
        ReportError: If the folder holds no run that has begun.
    """
    logs = Path(run_folder) / "logs"
    start: dict[str, int] | None = None
    steps: dict[tuple[int, int], Step] = {}
    metrics: dict[int, dict[str, float]] = {}
    for event, _ in read_events(logs / PROGRESS_FILE):
        kind = event.pop("event")
        if kind == "start":
            start = event
        elif kind == "step":
            steps[event["epoch"], event["step"]] = Step(**event)
        elif kind == "metrics":
            metrics[event.pop("epoch")] = event
    if start is None:
        raise ReportError(
            f"{logs / PROGRESS_FILE} tells of no run; give the folder that 'train' or 'demo' filled"
        )
    best = _best(logs / BEST_METRICS_FILE)
    return History(
        steps=[steps[place] for place in sorted(steps)],
        # A finished run that is started again is validated once more, under a number that no epoch has.
        metrics={epoch: metrics[epoch] for epoch in sorted({epoch for epoch, _ in steps} & metrics.keys())},
        best_epoch=best.get("epoch"),
        best_metric=best.get("best_metric"),
        start=start,
    )


def _best(path: Path) -> dict[str, Any]:
    best: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return best
