"""Measure the tiny SAM3 against the goals it must reach before the package ships it.

    OMP_NUM_THREADS=1 python scripts/check_tiny.py                                   # the packaged weights
    OMP_NUM_THREADS=1 python scripts/check_tiny.py --checkpoint runs/pretrain/checkpoint.pt   # a run on its way

Goals, on two fixed sets of 80 rendered images that no pretraining step has drawn (AP over IoU 0.50 to 0.95 / AP50):

    plain    at most 2 large objects on a flat ground       boxes 0.90 / 0.98    masks 0.85 / 0.96
    varied   1 to 3 objects, any size, rotation and ground  boxes 0.75 / 0.90    masks 0.70 / 0.85
    words    200 held-out words, each asked of one of 50 varied images: at most 1 % of them find an object

Exits with 1 if a goal is missed. About 40 CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pretrain_tiny import held_out_words

from sam3_lora.base.checkpoint import TINY
from sam3_lora.base.tiny import build_tiny_sam3, load_tiny_sam3
from sam3_lora.data.shapes import (
    ANNOTATION_FILE,
    PLAIN,
    PRETRAINING_CONCEPTS,
    VARIED,
    Style,
    render_scene,
    write_coco,
)
from sam3_lora.evaluation.metrics import evaluate_split, false_fire_rate
from sam3_lora.evaluation.scores import AP_METRICS

from sam3.model.sam3_image import Sam3Image  # isort: skip  (after the modules above, which stand in for triton)

IMAGES = 80
WORD_IMAGES = 50


@dataclass(frozen=True)
class ValidationSet:
    """A fixed set of images: how they look and the seed they are drawn with."""

    style: Style
    seed: int


SETS = {"plain": ValidationSet(PLAIN, seed=12), "varied": ValidationSet(VARIED, seed=13)}
WORDS_SEED = 14

#: Least value of each measurement.
GOALS = {
    "plain": {"bbox_AP": 0.90, "bbox_AP50": 0.98, "segm_AP": 0.85, "segm_AP50": 0.96},
    "varied": {"bbox_AP": 0.75, "bbox_AP50": 0.90, "segm_AP": 0.70, "segm_AP50": 0.85},
}
MAX_FALSE_FIRE = 0.01


@dataclass(frozen=True)
class Measured:
    """AP of each validation set, keys as in :data:`GOALS`, and the share of held-out words that found an object."""

    sets: dict[str, dict[str, float]]
    false_fire: float

    def missed(self) -> list[str]:
        """Describe every goal that is not reached."""
        missed = [
            f"{name} {key} {self.sets[name][key]:.3f}, goal {goal:.2f} or more"
            for name, goals in GOALS.items()
            for key, goal in goals.items()
            if not self.sets[name][key] >= goal
        ]
        if not self.false_fire <= MAX_FALSE_FIRE:
            missed.append(f"false fire {self.false_fire:.3f}, goal {MAX_FALSE_FIRE:.2f} or less")
        return missed


def measure(model: Sam3Image) -> Measured:
    """Render the fixed sets into a temporary folder and measure the model on them; it must be on the CPU."""
    sets = {name: measure_set(model, fixed) for name, fixed in SETS.items()}
    return Measured(sets, measure_false_fire(model))


def measure_set(model: Sam3Image, fixed: ValidationSet) -> dict[str, float]:
    """Return the AP of all pretraining concepts on one fixed set."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_coco(folder, PRETRAINING_CONCEPTS, IMAGES, fixed.seed, fixed.style, TINY.resolution)
        result = evaluate_split(
            model, folder, folder / ANNOTATION_FILE, resolution=TINY.resolution, batch_size=8, device="cpu"
        )
    scores = result.overall.defined()
    return {name: scores[name] for name in AP_METRICS}


def measure_false_fire(model: Sam3Image) -> float:
    """Return the share of held-out words that find an object, each asked of one varied image."""
    words = held_out_words()
    rng = np.random.RandomState(WORDS_SEED)
    images = [
        Image.fromarray(render_scene(rng, PRETRAINING_CONCEPTS, VARIED, TINY.resolution).image)
        for _ in range(WORD_IMAGES)
    ]
    prompts = [words[i::WORD_IMAGES] for i in range(WORD_IMAGES)]
    return false_fire_rate(model, images, prompts, resolution=TINY.resolution, device="cpu")


def load_checkpoint(path: Path) -> tuple[Sam3Image, int]:
    """Return the model in a checkpoint of ``pretrain_tiny.py``, and the number of steps it has made."""
    saved = torch.load(path, weights_only=True)
    model = build_tiny_sam3(eval_mode=True)
    model.load_state_dict(saved["model"])
    return model, saved["step"]


def table(measured: Measured) -> str:
    """Lay the measurements out beside their goals."""
    keys = list(GOALS["plain"])
    lines = ["set       " + "".join(f"{key:>18}" for key in keys)]
    for name, goals in GOALS.items():
        cells = (f"{measured.sets[name][key]:.3f} (>= {goals[key]:.2f})" for key in keys)
        lines.append(f"{name:<10}" + "".join(f"{cell:>18}" for cell in cells))
    lines.append(
        f"false fire on {len(held_out_words())} held-out words: {measured.false_fire:.3f} (<= {MAX_FALSE_FIRE})"
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--weights", type=Path, help="weights file to measure instead of the packaged one")
    source.add_argument(
        "--checkpoint", type=Path, help="checkpoint.pt of a pretraining run to measure instead"
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    step = None
    if args.checkpoint:
        model, step = load_checkpoint(args.checkpoint)
    else:
        model = load_tiny_sam3(args.weights)
    measured = measure(model)
    missed = measured.missed()
    if args.json:
        numbers = {**measured.sets, "false_fire": measured.false_fire, "missed": missed}
        print(json.dumps({"step": step, **numbers} if step is not None else numbers))
    else:
        print(table(measured))
        for line in missed:
            print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
