"""A split of a dataset to measure on, found and checked."""

from __future__ import annotations

from pathlib import Path

from sam3_lora.data.check import check_dataset
from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.errors import DataError, did_you_mean
from sam3_lora.evaluation.scores import read_truth


def checked_split(data: Path, split: str | Path) -> Path:
    """Return the folder of a split, with all of its files and annotations found usable.

    Args:
        data: Dataset folder.
        split: Name of a split in it, or another folder.

    Raises:
        DataError: If there is none, it cannot be used, or has no objects.
    """
    folder = data / split
    if not folder.is_dir() and Path(split).is_dir():
        folder = Path(split)
    if data.is_dir() and not folder.is_dir() and not (data / ANNOTATION_FILE).is_file():
        splits = sorted(file.parent.name for file in data.glob(f"*/{ANNOTATION_FILE}"))
        known = (
            f". Its splits are {', '.join(splits)}"
            if splits
            else f", nor any other; a split is a folder with its images and {ANNOTATION_FILE!r}"
        )
        raise DataError(f"no split {str(split)!r} in {data}{did_you_mean(str(split), splits) or known}")
    folder = folder.resolve() if folder.name in ("", "..") else folder
    check_dataset(folder.parent, [folder.name], train_split=None)
    read_truth(folder / ANNOTATION_FILE)
    return folder
