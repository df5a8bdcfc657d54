"""What the command that waits for a run does with stop signals: hand them to the trainer, and tell how it ended."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from sam3_lora.errors import RunStopped
from sam3_lora.training.lock import LOCK_FILE
from sam3_lora.training.progress import ProgressReader


class SignalRelay:
    """Takes the number of each stop signal and passes it to the trainer of rank 0, which tells the others.

    Raises:
        RunStopped: On a second Ctrl-C, or before the first step, when there is nothing to save.
    """

    def __init__(self, logs: Path, progress: ProgressReader) -> None:
        self._lock = logs / LOCK_FILE
        self._progress = progress
        self._interrupted = False

    def __call__(self, number: int) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self._interrupted:
            raise RunStopped("stopped at once; what was last saved is there", 128 + number)
        if not self._progress.last_step:
            raise RunStopped(f"stopped by {name} before the first step", 128 + number)
        self._interrupted |= number == signal.SIGINT
        with suppress(ProcessLookupError):
            os.kill(int(self._lock.read_text(encoding="utf-8")), number)
        again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
        print(f"{name}: saving after this step{again}", file=sys.stderr, flush=True)


def stopped_run(progress: ProgressReader) -> RunStopped:
    """Return the error that tells where a run stopped."""
    stop = progress.stopped or {}
    if stop["step"] is None:
        where = f"after epoch {stop['epoch']}"
    else:
        where = f"after step {stop['step']} of {progress.last_step['steps']} of epoch {stop['epoch']}"
    number = signal.Signals[stop["signal"]]
    saved = (
        "all of it is saved"
        if stop["saved"]
        else "the adapter is saved, but no checkpoint, as training.save_checkpoints says"
    )
    return RunStopped(f"stopped by {number.name} {where}; {saved}", 128 + number)
