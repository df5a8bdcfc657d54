"""Check a dataset for everything that would stop the official trainer or spoil the result, before it starts."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sam3_lora.data import kinds
from sam3_lora.data.coco import ANNOTATION_FILE, find_annotation_file
from sam3_lora.data.contents import SplitContents
from sam3_lora.data.image_check import check_images
from sam3_lora.data.problems import Findings, Problem, describe
from sam3_lora.data.split_check import Needs, check_annotation_file
from sam3_lora.errors import DataError, did_you_mean

_LOG = logging.getLogger(__name__)

#: How far image files are looked at: not at all, that they are whole, or every pixel, which takes longer.
Images = Literal["none", "files", "pixels"]

#: Called with what is counted, how many are done, and of how many.
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SplitSummary:
    """What one split holds. Prompts are in the official loader's order; crowd regions are not counted as objects."""

    images: int
    objects_per_prompt: Mapping[str, int]

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(self.objects_per_prompt)

    @property
    def objects(self) -> int:
        return sum(self.objects_per_prompt.values())


@dataclass(frozen=True)
class DatasetSummary:
    """What a dataset that passed the check holds, by split name, and what was found that does not stop a training."""

    folder: Path
    splits: Mapping[str, SplitSummary]
    warnings: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class DatasetReport:
    """All that was found in a dataset: one problem of each kind, errors before warnings."""

    folder: Path
    problems: tuple[Problem, ...]
    summary: DatasetSummary | None

    @property
    def ok(self) -> bool:
        """Whether there are no errors."""
        return not self.errors

    @property
    def errors(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.level == "error")

    @property
    def warnings(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.level == "warning")

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {"problems": [asdict(problem) for problem in self.problems], "ok": self.ok}

    def verdict(self) -> str:
        """Return the result in one line."""
        counts = [sum(problem.count for problem in problems) for problems in (self.errors, self.warnings)]
        found = ", ".join(
            f"{count} {noun}{'' if count == 1 else 's'}"
            for count, noun in zip(counts, ("error", "warning"), strict=True)
        )
        return f"{self.folder} can{'' if self.ok else 'not'} be used: {found}"


def check_dataset(
    folder: str | Path,
    splits: Sequence[str] = ("train", "valid"),
    *,
    train_split: str | None = "train",
    masks: bool | None = True,
) -> DatasetSummary:
    """Return what the dataset holds, once every file and every annotation is found usable.

    Image files are opened, but decoded only where they look damaged.

    Args:
        folder: The dataset, with a folder for each split.
        splits: Names of the splits to check.
        train_split: The one to train on; the others are measured, which needs more.
        masks: Whether each annotation needs a ``segmentation``; ``None`` asks it of the splits where any has one.

    Raises:
        DataError: With all errors at once: how many of each kind, the first places, and what to do.
    """
    return _summary_of(examine_dataset(folder, splits, train_split=train_split, masks=masks))


def check_splits(
    files: Mapping[str, tuple[Path, Path]], *, train_split: str | None = "train", masks: bool | None = True
) -> DatasetSummary:
    """Do what :func:`check_dataset` does for splits that lie anywhere.

    Args:
        files: Name of a split -> folder of its images, and its annotation file.
        train_split: As there, and ``masks`` too.
    """
    folder = Path(next(iter(files.values()))[0])
    return _summary_of(_examine(folder, files, Findings(), train_split=train_split, masks=masks))


def examine_dataset(
    folder: str | Path,
    splits: Sequence[str] = ("train", "valid"),
    *,
    train_split: str | None = "train",
    masks: bool | None = True,
    images: Images = "files",
    processes: int = 1,
    on_progress: OnProgress | None = None,
) -> DatasetReport:
    """Return all that is wrong with a dataset, and raise only where there is no dataset to look at.

    Args:
        folder: As for :func:`check_dataset`, with ``splits``, ``train_split`` and ``masks``.
        images: How far image files are looked at; only with ``"pixels"`` the same picture in two splits is found.
        processes: Look at images in so many; with more than one, the main module must be safe to import.
        on_progress: Called with what is counted, how many are done, and of how many: MB of a file, then images.

    Raises:
        DataError: If the folder does not exist, or is a file or a single split.
    """
    folder, found = Path(folder), Findings()
    files = {
        name: (folder / name, folder / name / ANNOTATION_FILE) for name in _present(folder, splits, found)
    }
    return _examine(
        folder,
        files,
        found,
        train_split=train_split,
        masks=masks,
        images=images,
        processes=processes,
        on_progress=on_progress,
    )


def log_warnings(summary: DatasetSummary) -> None:
    """Log what was found in a dataset that does not stop a training, a line for each kind."""
    if summary.warnings:
        lines = [f"  {problem.kind} ({problem.count}): {problem.examples[0]}" for problem in summary.warnings]
        more = f"More: sam3-lora data check {shlex.quote(str(summary.folder))}"
        _LOG.warning("\n".join([f"Warnings about {summary.folder}:", *lines, more]))


def _examine(
    folder: Path,
    files: Mapping[str, tuple[Path, Path]],
    found: Findings,
    *,
    train_split: str | None,
    masks: bool | None,
    images: Images = "files",
    processes: int = 1,
    on_progress: OnProgress | None = None,
) -> DatasetReport:
    show = on_progress or (lambda what, done, total: None)
    read: dict[str, SplitContents] = {}
    for name, (images_folder, annotation_file) in files.items():
        try:
            path = find_annotation_file(images_folder, annotation_file)
            needs = Needs(masks, measured=name != train_split)
            read[name] = check_annotation_file(images_folder, path, needs, found, show)
        except DataError as error:
            found.add(kinds.ANNOTATIONS, str(error))
    _compare_categories(read, found)
    if images != "none":
        check_images(
            read,
            found,
            pixels=images == "pixels",
            processes=processes,
            on_progress=lambda done, total: show("images", done, total),
        )
    problems = tuple(sorted(found.problems(), key=lambda problem: problem.level))  # "error" < "warning"
    if any(problem.level == "error" for problem in problems):
        return DatasetReport(folder, problems, None)
    summary = DatasetSummary(folder, {name: _summary(split) for name, split in read.items()}, problems)
    return DatasetReport(folder, problems, summary)


def _summary_of(report: DatasetReport) -> DatasetSummary:
    if report.summary is None:
        raise DataError(describe(f"{report.folder} cannot be used", report.errors))
    return report.summary


def _summary(split: SplitContents) -> SplitSummary:
    return SplitSummary(len(split.images), split.objects_per_prompt)


def _present(folder: Path, names: Sequence[str], found: Findings) -> list[str]:
    """Return the splits that have a folder, and add those that have none."""
    if not folder.is_dir():
        raise DataError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}; {kinds.LAYOUT}")
    if (folder / ANNOTATION_FILE).is_file() and not any((folder / name).is_dir() for name in names):
        raise DataError(f"{folder} is a single split; give the folder above it: {kinds.LAYOUT}")
    present = []
    for name in names:
        if (folder / name).is_dir():
            present.append(name)
            continue
        others = sorted(
            entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name not in names
        )
        hint = did_you_mean(name, others)
        found.add(kinds.SPLIT, f"no folder {name!r} in {folder}{hint and hint + ' Then rename it'}")
    return present


def _compare_categories(splits: Mapping[str, SplitContents], found: Findings) -> None:
    """Add the categories that some split lacks: known by name, as the id may be another one."""
    names = {
        name: {" ".join(c.lower().split()): c for c in split.categories.values() if c.strip()}
        for name, split in splits.items()
    }
    for name, known in names.items():
        for other, others in names.items():
            for prompt in known.keys() - others.keys():
                found.add(kinds.OTHER_CATEGORIES, f"{known[prompt]!r} of {name} is not in {other}")
