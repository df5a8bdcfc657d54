"""How much of the time of a step goes into waiting for its images, and what to do if it is most of it. Imports no torch."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

#: Steps that are looked at together; the first of an epoch, when the loader starts, is not among them.
STEPS = 10
_LEAST_COMPUTING = 0.5


@dataclass(frozen=True)
class Loading:
    """What loads the images: a process, or several, of this run; the sizes are the sides of the images in pixels."""

    workers: int
    processes: int
    images_a_step: int
    image_hw: tuple[int, int] | None
    resolution: int | None


class LoadingTime:
    """Takes the time of each step, and once in a run has something to say about it."""

    def __init__(self, steps: int = STEPS) -> None:
        self._times: deque[tuple[float, float]] = deque(maxlen=steps)
        self._steps = steps
        self._said = False

    def step(self, waited: float, computed: float) -> tuple[float, float] | None:
        """Take the seconds of a step; return the means of the last steps, the first time that most of it was waiting."""
        self._times.append((waited, computed))
        if self._said or len(self._times) < self._steps:
            return None
        waiting, computing = (sum(times) / self._steps for times in zip(*self._times, strict=True))
        if computing >= _LEAST_COMPUTING * (waiting + computing):
            return None
        self._said = True
        return waiting, computing


def slow_loading(waited: float, computed: float, loading: Loading, cores: int | None = None) -> str:
    """Return the warning: the numbers at hand, and what to change.

    Args:
        waited: Seconds of a step in which it waited for images.
        computed: The others.
        loading: How they are loaded.
        cores: Of this machine; by default those that this process may use.
    """
    cores = cores or len(os.sched_getaffinity(0))
    total = waited + computed
    images = "image" if loading.images_a_step == 1 else f"{loading.images_a_step} images"
    loaders = f"{loading.workers} processes load" if loading.workers else "the trainer itself loads"
    trainers = "1 process that trains" if loading.processes == 1 else f"{loading.processes} that train"
    lines = [
        f"slow loader: a step takes {total:.2f} s, of which it computes {computed:.2f} s ({computed / total:.0%}) and waits "
        f"{waited:.2f} s for its {images}",
        f"  {loaders} the images (training.num_train_workers={loading.workers}); this machine has {cores} cores for {trainers}",
    ]
    return "\n".join(lines + [f"  -> {change}" for change in _changes(total, computed, loading, cores)])


def _changes(total: float, computed: float, loading: Loading, cores: int) -> Sequence[str]:
    spare = max(0, cores // loading.processes - 1)
    needed = ceil(max(1, loading.workers) * total / max(computed, 1e-9))
    changes = []
    if spare > loading.workers:
        changes.append(f"training.num_train_workers={min(needed, spare)}")
    if loading.image_hw and loading.resolution and max(loading.image_hw) > 1.5 * loading.resolution:
        height, width = loading.image_hw
        changes.append(
            f"smaller files: the images are {width} x {height}, and the model sees {loading.resolution} x {loading.resolution}"
        )
    if not changes or needed > spare:
        changes.append("files on a local disk, as JPEG, or a machine with more cores")
    return changes
