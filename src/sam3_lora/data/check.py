"""Check a dataset for everything that would stop the official trainer or spoil the result, before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sam3_lora.data.coco import ANNOTATION_FILE, Split, box_problem, read_split, segmentation_problem
from sam3_lora.data.image_files import read_size_hw
from sam3_lora.data.problems import Findings, Kind, Problem, describe
from sam3_lora.errors import DataError, did_you_mean

Entry = Mapping[str, object]

LAYOUT = f"a dataset is a folder with train/ and valid/, each with its images and {ANNOTATION_FILE!r}"
SPLIT = Kind("missing split", LAYOUT)
ANNOTATIONS = Kind(
    "unusable annotation file", "export the dataset again as 'COCO Segmentation', or copy the file again"
)
NO_IMAGES = Kind("split without images", "list the images in 'images'; a split needs at least one")
NO_OBJECTS = Kind(
    "split without annotations", "annotate some images: without objects nothing is learned or measured"
)
NO_CATEGORIES = Kind("split without categories", 'add {"id": 1, "name": "..."} for each kind of object')
FIELD = {
    "id": Kind(
        "entry without a whole number as 'id'", "number the images, annotations and categories from 1"
    ),
    "file_name": Kind(
        "image without 'file_name'", "name the file, relative to the folder of the annotation file"
    ),
    "size": Kind("image without 'width' and 'height'", "add both as whole numbers of pixels"),
    "iscrowd": Kind(
        "annotation without 'iscrowd'",
        'add "iscrowd": 0 to each annotation, or 1 where a mask covers a crowd; the official loader reads it always',
    ),
    "bbox": Kind(
        "annotation without 'bbox'", 'add "bbox": [x, y, width, height] in pixels, from the top left corner'
    ),
    "segmentation": Kind(
        "annotation without 'segmentation'",
        "add polygons or RLE, or export as 'COCO Segmentation': boxes alone do not train masks",
    ),
    "area": Kind(
        "annotation without 'area'", "add the number of pixels of the mask: the evaluation sorts by it"
    ),
}
DUPLICATE_ID = Kind("id used twice", "give each its own: the loader keeps one of them only")
UNKNOWN_IMAGE = Kind(
    "annotation of an unknown image", "correct its 'image_id', add the image or delete the annotation"
)
UNKNOWN_CATEGORY = Kind(
    "annotation of an unknown category",
    "correct its 'category_id', add the category or delete the annotation",
)
NAME = Kind(
    "category without a name", "name it: the name is the prompt that SAM3 is asked, such as 'red car'"
)
DUPLICATE_NAME = Kind(
    "category name used twice",
    "merge the two, or delete the unused one: the name is the prompt, and one prompt cannot mean both",
)
MISSING_IMAGE = Kind(
    "missing image file", "copy it there, or delete the image and its annotations from the file"
)
BROKEN_IMAGE = Kind(
    "unreadable image file", "replace it, or delete the image and its annotations from the file"
)
IMAGE_SIZE = Kind(
    "image of another size than its file",
    "write the size of the file; if the image was resized or turned after labelling, its labels must be too",
)
BOX = Kind(
    "bad bbox", "boxes are [x, y, width, height] in pixels of the image, not x2, y2 and not shares of 1"
)
SEGMENTATION = Kind(
    "bad segmentation",
    "it is polygons [[x1, y1, x2, y2, x3, y3, ...], ...] in pixels, or RLE of the image's size",
)


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
        counts = [sum(p.count for p in problems) for problems in (self.errors, self.warnings)]
        found = f"{counts[0]} errors, {counts[1]} warnings"
        return f"{self.folder} can{'' if self.ok else 'not'} be used: {found}"


def check_dataset(
    folder: str | Path, splits: Sequence[str] = ("train", "valid"), *, train_split: str | None = "train"
) -> DatasetSummary:
    """Return what the dataset holds, once every file and every annotation is found usable.

    Image files are opened, but decoded only where they look damaged.

    Args:
        folder: The dataset, with a folder for each split.
        splits: Names of the splits to check.
        train_split: The one to train on; the others are measured, which needs more.

    Raises:
        DataError: With all errors at once: how many of each kind, the first places, and what to do.
    """
    report = examine_dataset(folder, splits, train_split=train_split)
    if report.errors:
        raise DataError(describe(f"{report.folder} cannot be used", report.errors))
    assert report.summary is not None
    return report.summary


def examine_dataset(
    folder: str | Path, splits: Sequence[str] = ("train", "valid"), *, train_split: str | None = "train"
) -> DatasetReport:
    """Return what :func:`check_dataset` finds, and raise only where there is no dataset to look at.

    Raises:
        DataError: If the folder does not exist, or is a file or a single split.
    """
    folder = Path(folder)
    found = Findings()
    read = _read_splits(folder, splits, found)
    for name, split in read.items():
        # The trainer works out areas itself; the evaluation reads them from the file.
        _check_split(split, ["bbox", "segmentation"] + ["area"] * (name != train_split), found)
    problems = tuple(sorted(found.problems(), key=lambda problem: problem.level))  # "error" < "warning"
    if any(problem.level == "error" for problem in problems):
        return DatasetReport(folder, problems, None)
    summary = DatasetSummary(folder, {name: _summary(split) for name, split in read.items()}, problems)
    return DatasetReport(folder, problems, summary)


def _summary(split: Split) -> SplitSummary:
    return SplitSummary(len(split.images), split.objects_per_prompt)


def _read_splits(folder: Path, names: Sequence[str], found: Findings) -> dict[str, Split]:
    if not folder.is_dir():
        raise DataError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}; {LAYOUT}")
    if (folder / ANNOTATION_FILE).is_file() and not any((folder / name).is_dir() for name in names):
        raise DataError(f"{folder} is a single split; give the folder above it: {LAYOUT}")
    splits = {}
    for name in names:
        if not (folder / name).is_dir():
            others = sorted(
                entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name not in names
            )
            hint = did_you_mean(name, others)
            found.add(SPLIT, f"no folder {name!r} in {folder}{hint and hint + ' Then rename it'}")
            continue
        try:
            splits[name] = read_split(folder / name)
        except DataError as error:
            found.add(ANNOTATIONS, str(error))
    return splits


def _check_split(split: Split, fields: Sequence[str], found: Findings) -> None:
    where = str(split.annotation_file)
    for entries, kind in (
        (split.images, NO_IMAGES),
        (split.annotations, NO_OBJECTS),
        (split.categories, NO_CATEGORIES),
    ):
        if not entries:
            found.add(kind, where)
    categories = _by_id(split.categories, "category", where, found)
    images = _by_id(split.images, "image", where, found)
    _by_id(split.annotations, "annotation", where, found)
    _check_names(split.categories, where, found)
    for image in split.images:
        _check_image(image, split.folder, where, found)
    for annotation in split.annotations:
        _check_annotation(annotation, images, categories, fields, where, found)


def _by_id(entries: Sequence[Entry], noun: str, where: str, found: Findings) -> dict[object, Entry]:
    by_id: dict[object, Entry] = {}
    for position, entry in enumerate(entries):
        key = entry.get("id")
        if type(key) is not int:
            found.add(FIELD["id"], f"{where}: {noun} at position {position} has id {key!r}")
        elif key in by_id:
            found.add(DUPLICATE_ID, f"{where}: {noun} {key}")
        else:
            by_id[key] = entry
    return by_id


def _check_names(categories: Sequence[Entry], where: str, found: Findings) -> None:
    seen: dict[str, object] = {}
    for category in categories:
        name, key = category.get("name"), category.get("id")
        if not isinstance(name, str) or not name.strip():
            found.add(NAME, f"{where}: category {key!r} has the name {name!r}")
            continue
        prompt = " ".join(name.lower().split())  # all that SAM3's tokenizer sees of it
        if prompt in seen:
            found.add(DUPLICATE_NAME, f"{where}: categories {seen[prompt]!r} and {key!r} are both {prompt!r}")
        seen.setdefault(prompt, key)


def _check_image(image: Entry, folder: Path, where: str, found: Findings) -> None:
    file_name = image.get("file_name")
    size_hw = _size_hw(image)
    if size_hw is None:
        found.add(FIELD["size"], f"{where}: image {image.get('id')!r} ({file_name!r})")
    if not isinstance(file_name, str) or not file_name:
        found.add(FIELD["file_name"], f"{where}: image {image.get('id')!r}")
        return
    path = folder / file_name
    if not path.is_file():
        here = folder / Path(file_name).name
        hint = f"; there is {here.name!r}, and 'file_name' is relative to {folder}" if here.is_file() else ""
        found.add(MISSING_IMAGE, f"{path} (image {image.get('id')!r} of {where}){hint}")
        return
    try:
        stored_hw = read_size_hw(path)
    except DataError as error:
        found.add(BROKEN_IMAGE, str(error))
        return
    if size_hw not in (None, stored_hw):
        sizes = [f"{width} x {height}" for height, width in (size_hw, stored_hw)]
        found.add(
            IMAGE_SIZE, f"{where}: image {image.get('id')!r} is {sizes[0]}, its file {path} is {sizes[1]}"
        )


def _size_hw(image: Entry) -> tuple[int, int] | None:
    height, width = image.get("height"), image.get("width")
    if type(height) is int and type(width) is int and min(height, width) > 0:
        return height, width
    return None


def _check_annotation(
    annotation: Entry,
    images: Mapping[object, Entry],
    categories: Mapping[object, Entry],
    fields: Sequence[str],
    where: str,
    found: Findings,
) -> None:
    image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
    image = images.get(image_id) if type(image_id) is int else None
    place = f"{where}: annotation {annotation.get('id')!r}" + (
        f" of {image.get('file_name')!r}" if image else ""
    )
    if image is None:
        found.add(UNKNOWN_IMAGE, f"{place} has image_id {image_id!r}")
    if type(category_id) is not int or category_id not in categories:
        found.add(UNKNOWN_CATEGORY, f"{place} has category_id {category_id!r}")
    if annotation.get("iscrowd") not in (0, 1):
        value = annotation.get("iscrowd")
        found.add(
            FIELD["iscrowd"], place if value is None else f"{place} has {value!r}, which is neither 0 nor 1"
        )
    for field in fields:
        if annotation.get(field) is None:
            found.add(FIELD[field], place)
    size_hw = _size_hw(image) if image else None
    if size_hw is None:
        return
    box, segmentation = annotation.get("bbox"), annotation.get("segmentation")
    if box is not None and (problem := box_problem(box, size_hw)):
        found.add(BOX, f"{place}: bbox {str(box)[:60]} {problem}")
    if segmentation is not None and (problem := segmentation_problem(segmentation, size_hw)):
        found.add(SEGMENTATION, f"{place}: segmentation {problem}")
