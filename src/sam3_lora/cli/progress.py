"""Progress of a command on standard error: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sam3_lora.training.progress import Progress

Show = Callable[["Progress"], None]
ShowCount = Callable[[int, int], None]
ShowStage = Callable[[str, int, int], None]
_Update = Callable[[str, float], None]

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_UPDATES = 0.1
_SHOWN_METRICS = ("bbox_AP50", "segm_AP50")


@contextmanager
def progress_on_stderr() -> Iterator[Show]:
    """Yield a function that shows one state of a training run."""
    with run_on_stderr() as (show, _):
        yield show


@contextmanager
def run_on_stderr() -> Iterator[tuple[Show, ShowCount]]:
    """Yield a function that shows one state of a training run, and one for the images of the report at its end."""
    what = "images with the base, for the report"
    print_settings = cache(_print_settings)  # once
    if sys.stderr.isatty():
        with _bars() as add:
            update, add_once = add(), cache(add)  # the second bar is not there before it is needed

            def show(progress: Progress) -> None:
                print_settings(tuple(progress.settings.items()))
                update(describe(progress), fraction_done(progress))

            yield show, lambda done, total: add_once()(f"{done}/{total} {what}", done / total)
    else:
        lines = _Lines()

        def show_line(progress: Progress) -> None:
            print_settings(tuple(progress.settings.items()))
            lines.show(progress)

        yield show_line, _CountLines(what).show


def _print_settings(settings: tuple[tuple[str, str], ...]) -> None:
    for name, line in settings:
        print(f"{name}: {line}", file=sys.stderr, flush=True)


@contextmanager
def count_on_stderr(what: str) -> Iterator[ShowCount]:
    """Yield a function that shows how many of how many things are done.

    Args:
        what: The things, such as ``"images"``.
    """
    if sys.stderr.isatty():
        with _bars() as add:
            update = add()
            yield lambda done, total: update(f"{done}/{total} {what}", done / total)
    else:
        yield _CountLines(what).show


@contextmanager
def stages_on_stderr() -> Iterator[ShowStage]:
    """Yield a function that shows, of one kind of things after another, how many of how many are done."""
    if sys.stderr.isatty():
        with _bars() as add:
            bars: dict[str, _Update] = {}
            shown: dict[str, float] = {}

            def show(what: str, done: int, total: int) -> None:
                now = time.monotonic()
                if done != total and now - shown.get(what, -1.0) < _SECONDS_BETWEEN_UPDATES:
                    return
                shown[what] = now
                update = bars[what] if what in bars else bars.setdefault(what, add())
                update(f"{done:,}/{total:,} {what}", done / total)

            yield show
    else:
        yield _StageLines().show


def describe(progress: Progress) -> str:
    """Return where a run stands, in one line without the time."""
    parts = [f"epoch {progress.epoch}/{progress.epochs}", f"step {progress.step}/{progress.steps}"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4g}")
    for name in _SHOWN_METRICS:
        if name in progress.metrics:
            parts.append(f"{name.replace('_', ' ')} {progress.metrics[name]:.3f}")
    return "  ".join(parts)


def fraction_done(progress: Progress) -> float:
    """Return the share of all training steps that are done, 0 to 1."""
    return ((progress.epoch - 1) * progress.steps + progress.step) / (progress.epochs * progress.steps)


@contextmanager
def _bars() -> Iterator[Callable[[], _Update]]:
    """Yield a function that adds a bar, and returns what takes its description and the share that is done, 0 to 1."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left", style="dim"),
        TimeRemainingColumn(compact=True),
    )
    with Bar(*columns, console=Console(stderr=True), expand=True) as bar:

        def add() -> _Update:
            task = bar.add_task("starting", total=None)
            return lambda text, done: bar.update(task, description=text, completed=done, total=1.0)

        yield add


class _Lines:
    """Prints a line for every validation, and otherwise one each ten seconds."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._last_time = float("-inf")
        self._last_metrics: Mapping[str, float] = {}

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._start is None:
            self._start = now
        if progress.metrics == self._last_metrics and now - self._last_time < _SECONDS_BETWEEN_LINES:
            return
        self._last_time, self._last_metrics = now, progress.metrics
        done = fraction_done(progress)
        left = (now - self._start) / done * (1 - done)
        print(f"{describe(progress)}  {left / 60:.0f} min left", file=sys.stderr, flush=True)


class _CountLines:
    """Prints a line each ten seconds, and one for the last thing."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._last_time = float("-inf")

    def show(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._last_time >= _SECONDS_BETWEEN_LINES:
            self._last_time = now
            print(f"{done}/{total} {self._what}", file=sys.stderr, flush=True)


class _StageLines:
    """Prints a line each ten seconds, and none for what takes less."""

    def __init__(self) -> None:
        self._last_time = time.monotonic()

    def show(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last_time >= _SECONDS_BETWEEN_LINES:
            self._last_time = now
            print(f"{done:,}/{total:,} {what}", file=sys.stderr, flush=True)
