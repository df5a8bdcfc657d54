"""The progress file of a run: the trainer writes events, whoever waits for the run reads them. Imports no torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRESS_FILE = "progress.jsonl"  # in logs/
BEST_METRICS_FILE = "best_metrics.json"  # in logs/


@dataclass(frozen=True)
class Progress:
    """Where a run stands. Epochs and steps count from 1; ``metrics`` are those of the last validation, ``settings`` what is
    in force in the whole run, a line for each thing.

    Attributes:
        terms: The parts of the loss before their weights, of the last layer of the decoder.
        rates: Learning rate of each trained group of parameters, in the order that the run names them at its start.
        memory_of: ``"GPU memory"``, what torch has in use after the step, or ``"process memory"``, what the trainer holds
            in RAM; not of the processes that load images.
        memory_bytes: In use now; ``peak_bytes`` the most since the start.
        warnings: What the run has warned of so far.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float | None
    metrics: Mapping[str, float]
    settings: Mapping[str, str] = field(default_factory=dict)
    terms: Mapping[str, float] = field(default_factory=dict)
    rates: Sequence[float] = ()
    memory_of: str = ""
    memory_bytes: int | None = None
    peak_bytes: int | None = None
    warnings: Sequence[str] = ()


OnProgress = Callable[[Progress], None]


def append_event(logs: Path, kind: str, **values: Any) -> None:
    """Add one line to the progress file in ``logs``."""
    with open(logs / PROGRESS_FILE, "a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")  # a kill cut the last line short
        file.write(json.dumps({"event": kind, **values}).encode() + b"\n")


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the events of a progress file from a byte on, each with the byte where the next one begins.

    A last line that is still being written is left for the next call; one that a kill cut short is passed over.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(offset)
        while (line := file.readline()).endswith(b"\n"):
            with suppress(json.JSONDecodeError):
                yield json.loads(line), file.tell()


class ProgressReader:
    """Turns the lines that a run adds to its progress file into calls of ``on_progress``.

    Lines that are there already, of a part of the run that was stopped, are passed over, unless ``from_start``.

    Attributes:
        start: What the run said of itself: ``epochs``, ``trainable_parameters``, ``total_parameters``.
        error: Text of the library's own error that ended the run, or ``""``.
        last_step: ``epoch``, ``step``, ``steps`` and ``loss`` of the last step since the start; empty before it.
        stopped: ``signal``, ``epoch``, ``step`` and ``saved`` of a stop that was asked for; ``None`` if there was none.
            ``step`` is ``None`` if it was in a validation.
        stopped_early: The epoch after which the run ended because its metric had not risen for long; else ``None``.
    """

    def __init__(self, logs: Path, on_progress: OnProgress | None, from_start: bool = False) -> None:
        self.start: dict[str, Any] = {}
        self.error = ""
        self.last_step: dict[str, Any] = {}
        self.stopped: dict[str, Any] | None = None
        self.stopped_early: int | None = None
        self._path = logs / PROGRESS_FILE
        self._on_progress = on_progress
        self._metrics: dict[str, float] = {}
        self._warnings: tuple[str, ...] = ()
        self._offset = self._path.stat().st_size if self._path.exists() and not from_start else 0

    def read(self) -> None:
        """Report what has come since the last call."""
        for event, end in read_events(self._path, self._offset):
            self._offset = end
            kind = event.pop("event")
            if kind == "start":
                self.start = event
            elif kind == "error":
                self.error = event["message"]
            elif kind == "stopped":
                self.stopped = event
            elif kind == "stopped_early":
                self.stopped_early = event["epoch"]
            elif kind == "warning":
                self._warnings += (event["message"],)
            elif kind == "step":
                self.last_step = event
                self._show()
            elif kind == "verifying":
                print(
                    f"{event['done']}/{event['images']} images: asking the base what is not there",
                    file=sys.stderr,
                    flush=True,
                )
            elif kind == "metrics":
                self._metrics = {name: value for name, value in event.items() if name != "epoch"}
                self._show()

    def _show(self) -> None:
        if self._on_progress is not None and self.last_step:
            known = {k: v for k, v in self.last_step.items() if k in Progress.__dataclass_fields__}
            of_run = {"epochs": self.start["epochs"], "settings": self.start.get("settings", {})}
            self._on_progress(Progress(metrics=self._metrics, warnings=self._warnings, **of_run, **known))
