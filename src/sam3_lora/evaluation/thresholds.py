"""From which score on an object is reported, by class: where F1 on a split is best."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import COCOeval

from sam3_lora.evaluation.batches import silence
from sam3_lora.evaluation.scores import CocoResult, IouType, read_truth

_IOU = 0.5
_FEWEST_OBJECTS = 5  # fewer say too little about where to cut


@dataclass(frozen=True)
class Threshold:
    """Where to cut the scores of one class, and what the cut gives on the split it was chosen on.

    Attributes:
        threshold: Objects that score this or less are left out.
        f1: At this threshold, 0 to 1; an object is found by a mask, or box, of IoU 0.5 or more.
        f1_at_half: The same at 0.5.
        objects: Of the class in the split.
    """

    threshold: float
    f1: float
    f1_at_half: float
    objects: int


def best_thresholds(
    annotation_file: Path, predictions: Iterable[CocoResult], iou_type: IouType = "segm"
) -> dict[str, Threshold]:
    """Return the best threshold of each class by prompt, for those with five objects or more.

    It lies half way between the last score that is taken and the first that is not. Where several do equally well it is
    the one nearest to 0.5.

    Args:
        annotation_file: COCO JSON; its images hold each class or not, so that false alarms in images without it count.
        predictions: COCO results with all scores, also those below 0.5.
        iou_type: What is compared.

    Raises:
        DataError: If the split has no object.
    """
    truth = read_truth(annotation_file)
    with silence():
        evaluation = COCOeval(truth, truth.loadRes([dict(result) for result in predictions]), iou_type)
        evaluation.params.iouThrs = np.array([_IOU])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
    images = len(evaluation.params.imgIds)
    found: dict[str, Threshold] = {}
    for place, category in enumerate(evaluation.params.catIds):
        compared = [c for c in evaluation.evalImgs[place * images : (place + 1) * images] if c is not None]
        objects = sum(int((np.asarray(c["gtIgnore"]) == 0).sum()) for c in compared)
        if objects >= _FEWEST_OBJECTS:
            found[truth.cats[category]["name"]] = _best(*_scored(compared), objects)
    return found


def _scored(compared: list[dict[str, NDArray[np.float64]]]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return scores from high to low, and which of them found an object; those of crowds are left out."""
    scores = np.concatenate([np.asarray(c["dtScores"], dtype=float) for c in compared])
    hits = np.concatenate([np.asarray(c["dtMatches"][0]) > 0 for c in compared])
    counted = np.concatenate([~np.asarray(c["dtIgnore"][0], dtype=bool) for c in compared])
    order = np.argsort(-scores[counted], kind="stable")
    return scores[counted][order], hits[counted][order]


def _best(scores: NDArray[np.float64], hits: NDArray[np.bool_], objects: int) -> Threshold:
    f1 = np.concatenate([[0.0], 2 * np.cumsum(hits) / (np.arange(1, len(scores) + 1) + objects)])
    cuts = _cuts(scores)
    at_half = float(f1[int((scores > 0.5).sum())])
    # A cut between equal scores is no cut.
    possible = np.concatenate([[True], np.append(scores[1:] < scores[:-1], True)]) if len(scores) else [True]
    best = np.max(np.where(possible, f1, -1.0))
    if np.isclose(best, at_half):
        return Threshold(0.5, at_half, at_half, objects)
    chosen = min(np.flatnonzero(np.isclose(f1, best) & possible), key=lambda taken: abs(cuts[taken] - 0.5))
    return Threshold(round(float(cuts[chosen]), 4), float(best), at_half, objects)


def _cuts(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return for each number of scores that are taken the threshold that takes them."""
    edges = np.concatenate([[1.0], scores, [0.0]])
    return (edges[:-1] + edges[1:]) / 2
