"""Measure what negatives in training do: does the tuned tiny model stay silent on what is not there, and still find the rest?

    OMP_NUM_THREADS=1 python benchmarks/negatives.py                # all runs, 40 CPU minutes
    OMP_NUM_THREADS=1 python benchmarks/negatives.py --table        # the table of what is there
    OMP_NUM_THREADS=1 python benchmarks/negatives.py --presence     # how well the base's own answers separate

Each run is the demo's: 60 training images of new concepts, 12 epochs of ``balanced``, one seed for images and training. Two
datasets: "three", the demo's three classes, and "one", a single class that is in every image. Runs that the file holds are
not made again. Measured with the better adapter of epochs 6 and 12:

    AP50      of the taught classes on 60 new images
    words     held_out_phrases.txt, 20 of them asked of each of those images: how many find an object at 0.5
    shapes    names of coloured shapes that neither base nor adapter has learnt, asked of the same images
    classes   the taught classes, asked of 60 images of other shapes, learnt by the base or by nobody
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sam3_lora.adapter import load_adapter
from sam3_lora.base.checkpoint import TINY
from sam3_lora.base.loading import load_base
from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.phrases import held_out_phrases
from sam3_lora.data.shapes import (
    DEMO_CONCEPTS,
    PLAIN,
    PRETRAINING_CONCEPTS,
    VARIED,
    Concept,
    render_scene,
    write_coco,
)
from sam3_lora.evaluation.batches import evaluating, forward, make_datapoint, official_transforms
from sam3_lora.evaluation.metrics import evaluate_split, false_fire_rate
from sam3_lora.training.launch import train
from sam3_lora.training.settings import TrainSettings

DATASETS = {"three": DEMO_CONCEPTS, "one": DEMO_CONCEPTS[:1]}
NEGATIVES = ("none", "classes", "list", "verified")
SEEDS = (0, 1, 2)
HELD_OUT_SHAPES = tuple(
    Concept(colour, shape) for colour in ("yellow", "pink", "white") for shape in ("diamond", "arrow")
)
IMAGES = 60
WORDS_AN_IMAGE = 20
VALIDATE_EVERY = 6  # epochs, to save time: the best adapter is that of epoch 6 or 12
COLUMNS = ("bbox_AP50", "segm_AP50", "words", "shapes", "classes")


def measure_run(dataset: str, prompts: dict[str, Any], seed: int) -> dict[str, float]:
    """Train once and return the numbers of the best adapter."""
    concepts = DATASETS[dataset]
    with tempfile.TemporaryDirectory() as name:
        data = Path(name, "data")
        for split, split_seed in (("train", 2 * seed), ("valid", 2 * seed + 1)):
            write_coco(data / split, concepts, IMAGES, seed=split_seed)
        config = {f"prompts.{key}": value for key, value in prompts.items()}
        config["training.val_epoch_freq"] = VALIDATE_EVERY
        settings = TrainSettings(data, Path(name, "run"), base="tiny", seed=seed, report=False, config=config)
        adapter = train(settings).adapter
        model = load_adapter(load_base("tiny", device="cpu"), adapter).get_base_model()
        return measure(model, data / "valid", [concept.prompt for concept in concepts], seed)


def measure(model: Any, split: Path, classes: Sequence[str], seed: int) -> dict[str, float]:
    """Return AP50 on a split and the rates of false fire, each 0 to 1."""
    scores = evaluate_split(
        model, split, split / ANNOTATION_FILE, resolution=TINY.resolution, batch_size=6, device="cpu"
    ).overall.defined()
    images = [Image.open(file) for file in sorted(split.glob("*.png"))]
    draw = random.Random(seed)
    words = [draw.sample(held_out_phrases(), WORDS_AN_IMAGE) for _ in images]
    shapes = [[concept.prompt for concept in HELD_OUT_SHAPES]] * len(images)
    rng = np.random.RandomState(1000 + seed)
    others = [*PRETRAINING_CONCEPTS, *HELD_OUT_SHAPES]
    scenes = [Image.fromarray(render_scene(rng, others, PLAIN, TINY.resolution).image) for _ in images]
    asked = {
        "words": (images, words),
        "shapes": (images, shapes),
        "classes": (scenes, [classes] * len(scenes)),
    }
    rates = {
        name: false_fire_rate(model, *pair, resolution=TINY.resolution, device="cpu")
        for name, pair in asked.items()
    }
    return {"bbox_AP50": scores["bbox_AP50"], "segm_AP50": scores["segm_AP50"], **rates}


def presence_of_known_shapes() -> str:
    """Say how well the presence score of the tiny base tells shapes that it knows and sees from those that it does not."""
    model = load_base("tiny", device="cpu")
    transform = official_transforms(TINY.resolution)
    prompts = [concept.prompt for concept in PRETRAINING_CONCEPTS]
    seen: list[float] = []
    unseen: list[float] = []
    for style in (PLAIN, VARIED):
        rng = np.random.RandomState(5)
        for _ in range(40):
            scene = render_scene(rng, PRETRAINING_CONCEPTS, style, TINY.resolution)
            shown = {prompts[item.concept] for item in scene.objects}
            datapoint = transform(make_datapoint(Image.fromarray(scene.image), prompts))
            with evaluating(model):
                (stage,), _ = forward(model, [datapoint], "cpu")
            scores = stage["presence_logit_dec"].sigmoid().flatten().tolist()
            for prompt, score in zip(prompts, scores, strict=True):
                (seen if prompt in shown else unseen).append(score)
    shares = ", ".join(
        f"{np.mean(np.array(unseen) < limit):.1%} below {limit}" for limit in (0.03, 0.1, 0.3, 0.5)
    )
    return f"{len(seen)} seen: {min(seen):.3f} or more; {len(unseen)} not seen: {shares}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the medians over seeds as Markdown, with the least and the largest in brackets."""
    lines = ["| dataset | negatives | " + " | ".join(COLUMNS) + " | seeds |"]
    lines.append("| --- | --- |" + " ---: |" * (len(COLUMNS) + 1))
    settings = dict.fromkeys((row["dataset"], json.dumps(row["prompts"])) for row in rows)
    for dataset, prompts in settings:
        own = [row for row in rows if row["dataset"] == dataset and json.dumps(row["prompts"]) == prompts]
        cells = []
        for column in COLUMNS:
            values = [row[column] for row in own]
            cells.append(f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        name = ", ".join(f"{key} {value}" for key, value in json.loads(prompts).items() if key != "cache")
        lines.append(f"| {dataset} | {name.removeprefix('negatives ')} | {' | '.join(cells)} | {len(own)} |")
    return "\n".join(lines)


def read(output: Path) -> list[dict[str, Any]]:
    """Return the runs that a file holds."""
    return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--presence",
        action="store_true",
        help="only print the base's presence scores of shapes that it knows",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/negatives.jsonl"),
        help="file for the numbers of each run, a line each",
    )
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=list(DATASETS))
    parser.add_argument("--negatives", nargs="+", default=list(NEGATIVES), choices=NEGATIVES)
    parser.add_argument("--cap", type=int, help="prompts.max_prompts_per_image (default: as shipped)")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.presence:
        print(presence_of_known_shapes())
        return
    if not args.table:
        for seed in args.seeds:
            for dataset in args.datasets:
                for negatives in args.negatives:
                    prompts = {"negatives": negatives}
                    if args.cap:
                        prompts["max_prompts_per_image"] = args.cap
                    run = {"dataset": dataset, "prompts": prompts, "seed": seed}
                    if any(run.items() <= row.items() for row in read(args.output)):
                        continue
                    numbers = measure_run(dataset, prompts, seed)
                    args.output.parent.mkdir(parents=True, exist_ok=True)
                    with args.output.open("a") as file:
                        file.write(json.dumps({**run, **numbers}) + "\n")
                    print({**run, **numbers}, flush=True)
    print(table(read(args.output)))


if __name__ == "__main__":
    main()
