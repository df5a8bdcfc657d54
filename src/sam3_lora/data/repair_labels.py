"""Repair of one annotation: what is certain is put right, what is not makes it go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from sam3_lora.data import kinds
from sam3_lora.data.coco import compressed_run_lengths, mask_to_run_lengths
from sam3_lora.data.labels import SLACK, Edges, box_flaw, disagreement, polygon_flaw, segmentation_flaw

#: Called with what was done.
Say = Callable[[str], None]

#: How the four numbers of a box are to be read; ``None``: not known.
BoxForm = Literal["xywh", "xyxy", "shares xywh", "shares xyxy", "shares cxcywh"]

_LEAST_INSIDE = 0.5  # of a box without a mask, to be cut at the edges
_ROUNDING = 1e-3

Box = list[float]


def box_forms(boxes: Iterable[tuple[Box, tuple[int, int]]]) -> dict[bool, BoxForm | None]:
    """Return how the boxes of a file are meant: those in pixels by ``False``, those in shares of 1 by ``True``.

    Only what all boxes agree with counts: xyxy if each fits its image so and one leaves it as xywh.

    Args:
        boxes: Each with height and width of its image; those with other flaws may be among them.
    """
    pixels: dict[BoxForm, bool] = {"xywh": True, "xyxy": True}
    shares: dict[BoxForm, bool] = {"shares xywh": True, "shares xyxy": True, "shares cxcywh": True}
    for box, size_hw in boxes:
        flaw = box_flaw(box, size_hw)
        if flaw and flaw.kind == kinds.NORMALISED:
            known, size = shares, (1, 1)
        elif flaw is None or flaw.kind in (kinds.XYXY, kinds.BOX_OUTSIDE):
            known, size = pixels, size_hw
        else:
            continue
        for form in known:
            known[form] &= _fits(_edges(box, form), size)
    fitting = [form for form, fits in shares.items() if fits]
    of_pixels: BoxForm = "xyxy" if pixels["xyxy"] and not pixels["xywh"] else "xywh"
    return {False: of_pixels, True: fitting[0] if len(fitting) == 1 else None}


def repaired_labels(
    entry: Mapping[str, Any],
    size_hw: tuple[int, int],
    forms: Mapping[bool, BoxForm | None],
    masks: bool,
    say: Say,
) -> dict[str, Any] | None:
    """Return an annotation with box, mask, area and crowd flag that pass the check, or ``None`` if it must go.

    Args:
        entry: Of 'annotations'.
        size_hw: Of the image that the labels are for.
        forms: Of :func:`box_forms`.
        masks: Whether it needs a mask.
        say: Called with everything that is done, also with why it must go.
    """
    segmentation, edges = _repaired_mask(entry.get("segmentation"), size_hw, say)
    if masks and segmentation is None:
        say("annotation deleted: without a usable mask")
        return None
    box = _repaired_box(entry.get("bbox"), edges, size_hw, forms, say)
    if box is None:
        say("annotation deleted: without a usable box or mask")
        return None
    repaired = {**entry, "bbox": box, "iscrowd": _repaired_crowd(entry.get("iscrowd"), say)}
    if segmentation is None:
        repaired.pop("segmentation", None)
    else:
        repaired["segmentation"] = segmentation
    if not _is_area(entry.get("area")):
        repaired["area"] = _area(segmentation, box, size_hw)
        say("area worked out")
    return repaired


def scaled_labels(
    entry: Mapping[str, Any], from_hw: tuple[int, int], to_hw: tuple[int, int]
) -> dict[str, Any]:
    """Return a good annotation for its image in another size."""
    down, across = to_hw[0] / from_hw[0], to_hw[1] / from_hw[1]
    segmentation = entry.get("segmentation")
    if isinstance(segmentation, list):
        segmentation = [
            [value * (down if place % 2 else across) for place, value in enumerate(part)]
            for part in segmentation
        ]
    elif segmentation is not None:
        mask = coco_mask.decode(compressed_run_lengths(segmentation, from_hw))
        resized = Image.fromarray(mask).resize(to_hw[::-1], Image.Resampling.NEAREST)
        segmentation = mask_to_run_lengths(np.asarray(resized) > 0)
    x, y, width, height = entry["bbox"]
    scaled = {
        **entry,
        "bbox": [x * across, y * down, width * across, height * down],
        "area": entry["area"] * across * down,
    }
    return scaled if segmentation is None else {**scaled, "segmentation": segmentation}


def _repaired_mask(segmentation: Any, size_hw: tuple[int, int], say: Say) -> tuple[Any, Edges | None]:
    """Return a good mask with its edges, or ``None`` twice."""
    if segmentation is None or segmentation == []:
        return None, None
    if isinstance(segmentation, list):
        parts = [part for part in segmentation if polygon_flaw(part) is None]
        if parts and len(parts) < len(segmentation):
            say("polygons of a mask deleted: too few points, odd length, NaN or no numbers")
        segmentation = parts
    flaw, edges = segmentation_flaw(segmentation, size_hw)
    height, width = size_hw
    if flaw and flaw.kind == kinds.NORMALISED:
        say("mask scaled from shares of 1 to pixels")
        segmentation = [
            [value * (height if place % 2 else width) for place, value in enumerate(part)]
            for part in segmentation
        ]
    elif flaw and flaw.kind == kinds.POLYGON_OUTSIDE:
        say("mask cut at the edges of the image")
        segmentation = [
            [min(max(value, 0), height if place % 2 else width) for place, value in enumerate(part)]
            for part in segmentation
        ]
    elif flaw:
        return None, None
    flaw, edges = segmentation_flaw(segmentation, size_hw)
    return (None, None) if flaw else (segmentation, edges)


def _repaired_box(
    box: Any, edges: Edges | None, size_hw: tuple[int, int], forms: Mapping[bool, BoxForm | None], say: Say
) -> Box | None:
    flaw = kinds.FIELD["bbox"] if box is None else None
    if box is not None and (found := box_flaw(box, size_hw) or (disagreement(box, edges) if edges else None)):
        flaw = found.kind
    if edges is not None and flaw is not None:
        say(f"bbox made from the mask: {flaw.name}")
        return _as_xywh(_cut(edges, size_hw))
    form = None if flaw not in _READABLE else forms[flaw == kinds.NORMALISED]
    if flaw is None and forms[False] == "xyxy" and edges is None:
        form = "xyxy"
    if flaw is None and form is None:
        return list(box)
    if form is None:
        return None
    if form != "xywh":
        say(f"bbox turned from {form} to xywh in pixels")
    wanted = _edges(box, form)
    if form.startswith("shares"):
        height, width = size_hw
        wanted = (wanted[0] * width, wanted[1] * height, wanted[2] * width, wanted[3] * height)
    return _inside(wanted, size_hw, say)


_READABLE = (kinds.NORMALISED, kinds.XYXY, kinds.BOX_OUTSIDE)


def _inside(edges: Edges, size_hw: tuple[int, int], say: Say) -> Box | None:
    if _fits(edges, size_hw):
        return _as_xywh(edges)
    cut = _cut(edges, size_hw)
    if _size(cut) < _LEAST_INSIDE * _size(edges):
        return None
    say("bbox cut at the edges of the image")
    return _as_xywh(cut)


def _edges(box: Sequence[float], form: BoxForm) -> Edges:
    x, y, third, fourth = box
    if form.endswith("xyxy"):
        return x, y, third, fourth
    if form.endswith("cxcywh"):
        return x - third / 2, y - fourth / 2, x + third / 2, y + fourth / 2
    return x, y, x + third, y + fourth


def _fits(edges: Edges, size_hw: tuple[int, int]) -> bool:
    slack = SLACK if max(size_hw) > 1 else _ROUNDING
    x0, y0, x1, y1 = edges
    inside = min(x0, y0) >= -slack and x1 <= size_hw[1] + slack and y1 <= size_hw[0] + slack
    return inside and x1 > x0 and y1 > y0


def _cut(edges: Edges, size_hw: tuple[int, int]) -> Edges:
    height, width = size_hw
    return max(edges[0], 0), max(edges[1], 0), min(edges[2], width), min(edges[3], height)


def _as_xywh(edges: Edges) -> Box | None:
    x0, y0, x1, y1 = edges
    return [x0, y0, x1 - x0, y1 - y0] if x1 > x0 and y1 > y0 else None


def _size(edges: Edges) -> float:
    return max(0.0, edges[2] - edges[0]) * max(0.0, edges[3] - edges[1])


def _repaired_crowd(crowd: Any, say: Say) -> int:
    if type(crowd) in (int, float, bool) and crowd in (0, 1):
        return int(crowd)
    say("iscrowd added" if crowd is None else "iscrowd corrected")
    return int(str(crowd).strip().lower() in ("1", "true", "yes"))


def _is_area(area: Any) -> bool:
    return type(area) in (int, float) and 0 <= area < float("inf")


def _area(segmentation: Any, box: Box, size_hw: tuple[int, int]) -> float:
    if segmentation is None:
        return box[2] * box[3]
    return float(coco_mask.area(compressed_run_lengths(segmentation, size_hw)))
