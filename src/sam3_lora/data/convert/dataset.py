"""Convert what a labelling tool or a download left into the layout that the official trainer reads."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from threading import Thread
from typing import Any

from sam3_lora.data.convert import hugging_face
from sam3_lora.data.convert.archive import extract_zip
from sam3_lora.data.convert.formats import FORMATS, recognised
from sam3_lora.data.convert.items import Converted, Item, Source, convert_item
from sam3_lora.data.convert.pictures import FilePicture, free_name
from sam3_lora.data.convert.report import NO_VALID, RENAMED, Report, printable
from sam3_lora.data.convert.tree import Tree, list_tree
from sam3_lora.data.convert.writing import Categories, SplitWriter
from sam3_lora.data.problems import Problem
from sam3_lora.errors import DataError, OutputError
from sam3_lora.output import check_output, mark_made, replaced_folder

MADE_BY = "data convert"
_SPLITS = ("train", "valid", "test")
_ALONE = 200  # images that are faster converted by one process than by several
_CHUNK = 32  # images given to a process at a time


#: What :func:`~sam3_lora.data.convert.items.convert_item` takes.
Job = tuple[Item, Path, bool, bool]


@dataclass(frozen=True)
class Conversion:
    """What a conversion made.

    Attributes:
        folder: The dataset.
        format: The name of the source's format.
        evidence: What showed it.
        images: By split.
        objects: By split.
        categories: Names, in the order of their ids.
        notes: What is not in the dataset as it was in the source.
    """

    folder: Path
    format: str
    evidence: str
    images: Mapping[str, int]
    objects: Mapping[str, int]
    categories: Sequence[str]
    notes: Sequence[Problem]


def convert_dataset(
    src: Any,
    dst: str | Path,
    *,
    source_format: str | None = None,
    valid_share: float = 0.2,
    seed: int = 0,
    class_name: str | None = None,
    boxes: bool = False,
    copy: bool = False,
    overwrite: bool = False,
    processes: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Convert a labelled dataset to ``train/``, ``valid/`` and perhaps ``test/``, each with ``_annotations.coco.json``.

    The source is not changed. The target appears when all is done; if anything is wrong, or the process ends, there
    is none.

    Args:
        src: A folder, a zip archive, one label file, or a loaded ``Dataset`` or ``DatasetDict`` of Hugging Face.
        dst: The dataset to make: a folder that is new or empty.
        source_format: A key of :data:`~sam3_lora.data.convert.formats.FORMATS`; None to recognise it.
        valid_share: Share of the images for ``valid/`` where the source has no such split, drawn by the seed.
        class_name: The class of labels that have none.
        boxes: Leave boxes without a mask, for a training without masks, rather than write the rectangle as one.
        copy: Copy image files also where a hard link would do.
        overwrite: Replace a dataset that an earlier conversion made.
        processes: How many work at a time; None for one a core.
        on_progress: Called with the number of images that are done, and of all.

    Raises:
        DataError: With all problems at once.
        OutputError: If ``dst`` holds something or cannot be written.
    """
    dst = Path(dst)
    if not 0 <= valid_share < 1:
        raise DataError(f"valid_share is {valid_share!r}; it is 0 or more, and less than 1")
    check_output(dst, MADE_BY, overwrite)
    report = Report()
    with _opened(src, dst) as tree:
        kind, evidence, source = _planned(tree, src, source_format, class_name, report)
        title = f"{src if tree is not None else 'the dataset'} cannot be converted from {kind!r}"
        if not source.items and not report.problems.problems():
            raise DataError(f"{title}: it has no labelled images")
        splits = _shared_out(source.items, valid_share, seed, report)
        with _written(dst), replaced_folder(dst) as folder:
            names, written = _write(
                source, splits, folder, report, (copy, not boxes), processes, on_progress, title
            )
            mark_made(folder, MADE_BY)
    images = {split: writer.images for split, writer in written.items()}
    objects = {split: writer.objects for split, writer in written.items()}
    return Conversion(dst, kind, printable(evidence), images, objects, names, report.notes.problems())


@contextmanager
def _opened(src: Any, dst: Path) -> Iterator[Tree | None]:
    """Yield the files of a source; a zip archive is unpacked beside the target for as long. None for a loaded dataset."""
    if not isinstance(src, (str, os.PathLike)):
        yield None
        return
    path = Path(src).absolute()
    exclude = [dst, dst.with_name(f".{dst.name}.new"), dst.with_name(f".{dst.name}.old")]
    if path.is_dir():
        yield list_tree(path, exclude)
    elif not path.exists():
        raise DataError(f"{path} does not exist; give a folder, a zip archive or a label file")
    elif path.suffix.lower() == ".zip":
        with _beside(dst) as folder:
            extract_zip(path, folder)
            yield list_tree(folder)
    elif path.suffix.lower() in (".json", ".xml", ".csv", ".yaml", ".yml"):
        above = path.parent.parent if path.parent.name.lower() in ("annotations", "labels") else path.parent
        yield list_tree(above, exclude, only=path)
    else:
        raise DataError(
            f"{path} is neither a folder nor a zip archive nor a label file; unpack other archives first"
        )


@contextmanager
def _written(dst: Path) -> Iterator[None]:
    """Say of what the system refuses that the target cannot be written."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            f"{dst} cannot be written: {error.strerror or error}; choose another place"
        ) from error


@contextmanager
def _beside(dst: Path) -> Iterator[Path]:
    """Yield an empty folder on the disk of the target, so that images can be linked; it is deleted afterwards.

    What a process that was killed left there is deleted first.
    """
    folder = dst.absolute().with_name(f".{dst.name}.unpacked")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _planned(
    tree: Tree | None, src: Any, wanted: str | None, class_name: str | None, report: Report
) -> tuple[str, str, Source]:
    if tree is None:
        if not hasattr(src, "features") and not isinstance(src, Mapping):
            raise DataError(f"the source is {src!r:.60}; give a path, or a Dataset of Hugging Face")
        return "huggingface", type(src).__name__, hugging_face.plan_loaded(src, report, class_name)
    name, evidence = recognised(tree, wanted)
    source = FORMATS[name].plan(tree, report, class_name)
    tree.report_broken(report)
    return name, evidence, source


def _shared_out(items: Sequence[Item], valid_share: float, seed: int, report: Report) -> list[str]:
    """Return the split of each item: the source's own; where it has no ``valid``, a share of ``train`` is drawn."""
    splits = [item.split or "train" for item in items]
    if "train" not in splits:
        splits = ["train"] * len(items)
    if "valid" in splits or not valid_share:
        return splits
    chance = random.Random(seed)
    # Each by itself, so that the objects of a small set do not all end up on one side.
    for empty in (False, True):
        train = [n for n, item in enumerate(items) if splits[n] == "train" and item.labels.are_empty is empty]
        count = min(max(not empty, round(len(train) * valid_share)), len(train) - 1)
        for number in chance.sample(train, max(count, 0)):
            splits[number] = "valid"
    if "valid" not in splits:
        report.note(NO_VALID, f"{len(items)} image in all")
    return splits


def _write(
    source: Source,
    splits: Sequence[str],
    folder: Path,
    report: Report,
    options: tuple[bool, bool],
    processes: int | None,
    on_progress: Callable[[int, int], None] | None,
    title: str,
) -> tuple[list[str], dict[str, SplitWriter]]:
    categories = Categories(source.classes, report)
    writers = {split: SplitWriter(folder / split) for split in _SPLITS if split in splits}
    jobs = _jobs(source.items, splits, folder, options, report)
    workers = 1 if source.one_process else processes or len(os.sched_getaffinity(0))
    try:
        results = zip(jobs, _converted(jobs, workers), strict=True)
        for done, ((_, target, *_), converted) in enumerate(results, 1):
            report.merge(converted.report)
            writers[target.parent.name].add(converted, categories)
            if on_progress:
                on_progress(done, len(jobs))
        report.raise_problems(title)
        for writer in writers.values():
            writer.close(categories)
    finally:
        for writer in writers.values():
            writer.abandon()
    return categories.names, writers


def _jobs(
    items: Sequence[Item], splits: Sequence[str], folder: Path, options: tuple[bool, bool], report: Report
) -> list[Job]:
    """Return each item with the path of its picture, one of a kind in its split whatever the file system."""
    taken: dict[str, set[str]] = {split: set() for split in _SPLITS}
    jobs = []
    for item, split in zip(items, splits, strict=True):
        wanted = item.picture.name
        above = item.picture.path.parent.name if isinstance(item.picture, FilePicture) else ""
        name = free_name(wanted, taken[split], above)
        if name != wanted:
            report.note(RENAMED, f"{item.picture.place} is {split}/{name}")
        jobs.append((item, folder / split / name, *options))
    return jobs


def _converted(jobs: Sequence[Job], workers: int) -> Iterator[Converted]:
    if workers < 2 or len(jobs) <= _ALONE:
        yield from starmap(convert_item, jobs)
        return
    # A fresh start of each process would import the user's script again, which must be guarded for that.
    method = "fork" if sys.platform == "linux" else None
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            yield from pool.map(_convert_job, jobs, chunksize=_CHUNK)
        except BrokenProcessPool as error:
            raise DataError("a process of the conversion was killed, perhaps for want of memory") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: else it would wait for work for ever."""
    Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _convert_job(job: Job) -> Converted:
    return convert_item(*job)
