"""Progress of a command on standard error: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sam3_lora.training.progress import Progress

Show = Callable[["Progress"], None]
ShowCount = Callable[[int, int], None]
ShowStage = Callable[[str, int, int], None]


class _Update(Protocol):
    def __call__(self, text: str, done: float, below: str = "", /) -> None: ...


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
    print_once = cache(_print_line)
    if _on_terminal():
        with _bars() as add:
            update, add_once = add(), cache(add)  # the second bar is not there before it is needed

            def show(progress: Progress) -> None:
                _print_lines(progress, print_once)
                update(place(progress), fraction_done(progress), details(progress))

            yield show, lambda done, total: add_once()(f"{done}/{total} {what}", done / total)
    else:
        lines = _Lines()

        def show_line(progress: Progress) -> None:
            _print_lines(progress, print_once)
            lines.show(progress)

        yield show_line, _CountLines(what).show


def _on_terminal() -> bool:
    """Whether what is written can be overwritten, and somebody sees it who has not asked for plain text."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("CI") or os.environ.get("TERM") == "dumb"
    return sys.stderr.isatty() and not plain


def _print_lines(progress: Progress, print_once: Callable[[str], None]) -> None:
    for name, line in progress.settings.items():
        print_once(f"{name}: {line}")
    for warning in progress.warnings:
        print_once(f"warning: {warning}")


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def count_on_stderr(what: str) -> Iterator[ShowCount]:
    """Yield a function that shows how many of how many things are done.

    Args:
        what: The things, such as ``"images"``.
    """
    if _on_terminal():
        with _bars() as add:
            update = add()
            yield lambda done, total: update(f"{done}/{total} {what}", done / total)
    else:
        yield _CountLines(what).show


@contextmanager
def stages_on_stderr() -> Iterator[ShowStage]:
    """Yield a function that shows, of one kind of things after another, how many of how many are done."""
    if _on_terminal():
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
    return "  ".join(filter(None, (place(progress), details(progress))))


def place(progress: Progress) -> str:
    """Return epoch, step and loss."""
    parts = [f"epoch {progress.epoch}/{progress.epochs}", f"step {progress.step}/{progress.steps}"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4g}")
    return "  ".join(parts)


def details(progress: Progress) -> str:
    """Return the metrics of the last validation, the learning rate and the memory, as far as they are known."""
    parts = [
        f"{name.replace('_', ' ')} {progress.metrics[name]:.3f}"
        for name in _SHOWN_METRICS
        if name in progress.metrics
    ]
    if progress.rates:
        parts.append(f"lr {max(progress.rates):.3g}")
    if progress.memory_bytes is not None and progress.peak_bytes is not None:
        memory = f"{progress.memory_bytes / 1e9:.1f} GB, peak {progress.peak_bytes / 1e9:.1f}"
        parts.append(f"{progress.memory_of} {memory}")
    return "  ".join(parts)


def fraction_done(progress: Progress) -> float:
    """Return the share of all training steps that are done, 0 to 1."""
    return ((progress.epoch - 1) * progress.steps + progress.step) / (progress.epochs * progress.steps)


@contextmanager
def _bars() -> Iterator[Callable[[], _Update]]:
    """Yield a function that adds a bar, and returns what takes its description, the share that is done, 0 to 1, and a
    line to show below all bars."""
    from rich.console import Console, RenderableType
    from rich.progress import (
        BarColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars
    from rich.text import Text

    class BarsAndLine(Bars):
        line = ""

        def get_renderables(self) -> Iterable[RenderableType]:
            yield from super().get_renderables()
            if self.line:
                yield Text(self.line, style="dim", no_wrap=True, overflow="ellipsis")

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left", style="dim"),
        TimeRemainingColumn(compact=True),
    )
    with BarsAndLine(*columns, console=Console(stderr=True), expand=True) as bars:

        def add() -> _Update:
            task = bars.add_task("starting", total=None)

            def update(text: str, done: float, below: str = "", /) -> None:
                bars.line = below
                bars.update(task, description=text, completed=done, total=1.0)

            return update

        yield add


class _Lines:
    """Prints a line for every validation, and otherwise one each ten seconds."""

    def __init__(self) -> None:
        self._start: tuple[float, float] | None = None
        self._last_time = float("-inf")
        self._last_metrics: Mapping[str, float] = {}

    def show(self, progress: Progress) -> None:
        now, done = time.monotonic(), fraction_done(progress)
        if self._start is None:
            self._start = now, done
        if progress.metrics == self._last_metrics and now - self._last_time < _SECONDS_BETWEEN_LINES:
            return
        self._last_time, self._last_metrics = now, progress.metrics
        _print_line(describe(progress) + _time_left(now - self._start[0], done - self._start[1], done))


def _time_left(seconds: float, share: float, done: float) -> str:
    """Return how long the rest takes if ``share`` of the whole, 0 to 1, has taken so many seconds since the first line."""
    if done >= 1 or share <= 0:
        return ""
    left = round(seconds / share * (1 - done))
    hours, minutes = left // 3600, left // 60 % 60
    return f"  {hours} h {minutes:02} min left" if hours else f"  {minutes} min {left % 60:02} s left"


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
