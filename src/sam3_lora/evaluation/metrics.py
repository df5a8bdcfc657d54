"""Measuring a model on a COCO split: the official dataset, post-processing and COCO AP, without the trainer.

Every step is the official one with the settings of our training configs, so the numbers are those that the trainer's
validation prints for the same weights.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam3_lora.errors import DataError
from sam3_lora.evaluation.batches import (
    check_all_read,
    evaluating,
    forward,
    make_datapoint,
    official_transforms,
    open_split,
    silence,
)

from sam3.eval.postprocessors import PostProcessImage  # isort: skip  (after the modules that stand in for triton)
from sam3.model.sam3_image import Sam3Image  # isort: skip

# The module behind these two announces on stdout that the optional TIDE is not installed.
with silence():
    from sam3.eval.cgf1_eval import CGF1Evaluator
    from sam3.eval.coco_writer import PredictionDumper

#: One prediction as pycocotools reads it: ``image_id``, ``category_id``, ``score`` 0..1, ``bbox`` xywh in pixels of
#: the original image, ``segmentation`` as compressed RLE of its size.
CocoResult = dict[str, Any]
IouType = Literal["bbox", "segm"]

_MAX_PREDICTIONS = 100  # an image, best first, over all its categories: PredictionDumper's maxdets


@dataclass(frozen=True)
class SplitResult:
    """COCO AP of one model on one split, each 0 to 1, and the predictions behind it.

    ``predictions`` holds boxes and masks together and serves both kinds of evaluation; ``image_ids`` are all images of
    the split in the order of their ids.
    """

    bbox_AP: float
    bbox_AP50: float
    bbox_AP75: float
    segm_AP: float
    segm_AP50: float
    segm_AP75: float
    predictions: list[CocoResult] = field(repr=False)
    image_ids: list[int] = field(repr=False)

    def as_dict(self) -> dict[str, float]:
        """Return the numbers that ``metrics.json`` holds for a model."""
        return {
            "bbox_AP50": self.bbox_AP50,
            "segm_AP50": self.segm_AP50,
            "bbox_AP": self.bbox_AP,
            "segm_AP": self.segm_AP,
        }


def evaluate_split(
    model: Sam3Image,
    images: Path,
    annotation_file: Path,
    *,
    resolution: int,
    batch_size: int,
    device: str | torch.device,
    dump_dir: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> SplitResult:
    """Ask the model for every category on every image of a split, and return COCO AP and the predictions.

    Runs in eval mode without gradients, in whatever autocast context the caller has set; the model's modes and the
    random state of Python are as before afterwards.

    Args:
        model: On ``device``, with or without adapters.
        images: Folder that the file names in the annotations are relative to.
        annotation_file: COCO JSON with ``iscrowd`` in every annotation.
        resolution: Side in pixels of the square that the model sees.
        batch_size: Images at a time.
        device: Where the model is.
        dump_dir: Also write ``coco_predictions_bbox.json`` and ``coco_predictions_segm.json`` there, as the trainer
            does.
        on_progress: Called with the number of images done and of all images after every batch.

    Raises:
        DataError: If there is nothing to measure against (AP is undefined without objects), or images cannot be read.
    """
    with silence():
        truth = COCO(str(annotation_file))
    _check_measurable(truth, annotation_file)
    with evaluating(model):
        results = _predict(model, images, annotation_file, resolution, batch_size, device, on_progress)
    if dump_dir is not None:
        _write_dumps(dump_dir, results)
    boxes, masks = (_average_precision(truth, results, iou_type) for iou_type in ("bbox", "segm"))
    return SplitResult(*boxes, *masks, predictions=results, image_ids=sorted(truth.imgs))


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
    document = json.loads(annotation_file.read_text(encoding="utf-8"))
    position = {category["id"]: i for i, category in enumerate(document["categories"])}

    def as_pair(item: Mapping[str, Any]) -> dict[str, Any]:
        pair = item["image_id"] * len(position) + position[item["category_id"]]
        return {**item, "image_id": pair, "category_id": 1}

    pairs = {
        "categories": [{"id": 1, "name": "object"}],
        "images": [
            {
                **image,
                "id": image["id"] * len(position) + position[category["id"]],
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
        values = CGF1Evaluator(gt_path=str(truth_file), iou_type=iou_type).evaluate(str(prediction_file))
    return {name.removeprefix(f"cgF1_eval_{iou_type}_"): float(value) for name, value in values.items()}


def false_fire_rate(
    model: Sam3Image,
    images: Sequence[Image.Image],
    prompts: Sequence[Sequence[str]],
    threshold: float = 0.5,
    *,
    resolution: int,
    device: str | torch.device,
    batch_size: int = 8,
) -> float:
    """Return the share, 0 to 1, of (image, prompt) pairs for which the model reports an object.

    Args:
        model: On ``device``.
        images: Any size and mode.
        prompts: For each image the prompts to ask, all of which name nothing in it.
        threshold: A pair counts if the best score (class x presence) of its queries is above this.
        resolution: Side in pixels of the square that the model sees.
        device: Where the model is.
        batch_size: Images at a time.

    Raises:
        ValueError: If there is not one list of prompts for each image, or no prompt at all.
    """
    scores = best_scores(model, images, prompts, resolution=resolution, device=device, batch_size=batch_size)
    fires = [score > threshold for row in scores for score in row]
    if not fires:
        raise ValueError("false_fire_rate needs at least one image with a prompt")
    return sum(fires) / len(fires)


def best_scores(
    model: Sam3Image,
    images: Sequence[Image.Image],
    prompts: Sequence[Sequence[str]],
    *,
    resolution: int,
    device: str | torch.device,
    batch_size: int = 8,
) -> list[list[float]]:
    """Return for each image and each of its prompts the highest score (class x presence) of any query.

    Arguments and errors as in :func:`false_fire_rate`.
    """
    asked = [(image, list(texts)) for image, texts in zip(images, prompts, strict=True) if texts]
    transform = official_transforms(resolution)
    scores: list[float] = []
    with evaluating(model):
        for start in range(0, len(asked), batch_size):
            datapoints = [transform(make_datapoint(*pair)) for pair in asked[start : start + batch_size]]
            outputs, _ = forward(model, datapoints, device)
            (stage,) = outputs
            presence = stage["presence_logit_dec"].sigmoid().reshape(-1, 1)
            best = (stage["pred_logits"].sigmoid().squeeze(-1) * presence).amax(dim=1)
            scores.extend(best.float().tolist())
    remaining = iter(scores)
    return [[next(remaining) for _ in texts] for texts in prompts]


def _check_measurable(truth: COCO, annotation_file: Path) -> None:
    if all(annotation.get("iscrowd", 0) for annotation in truth.anns.values()):
        raise DataError(
            f"{str(annotation_file)!r} has no object to measure against (crowds do not count), so AP is undefined; "
            "evaluate on a split with annotations"
        )


def _predict(
    model: Sam3Image,
    images: Path,
    annotation_file: Path,
    resolution: int,
    batch_size: int,
    device: str | torch.device,
    on_progress: Callable[[int, int], None] | None,
) -> list[CocoResult]:
    """Return the best predictions of each image, rounded, merged and in the order that the official dumper gives."""
    dataset = open_split(images, annotation_file, resolution)
    total = len(dataset)
    seen: Counter[int] = Counter()
    with tempfile.TemporaryDirectory() as folder:  # the dumper makes its folder, used or not
        dumper = PredictionDumper(
            dump_dir=folder,
            # Gives boxes too, the same as with iou_type "bbox": one pass serves both.
            postprocessor=PostProcessImage(
                max_dets_per_img=-1,
                iou_type="segm",
                use_original_ids=True,
                use_original_sizes_box=True,
                use_original_sizes_mask=True,
                convert_mask_to_rle=True,
                always_interpolate_masks_on_gpu=False,
                use_presence=True,
            ),
            maxdets=_MAX_PREDICTIONS,
            iou_type="segm",
            merge_predictions=True,
        )
    for start in range(0, total, batch_size):
        datapoints = [dataset[i] for i in range(start, min(start + batch_size, total))]
        seen.update(d.find_queries[0].inference_metadata.original_image_id for d in datapoints)
        outputs, metadata = forward(model, datapoints, device)
        dumper.update(find_stages=outputs, find_metadatas=metadata)
        if on_progress:
            on_progress(start + len(datapoints), total)
    check_all_read(dataset, seen)
    merged: list[CocoResult] = dumper.gather_and_merge_predictions()
    return [{key: value for key, value in result.items() if key != "area"} for result in merged]


def _average_precision(truth: COCO, results: list[CocoResult], iou_type: str) -> tuple[float, float, float]:
    """Return AP over IoU 0.50 to 0.95, AP at 0.50 and AP at 0.75."""
    with silence():
        # Copies, because loadRes writes into what it gets.
        evaluation = COCOeval(truth, truth.loadRes([dict(result) for result in results]), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    average, at_50, at_75 = (float(value) for value in evaluation.stats[:3])
    return average, at_50, at_75


def _write_dumps(folder: Path, results: list[CocoResult]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    boxes = [{key: value for key, value in result.items() if key != "segmentation"} for result in results]
    for iou_type, entries in (("bbox", boxes), ("segm", results)):
        (folder / f"coco_predictions_{iou_type}.json").write_text(json.dumps(entries), encoding="utf-8")
