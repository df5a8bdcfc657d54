"""How long a step takes, and how much of that the device has nothing to do because the images are not there yet."""

from __future__ import annotations

import time
from typing import Any

import torch


class StepTime:
    """A clock for a training loop; on CUDA, which works behind the loop's back, that of the GPU.

    Args:
        device: Of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self.forget()

    def forget(self) -> None:
        """Begin anew: the first step from here on has no time, as it starts the loader."""
        self._asked: Any = None
        self._there: Any = None
        self._told: float | None = None

    def batch_is_asked_for(self) -> None:
        """Note that nothing is left to do but to wait for the next batch."""
        self._asked = self._now()

    def batch_is_there(self) -> None:
        """Note the end of the waiting."""
        self._there = self._now()

    def read(self) -> dict[str, float]:
        """Return ``seconds`` since the last call, and ``waited``, those of them in which a batch was waited for.

        Call it once in a step, after a loss was read from the device.
        """
        now, before = time.perf_counter(), self._told
        self._told = now
        if before is None or self._asked is None:
            return {}
        return {"seconds": now - before, "waited": self._between(self._asked, self._there)}

    def is_over(self) -> tuple[float, float] | None:
        """Return the seconds of waiting and of computing of a step at its end; ``None`` for the first."""
        if self._asked is None:
            return None
        waited = self._between(self._asked, self._there)
        # The loop reads the loss in each pass, so that it and the GPU go in step.
        return waited, self._between(self._there, self._now())

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        if not self._on_cuda:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
