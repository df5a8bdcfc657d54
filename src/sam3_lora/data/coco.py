"""COCO data as the official loader reads it: a folder of images beside its ``_annotations.coco.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from sam3_lora.errors import DataError, did_you_mean

ANNOTATION_FILE = "_annotations.coco.json"


class CocoImage(TypedDict):
    id: int
    file_name: str
    width: int
    height: int


class RunLengths(TypedDict):
    """A mask as run lengths, column by column; ``size`` is height and width."""

    size: list[int]
    counts: str | list[int]


class CocoAnnotation(TypedDict):
    """One object. The box is xywh in pixels; the segmentation is polygons ``[x1, y1, x2, y2, ...]`` or run lengths."""

    id: int
    image_id: int
    category_id: int
    bbox: list[float]
    segmentation: list[list[float]] | RunLengths
    area: float
    iscrowd: int


class CocoCategory(TypedDict):
    id: int
    name: str


class CocoDocument(TypedDict):
    images: list[CocoImage]
    annotations: list[CocoAnnotation]
    categories: list[CocoCategory]


@dataclass(frozen=True)
class Split:
    """One folder of a dataset, such as ``train``, as it was read; :func:`~sam3_lora.data.check.check_dataset` judges it."""

    folder: Path
    annotation_file: Path
    images: Sequence[CocoImage]
    annotations: Sequence[CocoAnnotation]
    categories: Sequence[CocoCategory]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The category names by ascending id: what the official loader asks every image for, in its order."""
        return tuple(category["name"] for category in sorted(self.categories, key=lambda c: c["id"]))

    @property
    def has_masks(self) -> bool:
        """Whether any annotation has a segmentation."""
        return any(annotation.get("segmentation") for annotation in self.annotations)

    @property
    def objects_per_prompt(self) -> dict[str, int]:
        """How many objects each prompt has; crowd regions are not counted, as the trainer drops them."""
        names = {category["id"]: category["name"] for category in self.categories}
        counts = dict.fromkeys(self.prompts, 0)
        for annotation in self.annotations:
            if not annotation["iscrowd"]:
                counts[names[annotation["category_id"]]] += 1
        return counts


def read_split(folder: Path, annotation_file: Path | None = None) -> Split:
    """Return the split that lies in a folder.

    Args:
        folder: Of its images.
        annotation_file: Where it is not in that folder under its usual name.

    Raises:
        DataError: If the folder or its annotation file is missing or cannot be used.
    """
    path = find_annotation_file(folder, annotation_file)
    document = read_coco(path)
    return Split(folder, path, document["images"], document["annotations"], document["categories"])


def find_annotation_file(folder: Path, annotation_file: Path | None = None) -> Path:
    """Return the path of the annotation file of a split, which is that of ``read_split``.

    Raises:
        DataError: If the folder or the file is missing.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder" if folder.exists() else f"no folder {folder}")
    path = annotation_file or folder / ANNOTATION_FILE
    if not path.is_file():
        hint = _other_json_files(path.parent) if path.parent.is_dir() else ""
        raise DataError(f"no {path.name!r} in {path.parent}{hint}")
    return path


def read_coco(path: Path) -> CocoDocument:
    """Return the document in a COCO file. Only its outline is sure: three lists of objects, whatever these hold.

    Raises:
        DataError: If the file cannot be read, is not whole, or is not a COCO document.
    """
    try:
        document = json.loads(decoded(path, "utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {_json_problem(error)}") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of thousands of digits, thousands of open brackets
        raise DataError(f"{path} is not usable JSON: {error}") from error
    if problem := _outline_problem(document):
        raise DataError(f"{path} is not a COCO document: {problem}")
    return cast(CocoDocument, document)


def decoded(path: Path, encoding: str) -> str:
    """Return the text of a file.

    Args:
        path: The file.
        encoding: ``utf-8``, or ``utf-8-sig`` to leave out a byte order mark.

    Raises:
        DataError: If it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode(encoding)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error


def mask_to_run_lengths(mask: NDArray[np.bool_]) -> RunLengths:
    """Return a mask ``(H, W)`` as compressed run lengths."""
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}


def compressed_run_lengths(segmentation: Any, size_hw: tuple[int, int]) -> Any:
    """Return polygons or run lengths of either kind as compressed run lengths, in the form that pycocotools takes."""
    if isinstance(segmentation, Mapping):
        run_lengths = dict(segmentation)
        if isinstance(run_lengths["counts"], list):
            return coco_mask.frPyObjects(run_lengths, *run_lengths["size"])
        return run_lengths
    return coco_mask.merge(coco_mask.frPyObjects([list(part) for part in segmentation], *size_hw))


def _other_json_files(folder: Path) -> str:
    found = sorted(file.name for file in folder.glob("*.json"))
    if len(found) == 1:
        return f"; did you mean {found[0]!r}? Then rename it"
    return did_you_mean(ANNOTATION_FILE, found)


def _json_problem(error: json.JSONDecodeError) -> str:
    if error.doc.startswith("\ufeff"):
        return "it begins with a byte order mark, which the official loader refuses; save it without"
    # An open string is reported where it begins, so that place says nothing about the end of the file.
    unterminated = error.msg.startswith("Unterminated string")
    cut_off = unterminated or error.pos >= len(error.doc.rstrip()) - len("fals")
    return f"{error}" + ("; the file ends too early, like a copy that was cut off" if cut_off else "")


def _outline_problem(document: object) -> str:
    if not isinstance(document, dict):
        return f"it holds a {type(document).__name__}, not an object with 'images', 'annotations' and 'categories'"
    missing = [key for key in ("images", "annotations", "categories") if key not in document]
    if missing:
        return f"it has no {' and no '.join(map(repr, missing))}, only {list(document)[:8]}"
    for key in ("images", "annotations", "categories"):
        if not isinstance(document[key], list):
            return f"{key!r} is a {type(document[key]).__name__}, not a list"
        odd = next((i for i, entry in enumerate(document[key]) if not isinstance(entry, dict)), None)
        if odd is not None:
            return f"{key}[{odd}] is {str(document[key][odd])[:40]!r}, not an object"
    return ""
