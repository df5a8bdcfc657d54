"""How well each single image of a split was found, for reports that show the best and the worst ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from sam3_lora.data.coco import compressed_run_lengths

Entry = Mapping[str, Any]  # an annotation or a result of COCO


class ObjectIou(NamedTuple):
    """The best IoU, 0 to 1, that a prediction of its category has with one object."""

    image_id: int
    category_id: int
    iou: float


def object_ious(
    document: Mapping[str, Any], results: Iterable[Entry], threshold: float = 0.5
) -> list[ObjectIou]:
    """Return for each object the best IoU of a prediction of its own category in its image, 0 where there is none.

    Several objects may share one prediction. Crowds are not objects.

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
    return [
        ObjectIou(*pair, iou)
        for pair, truth in objects.items()
        for iou in _best_ious(truth, found[pair], sizes[pair[0]])
    ]


def image_ious(
    document: Mapping[str, Any], results: Iterable[Entry], threshold: float = 0.5
) -> dict[int, float]:
    """Return for each image with objects the mean of :func:`object_ious`, in the order of the image ids.

    Predictions where nothing is lower no value: the number ranks images and does not replace AP.
    """
    best: dict[int, list[float]] = defaultdict(list)
    for image_id, _, iou in object_ious(document, results, threshold):
        best[image_id].append(iou)
    return {image_id: float(np.mean(best[image_id])) for image_id in sorted(best)}


def _best_ious(truth: list[Entry], found: list[Entry], size_hw: tuple[int, int]) -> list[float]:
    if not found:
        return [0.0] * len(truth)
    if all(entry.get("segmentation") for entry in truth + found):
        truth_shapes: Any = [compressed_run_lengths(entry["segmentation"], size_hw) for entry in truth]
        found_shapes: Any = [compressed_run_lengths(entry["segmentation"], size_hw) for entry in found]
    else:
        truth_shapes = np.array([entry["bbox"] for entry in truth], dtype=float)
        found_shapes = np.array([entry["bbox"] for entry in found], dtype=float)
    ious = coco_mask.iou(found_shapes, truth_shapes, [0] * len(truth))
    return [float(value) for value in np.asarray(ious).max(axis=0)]
