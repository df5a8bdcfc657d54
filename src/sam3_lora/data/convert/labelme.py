"""Labelme: a JSON file for each image with its shapes, and often the image itself."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sam3_lora.data.convert import label_files
from sam3_lora.data.convert.items import Item, Size, Source, note_unlabelled
from sam3_lora.data.convert.objects import CocoObject, box_object, ellipse, flat_points, joined, mask_object
from sam3_lora.data.convert.pictures import FilePicture, Picture, StoredPicture
from sam3_lora.data.convert.report import BAD_SHAPE, NO_AREA, NO_CLASS, UNREADABLE, Report
from sam3_lora.data.convert.tree import Tree, split_of
from sam3_lora.errors import DataError

if TYPE_CHECKING:
    from typing import TypeGuard

_HEAD = 4096
_WITHOUT_AREA = ("point", "points", "line", "linestrip")


@dataclass(frozen=True)
class LabelmeLabels:
    """The shapes in the JSON file of an image."""

    shapes: Sequence[Any]
    place: str
    class_name: str | None = None

    @property
    def are_empty(self) -> bool:
        return not self.shapes

    def objects(self, size_hw: Size, report: Report) -> list[CocoObject]:
        document = {"shapes": self.shapes}
        return labelme_to_coco(document, size_hw, report, self.place, class_name=self.class_name)


def is_labelme(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("shapes"), list) and "imagePath" in value


def recognise(tree: Tree) -> str:
    """Return what shows that there are Labelme files, or ``""``."""
    for path in tree.with_suffix(".json"):
        if _looks_like_one(path, tree):
            return f"{tree.relative(path)} with 'shapes'"
    return ""


def plan(tree: Tree, report: Report, class_name: str | None = None) -> Source:
    """Return the image of each Labelme file below a folder."""
    items = []
    for path in tree.with_suffix(".json"):
        if not _looks_like_one(path, tree):
            continue
        try:
            document = label_files.read_json(path)
        except DataError as error:
            report.problem(UNREADABLE, str(error))
            continue
        if not is_labelme(document):
            report.problem(UNREADABLE, f"{path} is no Labelme file: it has no 'shapes' or no 'imagePath'")
            continue
        picture = _picture(document, path, tree, report)
        if picture is not None:
            split = split_of(tree.relative(path))
            if split is None and isinstance(picture, FilePicture):
                split = split_of(tree.relative(picture.path))
            items.append(
                Item(
                    picture,
                    LabelmeLabels(document["shapes"], str(path), class_name),
                    split,
                    _size_hw(document),
                )
            )
    note_unlabelled(tree.images, items, report)
    return Source(items)


def labelme_to_coco(
    document: Mapping[str, Any],
    size_hw: Size,
    report: Report | None = None,
    place: str = "the labels",
    *,
    class_name: str | None = None,
) -> list[CocoObject]:
    """Return the objects of one Labelme file; shapes with the same label and ``group_id`` are one object.

    Polygons stay polygons, rectangles and circles become polygons, and ``mask`` shapes run lengths.

    Args:
        class_name: The class of shapes without a label.

    Raises:
        DataError: If a shape cannot be used and no report takes the problems.
    """
    given, report = report, report or Report()
    groups: dict[Any, list[CocoObject]] = {}
    for number, shape in enumerate(document["shapes"], 1):
        where = f"{place}: shape {number}"
        if not isinstance(shape, dict):
            report.problem(BAD_SHAPE, f"{where} is {str(shape)[:40]!r}")
            continue
        label = shape.get("label") or class_name
        if not isinstance(label, (str, int)) or not str(label).strip():
            report.problem(NO_CLASS, where)
            continue
        found = _shape(shape, str(label), size_hw, report, f"{where} ({label!r})")
        group = shape.get("group_id")
        key = (label, group) if isinstance(group, (int, str)) else number
        if found is not None:
            groups.setdefault(key, []).append(found)
    if given is None:
        report.raise_problems(place)
    return [joined(shapes, size_hw) for shapes in groups.values()]


def _shape(
    shape: Mapping[str, Any], label: str, size_hw: Size, report: Report, where: str
) -> CocoObject | None:
    kind, points = shape.get("shape_type") or "polygon", shape.get("points")
    if kind in _WITHOUT_AREA:
        report.note(NO_AREA, f"{where} is a {kind}")
        return None
    if not _are_points(points):
        report.problem(BAD_SHAPE, f"{where} has points {str(points)[:40]}")
        return None
    if kind == "mask":
        return _mask(shape, label, size_hw, report, where)
    if kind == "circle" and len(points) == 2:
        (cx, cy), (x, y) = points
        radius = math.hypot(x - cx, y - cy)
        return CocoObject(label, [ellipse(cx, cy, radius, radius)])
    if kind == "rectangle" and len(points) == 2:
        (x0, y0), (x1, y1) = points
        return box_object(label, [min(x0, x1), min(y0, y1), abs(x1 - x0), abs(y1 - y0)])
    if kind in ("polygon", "rectangle", "oriented_rectangle", "quadrilateral"):
        return CocoObject(label, [flat_points(points)], is_box=kind != "polygon")
    report.problem(BAD_SHAPE, f"{where} is a {kind!r} of {len(points)} points")
    return None


def _mask(
    shape: Mapping[str, Any], label: str, size_hw: Size, report: Report, where: str
) -> CocoObject | None:
    """Return the object of a PNG, whose points are the first and the last pixel that it covers."""
    try:
        small = np.asarray(Image.open(io.BytesIO(_decoded(shape.get("mask")))).convert("L")) > 0
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, DataError) as error:
        report.problem(BAD_SHAPE, f"{where} has a mask that is no image: {error}")
        return None
    x, y = (round(min(point[axis] for point in shape["points"])) for axis in (0, 1))
    mask = _placed(small, x, y, size_hw)
    if mask is None:
        report.problem(BAD_SHAPE, f"{where} has a mask that leaves the image")
        return None
    return mask_object(label, mask)


def _placed(small: NDArray[np.bool_], x: int, y: int, size_hw: Size) -> NDArray[np.bool_] | None:
    height, width = small.shape
    if x < 0 or y < 0 or x + width > size_hw[1] or y + height > size_hw[0]:
        return None
    mask = np.zeros(size_hw, dtype=bool)
    mask[y : y + height, x : x + width] = small
    return mask


def _are_points(points: Any) -> TypeGuard[Sequence[tuple[float, float]]]:
    return isinstance(points, list) and bool(points) and all(map(_is_point, points))


def _is_point(point: Any) -> bool:
    try:
        return len(point) == 2 and all(isinstance(v, (int, float)) and math.isfinite(v) for v in point)
    except (TypeError, OverflowError):
        return False


def _looks_like_one(path: Path, tree: Tree) -> bool:
    """Whether it is a Labelme file, from its head where that shows it: most of such a file is the image."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return False
    if b'"shapes"' in head and b'"annotations"' not in head:
        return True
    return is_labelme(tree.json(path))


def _picture(document: Mapping[str, Any], path: Path, tree: Tree, report: Report) -> Picture | None:
    name, data = document.get("imagePath"), document.get("imageData")
    stored = isinstance(data, str) and bool(data)
    # Where the image is in the label file, that is the one that was labelled, but a file keeps its format.
    image = tree.find_image(name, path.parent, Report() if stored else report, f"{path}")
    if image is not None:
        return FilePicture(image)
    if not stored:
        return None
    suffix = Path(str(name).replace("\\", "/")).suffix or ".jpg"
    return StoredPicture(path.stem + suffix, f"{path} (imageData)", partial(_stored_image, path))


def _stored_image(path: Path) -> bytes:
    return _decoded(label_files.read_json(path)["imageData"])


def _decoded(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=False)
    except (binascii.Error, ValueError, TypeError) as error:
        raise DataError(f"not base64: {error}") from error


def _size_hw(document: Mapping[str, Any]) -> Size | None:
    height, width = document.get("imageHeight"), document.get("imageWidth")
    return (height, width) if type(height) is int and type(width) is int else None
