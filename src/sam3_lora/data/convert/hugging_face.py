"""Hugging Face ``datasets`` with masks: a folder of ``save_to_disk``, or a loaded ``Dataset`` or ``DatasetDict``.

Columns that are understood, beside one of images: an image of pixel values (``mask``, ``label``, ``annotation``), a list of
binary masks with a list of classes, and ``objects`` with ``segmentation`` or ``bbox`` and ``category``.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam3_lora.data.convert.items import Item, Size, Source
from sam3_lora.data.convert.mask_files import connected_parts, semantic_to_coco, unnamed, value_names
from sam3_lora.data.convert.objects import CocoObject, as_run_lengths, box_object, mask_object
from sam3_lora.data.convert.pictures import StoredPicture
from sam3_lora.data.convert.report import BAD_SHAPE, MASK_SIZE, MASK_VALUE, NO_CLASS, UNKNOWN_CLASS, Report
from sam3_lora.data.convert.tree import Tree, split_in_name
from sam3_lora.errors import DataError

_MASK_WORDS = ("mask", "label", "annotation", "segmentation", "semantic", "seg_map", "gt")
_CLASS_WORDS = (
    "category",
    "categories",
    "class",
    "classes",
    "label",
    "labels",
    "category_id",
    "class_id",
    "names",
)
_BOX_WORDS = ("bbox", "bboxes", "boxes")
_POLYGON_WORDS = ("segmentation", "segmentations", "polygons", "polygon")


@dataclass(frozen=True)
class _Columns:
    """The columns of a table by what they hold."""

    image: str
    mask: str | None
    masks: str | None
    objects: str | None
    classes: str | None


@dataclass(frozen=True)
class RowLabels:
    """The labels in one row of a table."""

    table: Any
    row: int
    columns: _Columns
    place: str
    pixel_names: Mapping[int, str]
    class_names: Sequence[str]
    class_name: str | None

    @property
    def are_empty(self) -> bool:
        return False

    def objects(self, size_hw: Size, report: Report) -> list[CocoObject]:
        row = self.table[self.row]
        if self.columns.objects:
            return hugging_face_to_coco(row[self.columns.objects], self.class_names, report, self.place)
        if self.columns.masks:
            named = row.get(self.columns.classes) if self.columns.classes else None
            return self._listed(row[self.columns.masks] or [], named, size_hw, report)
        values = _pixels(row[self.columns.mask])
        if values.shape != size_hw:
            report.problem(MASK_SIZE, f"{self.place}: the mask is {values.shape}, the image {size_hw}")
            return []
        if not self.pixel_names:  # one class
            return [mask_object(str(self.class_name), part) for part in connected_parts(values > 0)]
        if unknown := unnamed(values, self.pixel_names, (0, 255)):
            report.problem(MASK_VALUE, f"{self.place} has {', '.join(map(str, unknown))}")
            return []
        return semantic_to_coco(values, self.pixel_names)

    def _listed(self, masks: Sequence[Any], named: Any, size_hw: Size, report: Report) -> list[CocoObject]:
        found = []
        for number, stored in enumerate(masks):
            where = f"{self.place}: mask {number}"
            name = (
                _name(named[number], self.class_names) if named and number < len(named) else self.class_name
            )
            mask = _pixels(stored) > 0
            if not name:
                report.problem(NO_CLASS, where)
            elif mask.shape != size_hw:
                report.problem(MASK_SIZE, f"{where} is {mask.shape}, the image {size_hw}")
            else:
                found.append(mask_object(name, mask))
        return found


def recognise(tree: Tree) -> str:
    """Return what shows that a folder was made by ``save_to_disk``, or ``""``."""
    for name in ("dataset_dict.json", "dataset_info.json"):
        if (tree.root / name).is_file() and any(path.suffix == ".arrow" for path in tree.files):
            return name
    return ""


def plan(tree: Tree, report: Report, class_name: str | None = None) -> Source:
    """Return the rows of a saved dataset.

    Raises:
        DataError: If the package ``datasets`` is not installed, or cannot read the folder.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{tree.root} was made by the package 'datasets', which is not installed; pip install 'sam3-lora[datasets]'"
        ) from error
    try:
        loaded = datasets.load_from_disk(str(tree.root))
    except Exception as error:  # of many packages: arrow, fsspec, json
        raise DataError(f"{tree.root} cannot be read by the package 'datasets': {error}") from error
    return plan_loaded(loaded, report, class_name, value_names(tree, report), str(tree.root))


def plan_loaded(
    loaded: Any,
    report: Report,
    class_name: str | None = None,
    pixel_names: Mapping[int, str] | None = None,
    place: str = "the dataset",
) -> Source:
    """Return the rows of a ``Dataset``, or of each split of a ``DatasetDict``."""
    tables = dict(loaded) if isinstance(loaded, Mapping) else {"": loaded}
    items: list[Item] = []
    classes: dict[str, None] = {}
    for split, table in tables.items():
        where = f"{place} {split}".strip()
        columns = _columns(table.features, where)
        names = _class_names(table.features, columns)
        classes.update(dict.fromkeys([*names, *(pixel_names or {}).values()]))
        if columns.mask and not pixel_names and not class_name:
            report.problem(NO_CLASS, f"{where}: nothing says what the pixel values of {columns.mask!r} mean")
        import datasets

        raw = table.cast_column(columns.image, datasets.Image(decode=False))
        only = raw.select_columns([columns.image])
        labels = raw.remove_columns([columns.image])
        for row in range(len(table)):
            labelled = RowLabels(
                labels, row, columns, f"{where} row {row}", pixel_names or {}, names, class_name
            )
            name = f"{split or 'image'}_{row:06d}"
            picture = _picture(only, row, columns.image, name, f"{where} row {row}")
            items.append(Item(picture, labelled, split_in_name(split), upright=False))
    return Source(items, list(classes), one_process=True)


def hugging_face_to_coco(
    objects: Any, names: Sequence[str], report: Report | None = None, place: str = "the row"
) -> list[CocoObject]:
    """Return the objects in a column of them, a list of mappings or a mapping of lists.

    Args:
        objects: Each has a ``category``, and a ``segmentation`` of polygons or a ``bbox`` xywh, in pixels.
        names: Classes by number, for categories that are numbers.

    Raises:
        DataError: If one cannot be used and no report takes the problems.
    """
    given, report = report, report or Report()
    found = []
    for number, entry in enumerate(_rows(objects), 1):
        where = f"{place}: object {number}"
        name = _name(_first(entry, _CLASS_WORDS), names)
        polygons, box = _first(entry, _POLYGON_WORDS), _first(entry, _BOX_WORDS)
        if not name:
            report.problem(UNKNOWN_CLASS, f"{where} has {str(entry)[:60]}")
        elif isinstance(polygons, dict):
            found.append(CocoObject(name, as_run_lengths(polygons)))
        elif polygons:
            found.append(CocoObject(name, polygons if isinstance(polygons[0], (list, tuple)) else [polygons]))
        elif box and len(box) == 4:
            found.append(box_object(name, box))
        else:
            report.problem(BAD_SHAPE, f"{where} has neither polygons nor a box")
    if given is None:
        report.raise_problems(place)
    return found


def _columns(features: Mapping[str, Any], place: str) -> _Columns:
    kinds = {name: _kind(feature) for name, feature in features.items()}
    images = [name for name, kind in kinds.items() if kind == "image"]
    masks = [name for name in images if any(word in name.lower() for word in _MASK_WORDS)]
    photos = [name for name in images if name not in masks] or images[:1]
    listed = next((name for name, kind in kinds.items() if kind == "images"), None)
    objects = next((name for name, kind in kinds.items() if kind == "objects"), None)
    mask = next((name for name in masks if name not in photos[:1]), None) or (
        photos[1] if len(photos) > 1 else None
    )
    if not photos or not (mask or listed or objects):
        raise DataError(
            f"{place} has columns {dict(kinds)}; needed are an image, and a mask, a list of masks, or objects with "
            "'category' and 'segmentation' or 'bbox'"
        )
    classes = next(
        (name for name in features if name.lower() in _CLASS_WORDS and kinds[name] == "list"), None
    )
    return _Columns(photos[0], mask, listed, objects, classes)


def _kind(feature: Any) -> str:
    inner = getattr(feature, "feature", None)  # of a List or Sequence
    if inner is None and isinstance(feature, (list, tuple)) and feature:
        inner = feature[0]
    if type(feature).__name__ == "Image":
        return "image"
    fields = inner if isinstance(inner, Mapping) else feature if isinstance(feature, Mapping) else None
    if fields is not None:
        return "objects" if any(word in fields for word in (*_POLYGON_WORDS, *_BOX_WORDS)) else "mapping"
    if inner is not None:
        return "images" if type(inner).__name__ == "Image" else "list"
    return type(feature).__name__


def _class_names(features: Mapping[str, Any], columns: _Columns) -> list[str]:
    """Return the names of a ``ClassLabel`` wherever it is in the column of classes."""
    todo = [features[name] for name in (columns.objects, columns.classes) if name]
    while todo:
        feature = todo.pop(0)
        if hasattr(feature, "names") and not isinstance(feature, Mapping):
            return list(feature.names)
        if isinstance(feature, Mapping):
            todo += [feature[key] for key in feature if key in _CLASS_WORDS]
        elif getattr(feature, "feature", None) is not None:
            todo.append(feature.feature)
        elif isinstance(feature, (list, tuple)):
            todo += list(feature)
    return []


def _picture(table: Any, row: int, column: str, name: str, place: str) -> StoredPicture:
    stored = table[row][column] or {}
    suffix = Path(stored.get("path") or "").suffix.lower() or _suffix(stored.get("bytes"))
    own = Path(stored.get("path") or "").stem
    return StoredPicture((own or name) + suffix, place, partial(_stored, table, row, column))


def _suffix(data: bytes | None) -> str:
    try:
        with Image.open(io.BytesIO(data or b"")) as image:
            return {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "TIFF": ".tif"}.get(
                image.format or "", ".png"
            )
    except (OSError, ValueError, SyntaxError):
        return ".png"


def _stored(table: Any, row: int, column: str) -> bytes:
    stored = table[row][column]
    if not stored or (not stored.get("bytes") and not stored.get("path")):
        raise DataError(f"row {row} has no image")
    data = stored.get("bytes")
    return data if data else Path(stored["path"]).read_bytes()


def _pixels(stored: Any) -> np.ndarray[Any, Any]:
    values = np.asarray(stored)
    return (values[..., 0] if values.ndim == 3 else values).astype(np.int64)


def _rows(objects: Any) -> list[Mapping[str, Any]]:
    if isinstance(objects, Mapping):
        count = max((len(value) for value in objects.values() if isinstance(value, list)), default=0)
        return [
            {k: v[i] for k, v in objects.items() if isinstance(v, list) and i < len(v)} for i in range(count)
        ]
    return [entry for entry in objects or [] if isinstance(entry, Mapping)]


def _first(entry: Mapping[str, Any], words: Sequence[str]) -> Any:
    return next((entry[word] for word in words if entry.get(word) is not None), None)


def _name(value: Any, names: Sequence[str]) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return names[value] if 0 <= value < len(names) else ""
    return value.strip() if isinstance(value, str) else ""
