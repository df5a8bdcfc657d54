"""How well each single image of a split was found, for reports that show the best and the worst ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

Entry = Mapping[str, Any]  # an annotation or a result of COCO


def image_ious(
    document: Mapping[str, Any], results: Iterable[Entry], threshold: float = 0.5
) -> dict[int, float]:
    """Return for each image with objects the mean, over its objects, of the best IoU that any prediction has with it.

    A prediction counts for the objects of its own category. An object without any counts 0. Predictions where
    nothing is lower no value, and several objects may share one prediction: the number ranks images and does not
    replace AP. Crowds are not objects.

    Args:
        document: COCO ground truth.
        results: COCO results. Masks are compared where both sides have them, else boxes.
        threshold: Results that score less do not count.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in document["images"]}
    found: dict[tuple[int, int], list[Entry]] = defaultdict(list)
    for result in results:
        if result["score"] >= threshold:
            found[result["image_id"], result["category_id"]].append(result)
    objects: dict[tuple[int, int], list[Entry]] = defaultdict(list)
    for annotation in document["annotations"]:
        if not annotation.get("iscrowd", 0):
            objects[annotation["image_id"], annotation["category_id"]].append(annotation)
    best: dict[int, list[float]] = defaultdict(list)
    for (image_id, category_id), truth in objects.items():
        best[image_id] += _best_ious(truth, found[image_id, category_id], sizes[image_id])
    return {image_id: float(np.mean(best[image_id])) for image_id in sorted(best)}


def _best_ious(truth: list[Entry], found: list[Entry], size_hw: tuple[int, int]) -> list[float]:
    if not found:
        return [0.0] * len(truth)
    if all(entry.get("segmentation") for entry in truth + found):
        truth_shapes: Any = [_run_lengths(entry["segmentation"], size_hw) for entry in truth]
        found_shapes: Any = [_run_lengths(entry["segmentation"], size_hw) for entry in found]
    else:
        truth_shapes = np.array([entry["bbox"] for entry in truth], dtype=float)
        found_shapes = np.array([entry["bbox"] for entry in found], dtype=float)
    ious = coco_mask.iou(found_shapes, truth_shapes, [0] * len(truth))
    return [float(value) for value in np.asarray(ious).max(axis=0)]


def _run_lengths(segmentation: Any, size_hw: tuple[int, int]) -> Any:
    """Return polygons or run lengths of either kind as compressed run lengths."""
    if isinstance(segmentation, Mapping):
        rle = dict(segmentation)
        return coco_mask.frPyObjects(rle, *rle["size"]) if isinstance(rle["counts"], list) else rle
    return coco_mask.merge(coco_mask.frPyObjects([list(part) for part in segmentation], *size_hw))
