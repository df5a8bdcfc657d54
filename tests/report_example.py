"""Reports with all their parts, from shapes and from predictions that are ground truth moved about."""

import json
import math
import random

import numpy as np
from pycocotools import mask as coco_mask

from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.shapes import DEMO_CONCEPTS, VARIED, write_coco
from sam3_lora.report import History, Step, choose_pictures, write_report

FACTS = {
    "Preset": "balanced, with r = 16",
    "Base model": "facebook/sam3",
    "Adapted modules": "264",
    "Trained parameters": "4,128,768 of 840,389,121 (0.49%)",
    "Adapter on disk": "16.5 MB",
    "Training data": "480 images, 1,302 objects",
    "Validation data": "24 images, 61 objects",
    "Epochs": "12 of 12, best after 10 (by segm_AP)",
    "Learning rate": "0.0002",
    "Seed": "0",
    "Prompts": "purple cross, orange hexagon, cyan crescent",
}
METRICS = {
    "base": {"bbox_AP": 0.0312, "bbox_AP50": 0.0518, "segm_AP": 0.0204, "segm_AP50": 0.0413},
    "adapter": {"bbox_AP": 0.6127, "bbox_AP50": 0.8812, "segm_AP": 0.5538, "segm_AP50": 0.8624},
}
NOTES = [
    "base: measured after the training.",
    "adapter: measured by the run itself, in the validation after epoch 10.",
]


def run_length(mask):
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def moved(document, shares, seed=0):
    """Return a result for some of the objects, shifted by up to a few pixels.

    Args:
        document: COCO ground truth.
        shares: Image id -> share of its objects that are found; an object of a poor image is shifted further.
    """
    chance = random.Random(seed)
    results = []
    for annotation in document["annotations"]:
        share = shares[annotation["image_id"]]
        if chance.random() > share:
            continue
        shift = round((1 - share) * 8)
        dx, dy = chance.randint(-shift, shift), chance.randint(-shift, shift)
        mask = coco_mask.decode(annotation["segmentation"])
        x, y, width, height = annotation["bbox"]
        results.append(
            {
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "bbox": [x + dx, y + dy, width, height],
                "segmentation": run_length(np.roll(mask, (dy, dx), axis=(0, 1))),
                "score": 0.55 + 0.4 * share * chance.random(),
            }
        )
    return results


def made_up_history(epochs=12, steps=40, best_epoch=10):
    chance = random.Random(1)
    losses = [
        Step(
            epoch,
            step,
            steps,
            40 + 260 * math.exp(-(epoch - 1 + step / steps) / 3) * chance.uniform(0.8, 1.25),
        )
        for epoch in range(1, epochs + 1)
        for step in range(1, steps + 1)
    ]
    metrics = {}
    for epoch in range(1, epochs + 1):
        level = 1 - math.exp(-epoch / 4) - (0.03 if epoch > best_epoch else 0)
        metrics[epoch] = {
            "bbox_AP": 0.66 * level, "bbox_AP50": 0.95 * level, "segm_AP": 0.6 * level, "segm_AP50": 0.93 * level,
        }  # fmt: skip
    return History(losses, metrics, best_epoch, "segm_AP", {"epochs": epochs})


def write_example(folder, **changes):
    """Write a dataset and a report on a run into a folder, and return the path of the report."""
    content = {
        "title": "Three concepts that the model had never seen",
        "facts": FACTS,
        "metrics": METRICS,
        "history": made_up_history(),
        "pictures": example_pictures(folder / "valid", {"base": (0.1, 0.1), "adapter": (1.0, 0.2)}),
        "notes": NOTES,
    }
    return write_report(folder / "report.html", **(content | changes))


def write_comparison(folder):
    """Write a dataset and a report on three models with their results by class, and return the path of the report."""
    levels = {"base": (0.1, 0.1), "first/adapters/best": (0.8, 0.1), "second/adapters/best": (1.0, 0.2)}
    metrics = {
        name: {"segm_AP50": 0.9 * best, "mean_IoU": 0.8 * best, "cgF1": 0.7 * best - 0.1}
        for name, (best, _) in levels.items()
    }
    undefined = {name: dict.fromkeys(values) for name, values in metrics.items()}
    return write_report(
        folder / "comparison.html",
        title="Evaluation on “valid”",
        facts={"Data": "24 images, 61 objects", "Base model": "facebook/sam3"},
        facts_heading="What was evaluated",
        metrics=metrics,
        classes={
            **{concept.prompt: metrics for concept in DEMO_CONCEPTS},
            "a class without objects": undefined,
        },
        pictures=example_pictures(folder / "compared", levels),
    )


def example_pictures(split, levels):
    """Draw a split, and return pictures from it.

    Args:
        split: Folder of the dataset, which is made.
        levels: Column -> share of the objects that are found, in the first image and in the last.
    """
    write_coco(split, DEMO_CONCEPTS, 24, seed=4, style=VARIED)
    document = json.loads((split / ANNOTATION_FILE).read_text())
    ids = [image["id"] for image in document["images"]]
    predictions = {
        column: moved(
            document, {image: high - (high - low) * (i / len(ids)) ** 2 for i, image in enumerate(ids)}
        )
        for column, (high, low) in levels.items()
    }
    return choose_pictures(split / ANNOTATION_FILE, split, predictions)
