"""Pretrain the tiny SAM3 from scratch on synthetic shapes, and write the weights file that the package ships.

    OMP_NUM_THREADS=1 python scripts/pretrain_tiny.py --run-dir runs/pretrain

One core, 55 CPU minutes. Everything follows from ``--seed``: each step draws its images and prompts from
(seed, step), so that a killed run goes on from its last checkpoint exactly as if it had not been killed; call the
same command again. ``scripts/check_tiny.py`` measures the result.

The recipe: initial values that make the boxes settle (see ``sam3_lora.base.tiny``), a curriculum of plain and then
busy images and of four and then all twelve concepts, every image drawn anew, masks only in the second half (they
double the price of a step), one or two prompts of random words an image as negatives, so that an unknown word means
"absent", and a frozen token table.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sam3_lora.base.checkpoint import TINY
from sam3_lora.base.cpu import enable_cpu_training, provide_triton
from sam3_lora.base.tiny import WEIGHTS_FILE, build_tiny_sam3, save_tiny_sam3
from sam3_lora.base.vocabulary import bpe_path
from sam3_lora.data.shapes import PLAIN, PRETRAINING_CONCEPTS, VARIED, Concept, Scene, render_scene

provide_triton()

from sam3.model.box_ops import box_xyxy_to_cxcywh  # noqa: E402
from sam3.train.data.collator import collate_fn_api  # noqa: E402
from sam3.train.data.sam3_image_dataset import (  # noqa: E402
    Datapoint,
    FindQueryLoaded,
    Image,
    InferenceMetadata,
    Object,
)
from sam3.train.loss.loss_fns import Boxes, IABCEMdetr, Masks, SemanticSegCriterion  # noqa: E402
from sam3.train.loss.sam3_loss import Sam3LossWrapper  # noqa: E402
from sam3.train.matcher import BinaryHungarianMatcherV2, BinaryOneToManyMatcher  # noqa: E402

HELD_OUT_WORDS = 200
#: Red circle, blue square, green triangle, and blue star: every colour and shape once.
FIRST_CONCEPTS = tuple(
    c
    for c in PRETRAINING_CONCEPTS
    if c.prompt in {"red circle", "blue square", "green triangle", "blue star"}
)


@dataclass(frozen=True)
class Recipe:
    """Schedule of the run; steps, not minutes, so that it is the same on every machine."""

    steps: int = 5800
    busy_from: int = 500  # busy images come in between these two steps
    busy_full: int = 1000
    all_concepts_from: int = 1000
    masks_from: int = 3000
    batch: int = 8
    prompts: int = 4  # of known concepts an image, present ones first
    busy_share: float = 0.65
    lr: float = 1e-3
    warmup: int = 100
    checkpoint_every: int = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/pretrain"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, default=Recipe.steps, help="a shorter run keeps the shares of the phases"
    )
    args = parser.parse_args()
    share = args.steps / Recipe.steps
    recipe = Recipe(
        steps=args.steps,
        busy_from=round(Recipe.busy_from * share),
        busy_full=round(Recipe.busy_full * share),
        all_concepts_from=round(Recipe.all_concepts_from * share),
        masks_from=round(Recipe.masks_from * share),
    )
    pretrain(args.run_dir, args.seed, recipe)


def pretrain(run_dir: Path, seed: int, recipe: Recipe) -> None:
    """Train to the end from the last checkpoint in ``run_dir``, if there is one, and write the weights there."""
    torch.set_num_threads(1)
    enable_cpu_training()
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpoint_file = run_dir / "checkpoint.pt"
    model = build_tiny_sam3(seed=seed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, recipe.lr, weight_decay=1e-4, betas=(0.9, 0.98), fused=True)
    start, cpu_before = 0, 0.0
    if checkpoint_file.exists():
        saved = torch.load(checkpoint_file, weights_only=True)
        if saved["seed"] != seed or saved["steps"] != recipe.steps:
            raise SystemExit(
                f"{checkpoint_file} is of another run (seed {saved['seed']}, {saved['steps']} steps)"
            )
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start, cpu_before = saved["step"], saved["cpu_seconds"]
    words = negative_words()
    head = model.segmentation_head
    losses = {masks: make_losses(masks) for masks in (False, True)}
    recent: list[float] = []
    for step in range(start, recipe.steps):
        masks = step >= recipe.masks_from
        model.segmentation_head = head if masks else None
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        batch = make_batch(np.random.RandomState([seed, step]), step, recipe, words)
        outputs = model(batch)
        targets = [model.back_convert(target) for target in batch.find_targets]
        loss: Tensor = losses[masks](outputs, targets)["core_loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        recent.append(loss.item())
        done = step + 1
        if done % 50 == 0:
            cpu = cpu_before + time.process_time()
            print(
                json.dumps({"step": done, "cpu": round(cpu), "loss": round(sum(recent) / len(recent), 2)}),
                flush=True,
            )
            recent.clear()
        if done % recipe.checkpoint_every == 0 or done == recipe.steps:
            model.segmentation_head = head
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": done,
                "steps": recipe.steps,
                "seed": seed,
                "cpu_seconds": cpu_before + time.process_time(),
            }
            temporary = checkpoint_file.with_suffix(".tmp")
            torch.save(state, temporary)
            temporary.replace(checkpoint_file)
    model.segmentation_head = head
    digest = save_tiny_sam3(model, run_dir / WEIGHTS_FILE)
    print(f"wrote {run_dir / WEIGHTS_FILE}\nWEIGHTS_SHA256 = {digest!r}")


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to 3 %."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return recipe.lr * min(1, (step + 1) / recipe.warmup) * (0.03 + 0.97 * cosine)


def make_losses(masks: bool) -> Sam3LossWrapper:
    """The official losses with the official weights; ``masks`` adds the instance and the semantic mask losses."""
    find = [
        Boxes(weight_dict={"loss_bbox": 5.0, "loss_giou": 2.0}),
        IABCEMdetr(
            weak_loss=False,
            weight_dict={"loss_ce": 20.0, "presence_loss": 20.0},
            pos_weight=10.0,
            alpha=0.25,
            gamma=2,
            use_presence=True,
            pos_focal=False,
            pad_n_queries=TINY.num_queries,
            pad_scale_pos=1.0,
        ),
    ]
    semantic = None
    if masks:
        weights = {"loss_mask": 200.0, "loss_dice": 10.0}
        find.append(Masks(focal_alpha=0.25, focal_gamma=2.0, weight_dict=weights, compute_aux=False))
        semantic = SemanticSegCriterion(
            presence_head=True,
            presence_loss=False,
            focal=True,
            focal_alpha=0.6,
            focal_gamma=2.0,
            downsample=False,
            weight_dict={
                "loss_semantic_seg": 20.0,
                "loss_semantic_presence": 1.0,
                "loss_semantic_dice": 30.0,
            },
        )
    return Sam3LossWrapper(
        loss_fns_find=find,
        normalization="local",  # one process
        matcher=BinaryHungarianMatcherV2(
            focal=True, cost_class=2.0, cost_bbox=5.0, cost_giou=2.0, alpha=0.25, gamma=2, stable=False
        ),
        o2m_matcher=BinaryOneToManyMatcher(alpha=0.3, threshold=0.4, topk=4),
        o2m_weight=2.0,
        use_o2m_matcher_on_o2m_aux=False,
        loss_fn_semantic_seg=semantic,
        scale_by_find_batch_size=True,
    )


def make_batch(rng: np.random.RandomState, step: int, recipe: Recipe, words: Sequence[str]):  # type: ignore[no-untyped-def]
    """Draw the images of one step and ask the known concepts and some random words of each."""
    concepts = PRETRAINING_CONCEPTS if step >= recipe.all_concepts_from else FIRST_CONCEPTS
    ramp = (step - recipe.busy_from) / (recipe.busy_full - recipe.busy_from)
    busy_share = recipe.busy_share * min(max(ramp, 0.0), 1.0)
    datapoints = []
    while len(datapoints) < recipe.batch:
        style = VARIED if busy_share > 0 and rng.uniform() < busy_share else PLAIN
        scene = render_scene(rng, concepts, style, TINY.resolution)
        if scene.objects:
            prompts = choose_prompts(rng, scene, concepts, recipe.prompts) + random_prompts(
                rng, words, concepts
            )
            datapoints.append(make_datapoint(scene, concepts, prompts))
    return collate_fn_api(datapoints, dict_key="all", with_seg_masks=True, repeats=1)["all"]


def choose_prompts(
    rng: np.random.RandomState, scene: Scene, concepts: Sequence[Concept], count: int
) -> list[str]:
    """The prompts of what is present, filled up to ``count`` with absent concepts."""
    present = sorted({item.concept for item in scene.objects})
    absent = [i for i in range(len(concepts)) if i not in present]
    rng.shuffle(absent)
    chosen = present + absent[: max(0, count - len(present))]
    return [concepts[i].prompt for i in chosen]


def random_prompts(
    rng: np.random.RandomState, words: Sequence[str], concepts: Sequence[Concept]
) -> list[str]:
    """One or two prompts of one or two words that name nothing in the image.

    One word in seven is a known one, so that "red" beside an unknown word means absent too; a prompt of known words
    only is left out, since part of it may be there.
    """
    known = sorted({word for concept in concepts for word in concept.prompt.split()})
    prompts = []
    for _ in range(rng.randint(1, 3)):
        length = rng.choice([1, 1, 2])
        parts = [
            words[rng.randint(len(words))] if rng.uniform() < 0.85 else rng.choice(known)
            for _ in range(length)
        ]
        if not set(parts) <= set(known):
            prompts.append(" ".join(parts))
    return prompts


def negative_words() -> list[str]:
    """All whole words of the vocabulary that may serve as negatives: none that names a shape or colour, none that
    the false-fire check holds out (:func:`held_out_words`)."""
    return _whole_words()[HELD_OUT_WORDS:]


def held_out_words() -> list[str]:
    """The words that are never seen in pretraining; the model must stay silent on them."""
    return _whole_words()[:HELD_OUT_WORDS]


def _whole_words() -> list[str]:
    merges = gzip.decompress(bpe_path().read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    tokens = {merge.replace(" ", "") for merge in merges}
    words = {token[:-4] for token in tokens if token.endswith("</w>")}
    usable = sorted(
        w for w in words if w.isascii() and w.isalpha() and len(w) >= 7 and w not in RESERVED_WORDS
    )
    np.random.RandomState(0).shuffle(usable)
    return usable


#: Names of shapes and colours: whatever a user or a test may teach the tiny model is not taught as "absent" here.
RESERVED_WORDS = frozenset(
    "triangle hexagon crescent diamond pentagon octagon rectangle ellipse cylinder spiral polygon parallelogram "
    "trapezoid circles squares triangles crosses hexagons diamonds hearts arrows crescents "
    "magenta turquoise lavender burgundy crimson scarlet emerald sapphire chocolate charcoal coloured colored "
    "striped spotted dotted checkered".split()
)


def make_datapoint(scene: Scene, concepts: Sequence[Concept], prompts: Sequence[str]) -> Datapoint:
    """Turn a scene into what the official transforms give: an image in -1..1, boxes cxcywh in 0..1, uint8 masks."""
    height, width = scene.image.shape[:2]
    pixels = torch.from_numpy(scene.image).permute(2, 0, 1).float().div(127.5).sub(1)
    objects = []
    for index, item in enumerate(scene.objects):
        box = box_xyxy_to_cxcywh(torch.tensor(item.box_xyxy)) / torch.tensor([width, height, width, height])
        segment = torch.from_numpy(item.mask.astype(np.uint8))
        objects.append(Object(bbox=box, area=float(box[2] * box[3]), object_id=index, segment=segment))
    queries = []
    for number, prompt in enumerate(prompts):
        ids = [i for i, item in enumerate(scene.objects) if concepts[item.concept].prompt == prompt]
        queries.append(
            FindQueryLoaded(
                query_text=prompt,
                image_id=0,
                object_ids_output=ids,
                is_exhaustive=True,
                is_pixel_exhaustive=True,
                inference_metadata=InferenceMetadata(
                    coco_image_id=-1,
                    original_image_id=-1,
                    original_category_id=number,
                    original_size=(height, width),
                    object_id=-1,
                    frame_index=-1,
                ),
            )
        )
    return Datapoint(find_queries=queries, images=[Image(data=pixels, objects=objects, size=(height, width))])


if __name__ == "__main__":
    main()
