"""What a run wrote about itself while it trained."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sam3_lora.errors import Sam3LoraError
from sam3_lora.training.progress import BEST_METRICS_FILE, PROGRESS_FILE, read_events

#: More points than a chart has pixels only make it larger.
MOST_POINTS = 400


class ReportError(Sam3LoraError):
    """A folder that lacks what a report is made of."""


@dataclass(frozen=True)
class Step:
    """One step of the optimizer; epoch and step count from 1, ``steps`` is their number in an epoch.

    Attributes:
        terms: The parts of the loss before their weights, of the last layer of the decoder.
        rates: Learning rate of each trained group of parameters, in the order that the run names them at its start.
        seconds: From the step before to this one; ``waited`` of them for the batch.
    """

    epoch: int
    step: int
    steps: int
    loss: float
    terms: Mapping[str, float] = field(default_factory=dict)
    rates: Sequence[float] = ()
    memory_bytes: int | None = None
    peak_bytes: int | None = None
    seconds: float | None = None
    waited: float | None = None

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
            known = {name: value for name, value in event.items() if name in Step.__dataclass_fields__}
            steps[event["epoch"], event["step"]] = Step(**known)
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


def mean_losses(steps: Sequence[Step]) -> dict[int, float]:
    """Return epoch -> the mean loss of its steps; losses that are no number are left out."""
    by_epoch: dict[int, list[float]] = defaultdict(list)
    for step in steps:
        if math.isfinite(step.loss):
            by_epoch[step.epoch].append(step.loss)
    return {epoch: sum(losses) / len(losses) for epoch, losses in by_epoch.items()}


def thinned(steps: Sequence[Step], most: int = MOST_POINTS) -> list[Step]:
    """Return the steps, or where there are more than ``most`` the means of equal blocks of them."""
    size = math.ceil(len(steps) / most)
    if size <= 1:
        return list(steps)
    blocks = [steps[start : start + size] for start in range(0, len(steps), size)]
    return [replace(block[-1], loss=sum(s.loss for s in block) / len(block)) for block in blocks]


def _best(path: Path) -> dict[str, Any]:
    best: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return best
