"""The check of image files: what is wrong with each, in several processes if asked, and which are in two splits."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import combinations, islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from sam3_lora.data import kinds
from sam3_lora.data.contents import SplitContents
from sam3_lora.data.image_files import ImageFacts, read_facts
from sam3_lora.data.problems import Findings, Kind
from sam3_lora.data.similar import Signature, same_pictures
from sam3_lora.errors import DataError

_CHUNK = 32  # images that a process takes at once


class _Task(NamedTuple):
    image_id: int
    folder: str
    file_name: str
    size_hw: tuple[int, int] | None
    listed_in: str


class _Result(NamedTuple):
    flaws: list[tuple[Kind, str]]
    signature: Signature | None


def check_images(
    splits: Mapping[str, SplitContents],
    found: Findings,
    *,
    pixels: bool,
    processes: int = 1,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Add what is wrong with the image files of splits.

    Args:
        splits: Each as its annotation file was read.
        found: Takes the problems.
        pixels: Decode each image, and look for the same picture in two splits.
        processes: Decode in so many; with more than one, the main module must be safe to import.
        on_progress: Gets the number of images done and of all.
    """
    tasks = [
        (
            name,
            _Task(key, str(contents.folder), image.file_name, image.size_hw, str(contents.annotation_file)),
        )
        for name, contents in splits.items()
        for key, image in contents.images.items()
        if image.file_name
    ]
    signatures: dict[str, dict[str, Signature]] = {name: {} for name in splits}
    results = _examined([task for _, task in tasks], pixels, processes)
    for done, ((name, task), result) in enumerate(zip(tasks, results, strict=True), start=1):
        for kind, text in result.flaws:
            found.add(kind, text)
        if result.signature:
            signatures[name][os.path.join(task.folder, task.file_name)] = result.signature
        on_progress(done, len(tasks))
    for first, second in combinations(signatures, 2):
        for a, b in _same(signatures[first], signatures[second]):
            found.add(kinds.IN_BOTH, f"{a} and {b}")


def _same(first: Mapping[str, Signature], second: Mapping[str, Signature]) -> Iterator[tuple[str, str]]:
    names = list(first), list(second)
    for a, b in same_pictures(list(first.values()), list(second.values())):
        yield names[0][a], names[1][b]


def _examined(tasks: Sequence[_Task], pixels: bool, processes: int) -> Iterator[_Result]:
    if processes == 1 or len(tasks) <= 2 * _CHUNK:
        yield from (_examine(task, pixels) for task in tasks)
        return
    chunks = (tasks[start : start + _CHUNK] for start in range(0, len(tasks), _CHUNK))
    # Not fork: the library may be used in a program that has threads. Ctrl-C reaches all of a terminal's processes.
    pool = ProcessPoolExecutor(
        processes, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
    )
    try:
        waiting = [pool.submit(_examine_all, chunk, pixels) for chunk in islice(chunks, 4 * processes)]
        while waiting:
            yield from waiting.pop(0).result()
            waiting += [pool.submit(_examine_all, chunk, pixels) for chunk in islice(chunks, 1)]
    except BrokenProcessPool as error:
        raise DataError(
            "a process that decoded images was killed, perhaps for its memory; use fewer with --processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _examine_all(tasks: Iterable[_Task], pixels: bool) -> list[_Result]:
    return [_examine(task, pixels) for task in tasks]


def _examine(task: _Task, pixels: bool) -> _Result:
    path = Path(task.folder, task.file_name)
    if not os.path.isfile(path):  # pathlib's raises for names that no file can have
        return _Result([(kinds.MISSING_IMAGE, _missing(task, path))], None)
    flaws = list(_path_flaws(task, path))
    try:
        facts = read_facts(path, pixels)
    except DataError as error:
        return _Result([*flaws, (kinds.BROKEN_IMAGE, str(error))], None)
    return _Result([*flaws, *_flaws(task, path, facts)], facts.signature)


def _missing(task: _Task, path: Path) -> str:
    here = Path(task.folder, Path(task.file_name.replace("\\", "/")).name)
    said = f"{str(path)[:300]} (image {task.image_id} of {task.listed_in})"
    if os.path.isdir(path.parent):
        same = [name for name in os.listdir(path.parent) if name.casefold() == path.name.casefold()]
        if same:
            return f"{said}; there is {same[0]!r}, which differs by case"
    beside = os.path.isfile(here)
    return f"{said}; there is {here.name!r}, and 'file_name' is relative to {task.folder}" if beside else said


def _path_flaws(task: _Task, path: Path) -> Iterator[tuple[Kind, str]]:
    name = Path(task.file_name)
    if name.is_absolute() or ".." in name.parts:
        yield kinds.OUTSIDE_PATH, f"{task.listed_in}: image {task.image_id} is {task.file_name!r}"
        return
    inside = [Path(task.folder, *name.parts[: length + 1]) for length in range(len(name.parts))]
    if link := next((part for part in inside if part.is_symlink()), None):
        yield kinds.SYMLINK, f"{path} through {link}, to {os.readlink(link)}"


def _flaws(task: _Task, path: Path, facts: ImageFacts) -> Iterator[tuple[Kind, str]]:
    if facts.sixteen_bits:
        yield kinds.SIXTEEN_BITS, f"{path} (mode {facts.mode})"
    if facts.mode == "CMYK":
        yield kinds.CMYK, str(path)
    if facts.alpha:
        yield kinds.ALPHA, f"{path} (mode {facts.mode})"
    turned = facts.orientation in (5, 6, 7, 8)
    if task.size_hw in (None, facts.size_hw):
        if facts.orientation > 1:
            yield kinds.EXIF, f"{path} (orientation {facts.orientation})"
        return
    assert task.size_hw is not None
    sizes = [f"{width} x {height}" for height, width in (task.size_hw, facts.size_hw)]
    said = f"{task.listed_in}: image {task.image_id} is {sizes[0]}, its file {path} is {sizes[1]}"
    if turned and task.size_hw == facts.size_hw[::-1]:
        yield kinds.TURNED_LABELS, f"{said}, to be turned (orientation {facts.orientation})"
    else:
        yield kinds.IMAGE_SIZE, said
