"""Print how much of the tiny model's accuracy is left at another resolution, with its position tables made anew.

The table of docs/how-to/augment.md: why base.resolution refuses other values.

OMP_NUM_THREADS=1 python -W ignore scripts/resolution_table.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from sam3_lora import load_base
from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.shapes import PRETRAINING_CONCEPTS, write_coco
from sam3_lora.evaluation.metrics import evaluate_split

SIDES = (56, 84, 98, 112, 126, 140, 168, 224)
IMAGES, IMAGE_SIDE, SEED = 24, 224, 5


def set_resolution(model: Any, side: int) -> None:
    """Make the RoPE tables of the global blocks anew, interpolated as sam3's ViT does it when it is built, and let the
    decoder make its coordinates when first used. The rest follows from the image."""
    for block in model.backbone.vision_backbone.trunk.blocks:
        if block.window_size == 0:
            block.attn.input_size = (side // 14, side // 14)
            block.attn._setup_rope_freqs()
    decoder = model.transformer.decoder
    decoder.compilable_cord_cache = decoder.compilable_stored_size = None


def main() -> None:
    print("| side | bbox AP | segm AP | bbox AP50 | segm AP50 |\n| ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_coco(data, PRETRAINING_CONCEPTS[:6], IMAGES, SEED, size=IMAGE_SIDE)
        for side in SIDES:
            model = load_base("tiny", device="cpu")
            if side != 112:
                set_resolution(model, side)
            split = evaluate_split(
                model, data, data / ANNOTATION_FILE, resolution=side, batch_size=4, device="cpu"
            )
            scores = split.overall.as_dict()
            cells = [f"{scores[name]:.2f}" for name in ("bbox_AP", "segm_AP", "bbox_AP50", "segm_AP50")]
            print(f"| {side} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
