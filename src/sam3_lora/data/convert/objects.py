"""One object as every format is turned into it, and the COCO annotation that it becomes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from sam3_lora.data.coco import RunLengths, mask_to_run_lengths
from sam3_lora.data.convert.report import BAD_SHAPE, BOX_MASK, CUT, NO_PIXEL, OUTSIDE, Report
from sam3_lora.data.labels import run_lengths

_DIGITS = 6  # of a pixel: what a product of shares and sizes has, without the noise of floats


@dataclass(frozen=True)
class CocoObject:
    """What a COCO annotation says about one object, before it has ids.

    ``segmentation`` is polygons ``[[x1, y1, ...], ...]`` in pixels, whose union is the object, or run lengths.
    """

    category: str
    segmentation: Sequence[Sequence[float]] | RunLengths
    iscrowd: int = 0
    is_box: bool = False


def box_object(category: str, box_xywh: Sequence[float], iscrowd: int = 0) -> CocoObject:
    """Return the object of which only the box is known: its mask is the rectangle."""
    x, y, width, height = box_xywh
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    return CocoObject(category, [corners], iscrowd, is_box=True)


def mask_object(category: str, mask: NDArray[np.bool_]) -> CocoObject:
    """Return the object of a mask ``(H, W)`` of the image's size, holes and parts included."""
    return CocoObject(category, mask_to_run_lengths(mask))


def ellipse(cx: float, cy: float, rx: float, ry: float, angle: float = 0.0) -> list[float]:
    """Return an ellipse as a polygon that is nowhere more than a twentieth of a pixel inside of it.

    Args:
        angle: From the x axis to ``rx``, in radians, clockwise as y points down.
    """
    radius = max(abs(rx), abs(ry), 0.1)
    corners = min(720, max(16, math.ceil(math.pi / math.acos(max(0.0, 1 - 0.05 / radius)))))
    turns = np.arange(corners) * (2 * math.pi / corners)
    x, y = rx * np.cos(turns), ry * np.sin(turns)
    points = np.stack(
        [cx + x * math.cos(angle) - y * math.sin(angle), cy + x * math.sin(angle) + y * math.cos(angle)],
        axis=1,
    )
    return [float(value) for value in points.ravel()]


def joined(objects: Sequence[CocoObject], size_hw: tuple[int, int]) -> CocoObject:
    """Return several shapes of one object as one: polygons as its parts, else run lengths of the union."""
    if len(objects) == 1:
        return objects[0]
    parts = [o.segmentation for o in objects if not isinstance(o.segmentation, dict)]
    is_box = all(o.is_box for o in objects)
    if len(parts) == len(objects):
        return CocoObject(objects[0].category, [p for part in parts for p in part], is_box=is_box)
    bad = next((o for o in objects if _problem(o.segmentation, size_hw)), None)
    if bad:
        return bad  # to be reported by to_annotation
    union = coco_mask.merge([_encoded(o.segmentation, size_hw) for o in objects])
    return CocoObject(objects[0].category, _as_text(union))


def to_annotation(
    item: CocoObject, size_hw: tuple[int, int], report: Report, place: str, box_masks: bool = True
) -> dict[str, Any] | None:
    """Return segmentation, area, bbox and iscrowd of the object's mask; None if there is nothing to write.

    What is wrong with it goes to the report, with its place. ``box_masks``: whether a box gets its rectangle as mask.
    """
    segmentation: Any = item.segmentation
    if isinstance(segmentation, dict):
        if problem := run_lengths_problem(segmentation, size_hw):
            report.problem(BAD_SHAPE, f"{place} {problem}")
            return None
        encoded = _encoded(segmentation, size_hw)
        segmentation = _as_text(encoded)
    else:
        if problem := _polygons_problem(segmentation):
            report.problem(BAD_SHAPE, f"{place} {problem}")
            return None
        leaves = _farthest_outside(segmentation, size_hw)
        if leaves > 1:
            report.problem(OUTSIDE, f"{place} leaves the image, which is {size_hw[1]} x {size_hw[0]}")
            return None
        segmentation = [[round(float(v), _DIGITS) for v in part] for part in segmentation]
        encoded = _encoded(segmentation, size_hw)
        if leaves > 0:
            report.note(CUT, place)
            segmentation = _as_text(encoded)
    area = float(coco_mask.area(encoded))
    if not area:
        report.note(NO_PIXEL, place)
        return None
    box = [float(v) for v in coco_mask.toBbox(encoded)]
    if item.is_box and not box_masks:
        return {"bbox": box, "area": area, "iscrowd": item.iscrowd}
    if item.is_box:
        report.note(BOX_MASK, place)
    return {"bbox": box, "area": area, "iscrowd": item.iscrowd, "segmentation": segmentation}


def as_run_lengths(value: Mapping[str, Any]) -> RunLengths:
    """Return run lengths as a file has them; :func:`to_annotation` judges them."""
    return {"size": value.get("size", []), "counts": value.get("counts", "")}


def run_lengths_problem(value: Any, size_hw: tuple[int, int]) -> str:
    """Return what is wrong with run lengths for an image of this size, or ``""``. They must fill it exactly: pycocotools
    does not look, and reads and writes beyond the end."""
    size, counts = value.get("size"), value.get("counts")
    if not isinstance(size, (list, tuple)) or list(size) != list(size_hw):
        return f"has run lengths of size {size!r:.40}; the image needs {list(size_hw)} (height, width)"
    lengths = run_lengths(counts) if isinstance(counts, (str, list)) and counts else None
    if lengths is None:
        return f"has run lengths that are none: {counts!r:.40}"
    if lengths.sum() != math.prod(size_hw):
        return f"has run lengths of {lengths.sum()} pixels; the image has {math.prod(size_hw)}"
    return ""


def flat_points(points: Iterable[Iterable[Any]]) -> list[float]:
    """Return ``[[x, y], ...]`` as ``[x, y, ...]``."""
    return [value for point in points for value in point]


def _problem(segmentation: Any, size_hw: tuple[int, int]) -> str:
    if isinstance(segmentation, dict):
        return run_lengths_problem(segmentation, size_hw)
    return _polygons_problem(segmentation)


def _polygons_problem(polygons: Any) -> str:
    if not polygons:
        return "has no polygon"
    for polygon in polygons:
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in polygon):
            return "has a polygon with something else than numbers"
        if len(polygon) < 6:
            return f"has a polygon of {len(polygon) // 2} points; it needs three"
        if len(polygon) % 2:
            return f"has a polygon of {len(polygon)} numbers, which is odd"
        try:
            finite = all(map(math.isfinite, polygon))
        except OverflowError:
            finite = False
        if not finite:
            return "has a NaN or infinite number"
    return ""


def _farthest_outside(polygons: Sequence[Sequence[float]], size_hw: tuple[int, int]) -> float:
    """Return how far the polygons leave the image, as a share of its size; 0 if they do not."""
    height, width = size_hw
    xs = [x for part in polygons for x in part[0::2]]
    ys = [y for part in polygons for y in part[1::2]]
    # A hundredth of a pixel is rounding.
    over = max(max(-min(xs), max(xs) - width) / width, max(-min(ys), max(ys) - height) / height)
    return over if over * max(size_hw) > 0.01 else 0.0


def _encoded(segmentation: Any, size_hw: tuple[int, int]) -> Any:
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            return coco_mask.frPyObjects(segmentation, *size_hw)
        return {"size": list(size_hw), "counts": segmentation["counts"]}
    encoded = coco_mask.frPyObjects([list(map(float, part)) for part in segmentation], *size_hw)
    return encoded[0] if len(encoded) == 1 else coco_mask.merge(encoded)


def _as_text(encoded: Any) -> RunLengths:
    counts = encoded["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(side) for side in encoded["size"]], "counts": text}
