"""Synthetic COCO data: coloured shapes on plain or busy backgrounds, for the tiny model's pretraining and the demo."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sam3_lora.data.coco import ANNOTATION_FILE, mask_to_run_lengths

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "purple": (150, 50, 190),
    "orange": (245, 140, 30),
    "cyan": (40, 200, 210),
    "yellow": (235, 210, 40),
    "pink": (250, 130, 180),
    "white": (240, 240, 240),
}

_MIN_VISIBLE_PIXELS = 30


@dataclass(frozen=True)
class Concept:
    """A kind of object: a shape of one colour. Its prompt is "colour shape"."""

    colour: str
    shape: str

    @property
    def prompt(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Style:
    """How scenes look. Radii are shares of the image side; ``gap`` is the least distance between the centres of
    two objects as a share of the sum of their radii, so that below 1 they may overlap."""

    busy: bool
    max_objects: int
    radius: tuple[float, float]
    max_rotation: float
    gap: float


PLAIN = Style(busy=False, max_objects=2, radius=(0.17, 0.28), max_rotation=0.3, gap=1.05)
VARIED = Style(busy=True, max_objects=3, radius=(0.11, 0.30), max_rotation=math.pi, gap=0.75)

#: What the tiny base is pretrained on.
PRETRAINING_CONCEPTS = tuple(
    Concept(colour, shape)
    for colour in ("red", "blue", "green")
    for shape in ("circle", "square", "triangle", "star")
)
#: What ``sam3-lora demo`` teaches it: no colour, shape or word of it occurs above.
DEMO_CONCEPTS = (Concept("purple", "cross"), Concept("orange", "hexagon"), Concept("cyan", "crescent"))


@dataclass(frozen=True)
class SceneObject:
    """One object: index into the concepts, and its visible pixels ``(H, W)`` bool."""

    concept: int
    mask: NDArray[np.bool_]

    @property
    def box_xyxy(self) -> tuple[float, float, float, float]:
        """Pixel edges of the visible part: x0, y0 inclusive, x1, y1 exclusive."""
        rows, columns = np.nonzero(self.mask)
        return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


@dataclass(frozen=True)
class Scene:
    """An image ``(H, W, 3)`` uint8 RGB with its objects; objects drawn later cover earlier ones."""

    image: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]


def render_scene(rng: np.random.RandomState, concepts: Sequence[Concept], style: Style, size: int) -> Scene:
    """Draw one scene of ``size`` x ``size`` pixels, with at least one object unless nothing stays visible.

    Args:
        rng: Source of every choice. ``RandomState``, because its stream is the same in all numpy versions.
        concepts: What may appear; each object picks one.
        style: :data:`PLAIN` or :data:`VARIED`, or your own.
        size: Side of the image in pixels.
    """
    image = _busy_background(rng, size) if style.busy else _plain_background(rng, size)
    placed: list[tuple[float, float, float]] = []
    drawn: list[tuple[int, NDArray[np.bool_]]] = []
    for _ in range(rng.randint(1, style.max_objects + 1)):
        spot = _free_spot(rng, placed, style, size)
        if spot is None:
            continue
        placed.append(spot)
        index = int(rng.randint(len(concepts)))
        mask = _shape_mask(
            concepts[index].shape, spot, rng.uniform(-style.max_rotation, style.max_rotation), size
        )
        for _, covered in drawn:
            covered[mask] = False
        colour = COLOURS[concepts[index].colour]
        fill = np.array(colour, dtype=np.float64) + rng.randint(-12, 13, 3)
        if style.busy:
            fill = fill + rng.randint(-18, 19) + rng.normal(0, 6, (int(mask.sum()), 3))
        image[mask] = fill
        drawn.append((index, mask))
    visible = tuple(SceneObject(i, mask) for i, mask in drawn if mask.sum() >= _MIN_VISIBLE_PIXELS)
    return Scene(np.clip(image, 0, 255).astype(np.uint8), visible)


def write_coco(
    folder: Path,
    concepts: Sequence[Concept],
    count: int,
    seed: int,
    style: Style = PLAIN,
    size: int = 112,
) -> None:
    """Write ``count`` scenes and their ``_annotations.coco.json`` into ``folder``, which is made if need be.

    Categories are the concepts in order, ids from 1, named by their prompts. Masks are compressed RLE.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.RandomState(seed)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, count + 1):
        scene = render_scene(rng, concepts, style, size)
        name = f"image{image_id:05d}.png"
        Image.fromarray(scene.image).save(folder / name)
        images.append({"id": image_id, "file_name": name, "width": size, "height": size})
        for item in scene.objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **_annotation(item)})
    categories = [{"id": i + 1, "name": c.prompt, "supercategory": "shape"} for i, c in enumerate(concepts)]
    document = {
        "info": {},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    (folder / ANNOTATION_FILE).write_text(json.dumps(document), encoding="utf-8")


def _annotation(item: SceneObject) -> dict[str, Any]:
    x0, y0, x1, y1 = item.box_xyxy
    return {
        "category_id": item.concept + 1,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": float(item.mask.sum()),
        "iscrowd": 0,
        "segmentation": mask_to_run_lengths(item.mask),
    }


def _plain_background(rng: np.random.RandomState, size: int) -> NDArray[np.float64]:
    noise = rng.normal(rng.randint(60, 140), 8, (size, size, 3))
    return noise + np.linspace(-20, 20, size)[None, :, None] * rng.choice([-1, 1])


def _busy_background(rng: np.random.RandomState, size: int) -> NDArray[np.float64]:
    colour = rng.randint(40, 200, 3).astype(np.float64)
    base = 0.35 * colour + 0.65 * colour.mean()  # low saturation, so that colour stays a cue of the objects
    rows, columns = np.mgrid[:size, :size]
    kind = rng.randint(4)
    if kind == 0:
        return np.broadcast_to(base, (size, size, 3)) + rng.normal(0, rng.uniform(2, 14), (size, size, 3))
    if kind == 1:
        tile = -(-size // 7)
        blocks = np.kron(rng.normal(0, 22, (7, 7)), np.ones((tile, tile)))[:size, :size, None]
        return base + blocks + rng.normal(0, 5, (size, size, 3))
    if kind == 2:
        angle, wavelength = rng.uniform(0, math.pi), rng.uniform(6, 24)
        phase = (columns * math.cos(angle) + rows * math.sin(angle)) * 2 * math.pi / wavelength
        return base + 18 * np.sin(phase)[..., None] + rng.normal(0, 4, (size, size, 3))
    slope = columns / size * rng.uniform(-1, 1) + rows / size * rng.uniform(-1, 1)
    return base + 50 * slope[..., None] + rng.normal(0, 6, (size, size, 3))


def _free_spot(
    rng: np.random.RandomState, placed: Sequence[tuple[float, float, float]], style: Style, size: int
) -> tuple[float, float, float] | None:
    """Centre x, y and radius in pixels of a place that keeps the style's distances; None after 40 tries."""
    for _ in range(40):
        radius = size * rng.uniform(*style.radius)
        x, y = rng.uniform(radius + 1, size - radius - 1, 2)
        if all(math.hypot(x - px, y - py) > style.gap * (radius + pr) for px, py, pr in placed):
            return float(x), float(y), radius
    return None


def _shape_mask(
    shape: str, spot: tuple[float, float, float], rotation: float, size: int
) -> NDArray[np.bool_]:
    x, y, radius = spot
    cosine, sine = math.cos(rotation), math.sin(rotation)
    outline = [
        (x + radius * (px * cosine - py * sine), y + radius * (px * sine + py * cosine))
        for px, py in SHAPES[shape]()
    ]
    canvas = Image.new("L", (size, size))
    ImageDraw.Draw(canvas).polygon(outline, fill=1)
    return np.array(canvas, dtype=bool)


Outline = list[tuple[float, float]]


def _regular(corners: int, turn: float = 0.0, radii: Sequence[float] = (1.0,)) -> Outline:
    return [
        (r * math.cos(turn + 2 * math.pi * i / corners), r * math.sin(turn + 2 * math.pi * i / corners))
        for i in range(corners)
        for r in (radii[i % len(radii)],)
    ]


def _cross() -> Outline:
    a = 0.33
    right = [(a, -1.0), (a, -a), (1.0, -a), (1.0, a), (a, a), (a, 1.0)]
    return right + [(-x, -y) for x, y in right]


def _crescent() -> Outline:
    outer = [(math.cos(t), math.sin(t)) for t in np.linspace(0.6, 2 * math.pi - 0.6, 24)]
    inner = [(0.5 + 0.72 * math.cos(t), 0.72 * math.sin(t)) for t in np.linspace(2 * math.pi - 0.9, 0.9, 20)]
    return outer + inner


#: Outline of each shape in a circle of radius 1, x to the right and y down.
SHAPES: dict[str, Callable[[], Outline]] = {
    "circle": lambda: _regular(36),
    "square": lambda: _regular(4, turn=math.pi / 4),
    "triangle": lambda: _regular(3, turn=-math.pi / 2),
    "star": lambda: _regular(10, turn=-math.pi / 2, radii=(1.0, 0.42)),
    "hexagon": lambda: _regular(6),
    "cross": _cross,
    "crescent": _crescent,
    "diamond": lambda: [(0.0, -1.0), (0.55, 0.0), (0.0, 1.0), (-0.55, 0.0)],
    "arrow": lambda: [(0.0, -1.0), (0.8, 0.0), (0.3, 0.0), (0.3, 0.9), (-0.3, 0.9), (-0.3, 0.0), (-0.8, 0.0)],
}
