"""Batches for the official trainer, and the demo's dataset."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from sam3_lora.data.shapes import DEMO_CONCEPTS, write_coco

from sam3.train.data.collator import collate_fn_api, collate_fn_api_with_chunking  # isort: skip

DEMO_IMAGES = 60


def collate_fn(
    datapoints: list[Any], dict_key: str, with_seg_masks: bool, gradient_accumulation_steps: int = 1
) -> dict[str, Any] | list[dict[str, Any]]:
    """Collate official datapoints into what the official trainer takes.

    It finds the target by this name. It wants one batch, or with gradient accumulation a list of that many batches; the official collate functions
    give the one or the other.

    Args:
        datapoints: As the official dataset gives them.
        dict_key: Name under which losses and meters find the batch.
        with_seg_masks: Whether masks were loaded.
        gradient_accumulation_steps: Number of forward passes that share an optimizer step.
    """
    options = {"dict_key": dict_key, "with_seg_masks": with_seg_masks, "repeats": 1}
    if gradient_accumulation_steps == 1:
        return collate_fn_api(datapoints, **options)
    return collate_fn_api_with_chunking(datapoints, num_chunks=gradient_accumulation_steps, **options)


def render_demo_dataset(folder: str | Path, seed: int = 0) -> None:
    """Write the demo's ``train/`` and ``valid/``, 60 images each, unless ``folder`` is there already.

    Several processes may call it at once: the folder appears whole, by one rename.
    """
    folder = Path(folder)
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    draft.chmod(0o755)
    try:
        for split, split_seed in (("train", 2 * seed), ("valid", 2 * seed + 1)):
            write_coco(draft / split, DEMO_CONCEPTS, DEMO_IMAGES, seed=split_seed)
        draft.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
