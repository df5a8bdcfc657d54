"""Draw docs/images/augmentations.png: what each augmentation does to an image, its masks, boxes and input box.

OMP_NUM_THREADS=1 python -W ignore scripts/augmentations_picture.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from sam3.train.data.sam3_image_dataset import Object

from sam3_lora.data.shapes import DEMO_CONCEPTS, VARIED, render_scene
from sam3_lora.evaluation.batches import make_datapoint
from sam3_lora.training.augmentation import TrainImages
from sam3_lora.training.resumable_data import seeded
from sam3_lora.visualization.drawing import INK, PAPER, draw_objects, font_of_size

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "augmentations.png"
#: Title, keywords of TrainImages, seed. The seeds are chosen so that each does something, and something else.
CELLS: list[tuple[str, dict[str, Any], int]] = [
    ("none", {}, 0),
    ("flip", {"augment": "flip"}, 1),
    ("color", {"augment": "color"}, 0),
    ("color", {"augment": "color"}, 1),
    ("scale", {"augment": "scale"}, 1),
    ("scale", {"augment": "scale"}, 0),
    ("scale", {"augment": "scale"}, 2),
    ("all", {"augment": "all"}, 13),
    ("all", {"augment": "all"}, 7),
    ("all", {"augment": "all"}, 2),
    ("resize: official", {"resize": "official"}, 0),
    ("resize: official", {"resize": "official"}, 1),
    ("resize: official", {"resize": "official"}, 2),
]
COLUMNS = 3
SIDE = 252  # of the square that the model would take: a quarter of 1008
HEIGHT = 224  # of the image, which is twice as wide
GAP, TITLE = 8, 26


def scene() -> tuple[Image.Image, list[np.ndarray[Any, Any]], list[str]]:
    """Return a wide image of the demo's shapes with the masks and prompts of its objects."""
    rng = np.random.RandomState(11)
    left, right = (render_scene(rng, DEMO_CONCEPTS, VARIED, HEIGHT) for _ in range(2))
    blank = np.zeros((HEIGHT, HEIGHT), dtype=bool)
    masks = [np.hstack([item.mask, blank]) for item in left.objects]
    masks += [np.hstack([blank, item.mask]) for item in right.objects]
    names = [DEMO_CONCEPTS[item.concept].prompt for item in (*left.objects, *right.objects)]
    return Image.fromarray(np.hstack([left.image, right.image])), masks, names


def datapoint() -> Any:
    image, masks, names = scene()
    made = make_datapoint(image, names)
    for number, mask in enumerate(masks):
        rows, columns = np.nonzero(mask)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        made.images[0].objects.append(
            Object(
                bbox=torch.tensor(box, dtype=torch.float32),
                area=float(mask.sum()),
                object_id=number,
                segment=torch.tensor(mask, dtype=torch.uint8),
            )
        )
        made.find_queries[number].object_ids_output = [number]
    made.find_queries[0].input_bbox = made.images[0].objects[0].bbox.clone()[None]
    return made


def drawn(keywords: dict[str, Any], seed: int) -> Image.Image:
    """Return an augmented image with its objects, and the input box of the first prompt as a white dashed line."""
    with seeded(seed):
        point = TrainImages(resolution=SIDE, **keywords)(datapoint())
    kept = [
        (q.query_text, o) for q, o in zip(point.find_queries, point.images[0].objects, strict=True) if o.area
    ]
    masks = [item.segment.bool().numpy() for _, item in kept]
    boxes = [item.bbox.flatten().tolist() for _, item in kept]
    picture = draw_objects(
        point.images[0].data, masks, boxes, [name for name, _ in kept], alpha=0.35, side=2 * SIDE
    )
    dash(
        ImageDraw.Draw(picture),
        [2 * edge for edge in point.find_queries[0].input_bbox[0].tolist()],
    )
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def dash(pen: ImageDraw.ImageDraw, box: list[float]) -> None:
    x0, y0, x1, y1 = box
    for (ax, ay), (bx, by) in (
        ((x0, y0), (x1, y0)),
        ((x1, y0), (x1, y1)),
        ((x1, y1), (x0, y1)),
        ((x0, y1), (x0, y0)),
    ):
        for start in np.arange(0, 1, 0.1):
            ends = [(ax + (bx - ax) * t, ay + (by - ay) * t) for t in (start, start + 0.05)]
            pen.line(ends, fill=PAPER, width=4)


def original() -> Image.Image:
    image, masks, names = scene()
    boxes = [[c.min(), r.min(), c.max() + 1, r.max() + 1] for r, c in map(np.nonzero, masks)]
    wide = draw_objects(image, masks, boxes, names, alpha=0.35, side=4 * SIDE)
    return wide.resize((2 * SIDE, SIDE), Image.Resampling.LANCZOS)


def main() -> None:
    step, rows = SIDE + GAP, -(-(len(CELLS) + 2) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * step + GAP, rows * (step + TITLE) + GAP), PAPER)
    pen = ImageDraw.Draw(canvas)
    pictures = [("the image itself", original()), *((t, drawn(k, seed)) for t, k, seed in CELLS)]
    for number, (title, picture) in enumerate(pictures):
        row, column = divmod(number + (number > 0), COLUMNS)  # the first is two columns wide
        left, top = GAP + column * step, GAP + row * (step + TITLE)
        pen.text((left, top), title, fill=INK, font=font_of_size(18))
        canvas.paste(picture, (left, top + TITLE))
    canvas.quantize(256).save(PICTURE, optimize=True)
    print(f"wrote {PICTURE.name}: {canvas.width} x {canvas.height}, {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
