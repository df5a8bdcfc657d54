"""From predictions to numbers: COCO AP, mean IoU and SAM3's cgF1, of a whole split and of each class."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam3_lora.errors import DataError
from sam3_lora.evaluation.batches import silence
from sam3_lora.evaluation.images import object_ious

# The module behind this one announces on stdout that the optional TIDE is not installed.
with silence():
    from sam3.eval.cgf1_eval import CGF1_METRICS, CGF1Evaluator

#: One prediction as pycocotools reads it: ``image_id``, ``category_id``, ``score`` 0..1, ``bbox`` xywh in pixels of
#: the original image, ``segmentation`` as compressed RLE of its size.
CocoResult = dict[str, Any]
IouType = Literal["bbox", "segm"]
IOU_TYPES: tuple[IouType, IouType] = ("bbox", "segm")

#: Those of :class:`Scores` that the official trainer's validation gives as well.
AP_METRICS = ("bbox_AP50", "segm_AP50", "bbox_AP", "segm_AP")
#: Those that say most about a single class.
CLASS_METRICS = ("bbox_AP50", "segm_AP50", "segm_AP", "mean_IoU", "cgF1")

_CONFIDENT = (
    0.5  # from this score on a prediction counts for cgF1 (CGF1Eval's threshold) and for the mean IoU
)


@dataclass(frozen=True)
class Scores:
    """What a model reaches on a split or on one class of it, each 0 to 1 (``IL_MCC`` and ``cgF1`` from -1).

    All are ``None`` for a class without objects, where none of them is defined.

    Attributes:
        bbox_AP50: Average precision of the boxes at IoU 0.50. ``bbox_AP75``: at 0.75. ``bbox_AP``: over 0.50 to 0.95.
        segm_AP50: The same three of the masks.
        mean_IoU: For each object the best IoU of its mask with a prediction of its class that scores 0.5 or more,
            0 where there is none; the mean over all objects, crowds left out.
        cgF1: SAM3's own metric, of the masks: ``IL_MCC`` times ``positive_micro_F1``.
        IL_MCC: Whether presence of a class in an image is told from absence; 0 where it is in every image.
        positive_micro_F1: F1 of the masks in the images that hold the class, over IoU 0.50 to 0.95.
    """

    bbox_AP50: float | None = None
    segm_AP50: float | None = None
    bbox_AP: float | None = None
    segm_AP: float | None = None
    bbox_AP75: float | None = None
    segm_AP75: float | None = None
    mean_IoU: float | None = None
    cgF1: float | None = None
    IL_MCC: float | None = None
    positive_micro_F1: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """Return the numbers by the names that ``metrics.json`` has for them."""
        return dataclasses.asdict(self)

    def defined(self) -> dict[str, float]:
        """Return the numbers that are there, by the same names."""
        return {name: value for name, value in self.as_dict().items() if value is not None}


@dataclass(frozen=True)
class ModelEvaluation:
    """Scores of one model on the whole split and by prompt, and the predictions behind them."""

    overall: Scores
    per_class: Mapping[str, Scores]
    predictions: Sequence[CocoResult] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers under the names of ``metrics.json``, those of each class in ``per_class``."""
        per_class = {prompt: scores.as_dict() for prompt, scores in self.per_class.items()}
        return {**self.overall.as_dict(), "per_class": per_class}


def read_truth(annotation_file: Path) -> COCO:
    """Return a COCO file as pycocotools holds it.

    Raises:
        DataError: If it has no object, so that AP is undefined.
    """
    with silence():
        truth = COCO(str(annotation_file))
    if all(annotation.get("iscrowd", 0) for annotation in truth.anns.values()):
        raise DataError(
            f"{str(annotation_file)!r} has no object to measure against (crowds do not count), so AP is undefined; "
            "evaluate on a split with annotations"
        )
    return truth


def score_predictions(annotation_file: Path, predictions: Sequence[CocoResult]) -> ModelEvaluation:
    """Return the scores of a split, and of each of its classes by prompt, in the order of the category ids.

    Raises:
        DataError: If the split has no object.
    """
    truth = read_truth(annotation_file)
    names = {key: truth.cats[key]["name"] for key in sorted(truth.cats)}
    columns: dict[str, _Column] = {}
    for iou_type in IOU_TYPES:
        columns |= _average_precision(coco_eval(truth, predictions, iou_type), iou_type)
    columns["mean_IoU"] = _mean_iou(truth, predictions)
    split, classes = _cgf1_of_all_and_each(annotation_file, predictions, "segm")
    for name in ("cgF1", "IL_MCC", "positive_micro_F1"):
        columns[name] = _Column(split[name], {key: values[name] for key, values in classes.items()})
    with_objects = {a["category_id"] for a in truth.anns.values() if not a.get("iscrowd", 0)}
    overall = Scores(**{name: column.split for name, column in columns.items()})
    per_class = {
        name: Scores(**{key: column.classes[category] for key, column in columns.items()})
        if category in with_objects
        else Scores()
        for category, name in names.items()
    }
    return ModelEvaluation(overall, per_class, predictions)


def coco_eval(truth: COCO, predictions: Iterable[CocoResult], iou_type: IouType) -> COCOeval:
    """Return pycocotools' evaluation of the predictions, run to its end."""
    with silence():
        # Copies, because loadRes writes into what it gets.
        evaluation = COCOeval(truth, truth.loadRes([dict(result) for result in predictions]), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def ap50_of_draws(
    annotation_file: Path, predictions: Iterable[CocoResult], iou_type: IouType = "segm"
) -> tuple[int, Callable[[NDArray[np.intp]], float]]:
    """Return the number of images, and a function that gives the AP50 of a draw of them.

    The function takes ``(images,)`` places, some more than once, and gives 0 to 1; objects and predictions are compared
    only once, before.
    """
    truth = read_truth(annotation_file)
    with silence():
        evaluation = COCOeval(truth, truth.loadRes([dict(result) for result in predictions]), iou_type)
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
    images, classes = len(evaluation.params.imgIds), len(evaluation.params.catIds)
    compared = np.empty(classes * images, dtype=object)
    compared[:] = evaluation.evalImgs

    def ap50(places: NDArray[np.intp]) -> float:
        evaluation.evalImgs = compared.reshape(classes, images)[:, places].ravel().tolist()
        with silence():
            evaluation.accumulate()
        precision = evaluation.eval["precision"][0, :, :, 0, -1]  # of recall and class
        known = precision[precision > -1]
        return float(known.mean()) if known.size else 0.0

    return images, ap50


def cgf1(
    annotation_file: Path, predictions: Iterable[Mapping[str, Any]], iou_type: IouType = "segm"
) -> dict[str, float]:
    """Return SAM3's own metric cgF1 and its parts, by the official evaluator, for an ordinary COCO file.

    The evaluator wants one "image" for each (image, noun phrase) pair: each (image, category) becomes one. Keys are
    the official names, such as ``cgF1``, ``IL_MCC``, ``positive_micro_F1`` and ``cgF1@0.5``; -1 stands for a part that
    is 0/0. ``cgF1`` is a product with ``IL_MCC``, which measures whether presence is told from absence: both are 0,
    however good the masks, where every category is in every image.

    Args:
        annotation_file: COCO JSON.
        predictions: COCO results; those that score less than 0.5 do not count.
        iou_type: What is compared, masks or boxes.
    """
    return _cgf1_of_all_and_each(annotation_file, predictions, iou_type)[0]


@dataclass(frozen=True)
class _Column:
    """One metric: of the split, and by category id."""

    split: float
    classes: Mapping[int, float]


def _average_precision(evaluation: COCOeval, iou_type: str) -> dict[str, _Column]:
    """Return AP over IoU 0.50 to 0.95, AP at 0.50 and AP at 0.75."""
    precision = evaluation.eval["precision"][
        ..., 0, -1
    ]  # IoU, recall, class; of all sizes, of the most predictions
    thresholds = evaluation.params.iouThrs
    chosen = {"AP": thresholds > 0, "AP50": np.isclose(thresholds, 0.5), "AP75": np.isclose(thresholds, 0.75)}
    return {
        f"{iou_type}_{name}": _Column(
            float(overall),
            {
                category: float(precision[at, :, place].mean())
                for place, category in enumerate(evaluation.params.catIds)
            },
        )
        for (name, at), overall in zip(chosen.items(), evaluation.stats[:3], strict=True)
    }


def _mean_iou(truth: COCO, predictions: Iterable[CocoResult]) -> _Column:
    best: dict[int, list[float]] = defaultdict(list)
    for _, category_id, iou in object_ious(truth.dataset, predictions, _CONFIDENT):
        best[category_id].append(iou)
    return _Column(
        float(np.mean([iou for values in best.values() for iou in values])),
        {category: float(np.mean(values)) for category, values in best.items()},
    )


def _cgf1_of_all_and_each(
    annotation_file: Path, predictions: Iterable[Mapping[str, Any]], iou_type: IouType
) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """Return the official numbers of the split, and by category id."""
    document = json.loads(annotation_file.read_text(encoding="utf-8"))
    position = {category["id"]: i for i, category in enumerate(document["categories"])}

    def pair_id(image_id: int, category_id: int) -> int:
        return image_id * len(position) + position[category_id]

    def as_pair(item: Mapping[str, Any]) -> dict[str, Any]:
        return {**item, "image_id": pair_id(item["image_id"], item["category_id"]), "category_id": 1}

    pairs = {
        "categories": [{"id": 1, "name": "object"}],
        "images": [
            {
                **image,
                "id": pair_id(image["id"], category["id"]),
                "text_input": category["name"],
                "is_instance_exhaustive": True,
            }
            for image in document["images"]
            for category in document["categories"]
        ],
        "annotations": [as_pair({"iscrowd": 0, **annotation}) for annotation in document["annotations"]],
    }
    with tempfile.TemporaryDirectory() as folder, silence(), np.errstate(invalid="ignore"):
        truth_file, prediction_file = Path(folder, "truth.json"), Path(folder, "predictions.json")
        truth_file.write_text(json.dumps(pairs), encoding="utf-8")
        prediction_file.write_text(json.dumps([as_pair(p) for p in predictions]), encoding="utf-8")
        evaluator = CGF1Evaluator(gt_path=str(truth_file), iou_type=iou_type)
        values = evaluator.evaluate(str(prediction_file))
        overall = {
            name.removeprefix(f"cgF1_eval_{iou_type}_"): float(value) for name, value in values.items()
        }
        per_class = {
            category: _summary_of(evaluator, [pair_id(image["id"], category) for image in document["images"]])
            for category in position
        }
    return overall, per_class


def _summary_of(evaluator: CGF1Evaluator, pair_ids: list[int]) -> dict[str, float]:
    """Return the numbers of some of the pairs that the evaluator has compared already."""
    (evaluation,) = evaluator.coco_evals
    evaluation.params.imgIds = pair_ids
    evaluation.accumulate()
    evaluation.summarize()
    names = [m.name if m.iou_threshold is None else f"{m.name}@{m.iou_threshold}" for m in CGF1_METRICS]
    return dict(zip(names, map(float, evaluation.stats), strict=True))
