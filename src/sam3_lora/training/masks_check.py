"""Whether there are masks where the losses of a run want them. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sam3_lora.errors import DataError

_SHOWN = 3


def check_masks(data: Any) -> None:
    """Do nothing if every annotation for training has a mask, or the dataset loads none.

    The official dataset takes an object without one as it is; training then ends in a ``KeyError`` or learns that the
    object covers nothing.

    Args:
        data: The ``trainer.data`` block of a config.

    Raises:
        DataError: With the number of annotations without a mask, the first of them, and what to do.
    """
    train = OmegaConf.select(OmegaConf.create(data), "train.dataset")
    if train is None or not train.get("load_segmentation") or "ann_file" not in train:
        return
    document = json.loads(Path(train.ann_file).read_text(encoding="utf-8"))
    bare = [annotation for annotation in document["annotations"] if not annotation.get("segmentation")]
    if not bare:
        return
    names = {image["id"]: image["file_name"] for image in document["images"]}
    first = ", ".join(f"{a['id']} of {names.get(a['image_id'])!r}" for a in bare[:_SHOWN])
    raise DataError(
        f"{train.ann_file}: {len(bare)} of {len(document['annotations'])} annotations have no 'segmentation', and this run "
        f"trains masks; the first are {first}\n"
        "  -> export with masks (Roboflow: 'COCO Segmentation'), or delete these annotations"
    )
