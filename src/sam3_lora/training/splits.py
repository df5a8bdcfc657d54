"""Where the images of a run lie: ``training.img_folder_*`` and ``training.ann_file_*``. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sam3_lora.data.check import DatasetSummary, check_dataset, check_splits
from sam3_lora.data.prompt_settings import prompt_settings
from sam3_lora.data.prompts import PromptSampler
from sam3_lora.data.stream import read_entries

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
        training: Those of :data:`SPLIT_KEYS` that are not at their usual place in it, ``enable_segmentation``, and any
            other keys.

    Raises:
        DataError: With all problems at once.
    """
    masks = training.get("enable_segmentation") is not False  # true where nothing is said
    if not any(key in training for key in SPLIT_KEYS):
        return check_dataset(dataset, masks=masks)
    return check_splits(_files_of_run(dataset, training), masks=masks)


def check_prompts(dataset: Path, training: Mapping[str, Any], prompts: Mapping[str, Any]) -> None:
    """Check that the prompts of a run go with the classes of its images, which must have been checked.

    Args:
        dataset: As for :func:`check_run_data`, as is ``training``.
        training: Block of the config.
        prompts: Block of the config, or the keys of it that are not as shipped.

    Raises:
        ConfigError: If not, with all problems.
        DataError: If a file with phrases cannot be used.
    """
    settings = prompt_settings(prompts)
    for _, annotation_file in _files_of_run(dataset, training).values():
        categories = (entry for key, _, entry in read_entries(annotation_file) if key == "categories")
        PromptSampler({category["id"]: category["name"] for category in categories}, settings)


def _files_of_run(dataset: Path, training: Mapping[str, Any]) -> dict[str, tuple[Path, Path]]:
    usual = {key: dataset / place for key, place in SPLIT_KEYS.items()}
    return split_files({**usual, **{key: training[key] for key in SPLIT_KEYS if key in training}})
