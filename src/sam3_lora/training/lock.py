"""One training at a time in a run folder, also when the command that started it was killed and it goes on alone."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO

from sam3_lora.errors import OutputError

LOCK_FILE = "run.lock"  # in logs/

_TO_DIE = 3.0  # seconds that a killed process may take to give its memory back
_TO_NOTICE = 15.0  # seconds; a data loader's worker looks every 5 whether its trainer is gone


def take_lock(logs: Path) -> IO[str]:
    """Return the open lock file of a run; whoever holds it open, forked workers too, keeps others out.

    Raises:
        OutputError: If another process trains in the same folder.
    """
    logs.mkdir(parents=True, exist_ok=True)
    file = open(logs / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115  (open for as long as the process lives)
    try:
        _wait_for(file, logs.parent)
    except BaseException:
        file.close()
        raise
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def check_not_running(run_folder: Path) -> None:
    """Do nothing if no process trains in a run folder.

    Raises:
        OutputError: Names the process.
    """
    if (run_folder / "logs" / LOCK_FILE).is_file():
        with open(run_folder / "logs" / LOCK_FILE, encoding="utf-8") as file:
            _wait_for(file, run_folder)


def _wait_for(file: IO[str], run_folder: Path) -> None:
    """Lock a file, if need be after a trainer that was killed, and its workers, have ended."""
    start = time.monotonic()
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            process = file.read()
            if time.monotonic() - start > (_TO_DIE if _is_alive(process) else _TO_NOTICE):
                raise OutputError(
                    f"a training is going on in {run_folder} (process {process}); wait for its end, or stop it first: "
                    f"kill {process}"
                ) from None
        time.sleep(0.2)


def _is_alive(process: str) -> bool:
    """Whether a process is there and more than a zombie, which keeps its number until its parent asks for it."""
    try:
        state = Path("/proc", process, "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")
