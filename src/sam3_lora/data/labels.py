"""What is wrong with a box or a mask, found without drawing it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from sam3_lora.data import kinds
from sam3_lora.data.problems import Kind

#: Pixels that a box or polygon may leave the image by. Exports round, and the loader clips what is over.
SLACK = 2.0

_NUMBERS = frozenset({int, float})  # not bool
_LEAST_OVERLAP = 0.5  # of box and mask; exports that round, and boxes drawn by hand, stay above

Edges = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


class Flaw(NamedTuple):
    """A problem of a label, and what to say of it."""

    kind: Kind
    text: str


def box_flaw(box_xywh: object, size_hw: tuple[int, int]) -> Flaw | None:
    """Return what is wrong with a COCO box in an image of this size."""
    if not isinstance(box_xywh, list) or len(box_xywh) != 4 or not _NUMBERS.issuperset(map(type, box_xywh)):
        return Flaw(kinds.BOX, "is not four numbers [x, y, width, height]")
    if not _is_finite(box_xywh):
        return Flaw(kinds.BOX_NAN, "has a NaN or infinite number")
    x, y, box_width, box_height = box_xywh
    if box_width <= 0 or box_height <= 0:
        return Flaw(kinds.FLAT_BOX, f"has width {box_width:g} and height {box_height:g}")
    height, width = size_hw
    if max(box_xywh) <= 1 and min(size_hw) > 2:
        return Flaw(kinds.NORMALISED, f"lies between 0 and 1, in an image of {width} x {height} pixels")
    if x >= -SLACK and y >= -SLACK and x + box_width <= width + SLACK and y + box_height <= height + SLACK:
        return None
    leaves = f"leaves the image, which is {width} x {height}"
    if 0 <= x < box_width <= width + SLACK and 0 <= y < box_height <= height + SLACK:
        return Flaw(kinds.XYXY, f"{leaves}; as x1, y1, x2, y2 it fits")
    return Flaw(kinds.BOX_OUTSIDE, leaves)


def segmentation_flaw(segmentation: object, size_hw: tuple[int, int]) -> tuple[Flaw | None, Edges | None]:
    """Return what is wrong with polygons or run lengths for an image of this size, or the edges of a good mask."""
    if isinstance(segmentation, dict):
        flaw = _run_lengths_flaw(segmentation, size_hw)
        edges = None if flaw else _run_lengths_edges(segmentation, size_hw)
    elif isinstance(segmentation, list) and segmentation:
        flaw, edges = _polygons_flaw(segmentation, size_hw)
    else:
        said = "is empty" if segmentation == [] else f"is {segmentation!r:.40}, neither polygons nor RLE"
        return Flaw(kinds.SEGMENTATION, said), None
    if edges and not (edges[2] > edges[0] and edges[3] > edges[1]):
        return Flaw(kinds.EMPTY_MASK, "covers no pixel"), None
    return flaw, None if flaw else edges


def disagreement(box_xywh: Sequence[float], edges: Edges) -> Flaw | None:
    """Return what is wrong if a good box and the edges of a good mask are not of one object."""
    x, y, width, height = box_xywh
    if _overlap((x, y, x + width, y + height), edges) >= _LEAST_OVERLAP:
        return None
    shown = ", ".join(f"{value:g}" for value in (*edges[:2], edges[2] - edges[0], edges[3] - edges[1]))
    if _overlap((x, y, width, height), edges) >= _LEAST_OVERLAP:
        return Flaw(kinds.XYXY, f"is of a mask in [{shown}]; as x1, y1, x2, y2 it fits")
    far = max(abs(a - b) for a, b in zip((x, y, x + width, y + height), edges, strict=True))
    return Flaw(kinds.DISAGREE, f"is of a mask in [{shown}]") if far > 2 * SLACK else None


def run_lengths(counts: str | Sequence[int]) -> NDArray[np.int64] | None:
    """Return the run lengths behind the ``counts`` of RLE, compressed or not; ``None`` if they are none."""
    if not isinstance(counts, str):
        if not all(type(count) is int and 0 <= count < 2**48 for count in counts):
            return None
        return np.array(counts, dtype=np.int64)
    # As pycocotools' rleFrString: six bits a character, 5 of the number and one that says that it goes on.
    codes = np.frombuffer(counts.encode("latin-1", "replace"), dtype=np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    last = np.flatnonzero(~codes & 32)
    first = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(len(codes)) - np.repeat(first, last - first + 1)
    if place.max() > 9:
        return None
    numbers = np.add.reduceat((codes & 31) << (5 * place), first)
    numbers -= np.where(codes[last] & 16, np.int64(1) << (5 * (place[last] + 1)), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])  # each after the third is told from the one before the last
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers if (numbers >= 0).all() else None


def _polygons_flaw(polygons: Sequence[object], size_hw: tuple[int, int]) -> tuple[Flaw | None, Edges | None]:
    x0 = y0 = math.inf
    x1 = y1 = -math.inf
    for polygon in polygons:
        if flaw := polygon_flaw(polygon):
            return flaw, None
        xs, ys = polygon[0::2], polygon[1::2]  # type: ignore[index]
        x0, y0, x1, y1 = min(x0, *xs), min(y0, *ys), max(x1, *xs), max(y1, *ys)
    height, width = size_hw
    edges = (x0, y0, x1, y1)
    if max(edges) <= 1 and x0 >= 0 and y0 >= 0 and min(size_hw) > 2 and (x1 > x0 and y1 > y0):
        return Flaw(
            kinds.NORMALISED, f"lies between 0 and 1, in an image of {width} x {height} pixels"
        ), edges
    if min(x0, y0) < -SLACK or x1 > width + SLACK or y1 > height + SLACK:
        return Flaw(kinds.POLYGON_OUTSIDE, f"leaves the image, which is {width} x {height}"), edges
    return None, edges


def polygon_flaw(polygon: object) -> Flaw | None:
    """Return what is wrong with a polygon, wherever it lies."""
    if not isinstance(polygon, list):
        return Flaw(kinds.SEGMENTATION, "is not a list of polygons, each a list [x1, y1, x2, y2, ...]")
    if not _NUMBERS.issuperset(map(type, polygon)):
        return Flaw(kinds.SEGMENTATION, "has a polygon with something else than numbers")
    if len(polygon) < 6:  # pycocotools takes a list of four for a box
        return Flaw(kinds.FEW_POINTS, f"has a polygon of {len(polygon)} numbers; three points need 6")
    if len(polygon) % 2:
        return Flaw(kinds.ODD_POLYGON, f"has a polygon of {len(polygon)} numbers, which is odd")
    return None if _is_finite(polygon) else Flaw(kinds.POLYGON_NAN, "has a NaN or infinite number")


def _run_lengths_flaw(rle: Mapping[str, Any], size_hw: tuple[int, int]) -> Flaw | None:
    size, counts = rle.get("size"), rle.get("counts")
    if size != list(size_hw):
        return Flaw(
            kinds.RLE_SIZE,
            f"has run lengths of size {size!r:.40}; the image needs {list(size_hw)} (height, width)",
        )
    if not isinstance(counts, (str, list)) or not counts:
        return Flaw(kinds.RLE_COUNTS, f"has run lengths with counts {counts!r:.40}")
    lengths = run_lengths(counts)
    if lengths is None:
        return Flaw(kinds.RLE_COUNTS, f"has run lengths with counts that are none: {counts!r:.40}")
    if lengths.sum() != math.prod(size_hw):
        return Flaw(
            kinds.RLE_COUNTS,
            f"has run lengths that do not fill the image: {lengths.sum()} of {math.prod(size_hw)} pixels",
        )
    return None


def _run_lengths_edges(rle: Mapping[str, Any], size_hw: tuple[int, int]) -> Edges:
    compressed = coco_mask.frPyObjects(dict(rle), *size_hw) if isinstance(rle["counts"], list) else rle
    x, y, width, height = coco_mask.toBbox(compressed).tolist()
    return x, y, x + width, y + height


def _overlap(a: Edges, b: Edges) -> float:
    """Return intersection over union."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)]
    return width * height / (sum(areas) - width * height)


def _is_finite(numbers: Sequence[float]) -> bool:
    try:
        return math.isfinite(sum(numbers)) or all(map(math.isfinite, numbers))
    except OverflowError:  # a whole number that no float can hold
        return False
