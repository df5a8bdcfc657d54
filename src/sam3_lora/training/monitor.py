"""The metric that a run is judged by, and what follows from it: the best adapter and early stopping. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sam3_lora.errors import did_you_mean

#: Our name of a metric -> the official trainer's. ``valid`` is the dict_key of the validation batches.
METRICS = {
    "bbox_AP": "Meters_train/val_valid/bbox/coco_eval_bbox_AP",
    "bbox_AP50": "Meters_train/val_valid/bbox/coco_eval_bbox_AP_50",
    "segm_AP": "Meters_train/val_valid/segm/coco_eval_segm_AP",
    "segm_AP50": "Meters_train/val_valid/segm/coco_eval_segm_AP_50",
}
AUTO = "auto"

NO_HEAD = (
    "With training.enable_segmentation=false there is no segmentation head to adapt, since boxes alone do not train it: "
    "take another preset, leave out that component, or train masks"
)


def chosen_metric(best_metric: str | None, masks: bool) -> str | None:
    """Return the metric that ``training.best_metric`` stands for: ``auto`` is the AP of masks, or of boxes without them."""
    return ("segm_AP" if masks else "bbox_AP") if best_metric == AUTO else best_metric


def monitor_problems(config: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the keys of this subject among dotted config keys; those that are not there are not wrong."""
    metric = config.get("training.best_metric", AUTO)
    masks = config.get("training.enable_segmentation", True)
    decay, patience = config.get("training.ema_decay"), config.get("training.early_stopping_patience")
    problems = []
    if not isinstance(masks, bool):
        problems.append(f"training.enable_segmentation must be true or false, got {masks!r}")
    if metric is not None and metric not in (AUTO, *METRICS):
        problems.append(
            f"training.best_metric: unknown metric {metric!r}{did_you_mean(str(metric), METRICS)} "
            f"(metrics are {', '.join(METRICS)}; auto is segm_AP, or bbox_AP without masks)"
        )
    elif masks is False and str(metric).startswith("segm"):
        problems.append(
            f"training.best_metric: {metric} needs masks, and training.enable_segmentation is false; take bbox_AP or auto"
        )
    if decay is not None and (not _is_number(decay) or not 0 < decay < 1):
        problems.append(
            f"training.ema_decay must lie between 0 and 1, or be null, got {decay!r}; 0.99 averages about 100 steps"
        )
    if patience is not None and (not isinstance(patience, int) or isinstance(patience, bool) or patience < 1):
        problems.append(
            f"training.early_stopping_patience must be a number of validations of 1 or more, or null, got {patience!r}"
        )
    elif patience is not None and metric is None:
        problems.append(
            "training.early_stopping_patience needs a training.best_metric to watch, which is null"
        )
    return problems


def meters_of(meters: Mapping[str, Any] | None, masks: bool) -> Mapping[str, Any] | None:
    """Return the official trainer's meters, without those of masks if there are none."""
    if meters is None or masks:
        return meters
    return {
        phase: {
            key: {name: meter for name, meter in by_name.items() if meter.get("iou_type") != "segm"}
            for key, by_name in by_key.items()
        }
        for phase, by_key in meters.items()
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
