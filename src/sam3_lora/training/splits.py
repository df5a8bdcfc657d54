"""Where the images of a run lie: ``training.img_folder_*`` and ``training.ann_file_*``. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sam3_lora.data.check import DatasetSummary, check_dataset, check_splits

#: Key of ``training`` -> where it is in a dataset folder, unless the config says otherwise.
SPLIT_KEYS: Mapping[str, str] = {
    "img_folder_train": "train",
    "ann_file_train": "train/_annotations.coco.json",
    "img_folder_val": "valid",
    "ann_file_val": "valid/_annotations.coco.json",
}


def split_files(training: Mapping[str, Any]) -> dict[str, tuple[Path, Path]]:
    """Return the folder and the annotation file of ``train`` and ``valid`` from a resolved ``training`` block."""
    return {
        split: (Path(training[f"img_folder_{key}"]), Path(training[f"ann_file_{key}"]))
        for split, key in (("train", "train"), ("valid", "val"))
    }


def check_run_data(dataset: Path, training: Mapping[str, Any]) -> DatasetSummary:
    """Check the images of a run, wherever they lie, and return what they are.

    Args:
        dataset: ``paths.dataset_root``.
        training: Those of :data:`SPLIT_KEYS` that are not at their usual place in it, and any other keys.

    Raises:
        DataError: With all problems at once.
    """
    elsewhere = {key: training[key] for key in SPLIT_KEYS if key in training}
    if not elsewhere:
        return check_dataset(dataset)
    usual = {key: dataset / place for key, place in SPLIT_KEYS.items()}
    return check_splits(split_files({**usual, **elsewhere}))
