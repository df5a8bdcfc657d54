"""Objects drawn on one image: masks, boxes and labels, with PIL and numpy only."""

from __future__ import annotations

import colorsys
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from pycocotools import mask as coco_mask

from sam3_lora.data.coco import compressed_run_lengths

Colour = tuple[int, int, int]
BoxXyxy = Sequence[float]
#: ``(H, W)`` bool, or a COCO segmentation of the size of the image: RLE or polygons.
Mask = NDArray[np.bool_] | Mapping[str, Any] | Sequence[Sequence[float]]

INK = (32, 33, 36)
PAPER = (255, 255, 255)

_MIN_SIDE = 448  # pixels; smaller pictures are enlarged, so that the text on them can be read
_PALETTE: tuple[Colour, ...] = (
    (240, 30, 100), (90, 220, 60), (255, 215, 0), (60, 110, 245), (255, 130, 20), (160, 60, 220), (60, 220, 240),
    (245, 90, 235), (0, 160, 120), (255, 170, 190), (150, 90, 40), (180, 150, 255), (190, 240, 150), (140, 10, 30),
)  # fmt: skip


@dataclass(frozen=True)
class Instance:
    """One object of an image: its box xyxy in pixels, its mask if known, its score 0..1 unless it is ground truth."""

    category: str
    box_xyxy: BoxXyxy
    mask: Mask | None = None
    score: float | None = None


def draw_objects(
    image: Image.Image,
    masks: Sequence[Mask | None] | NDArray[np.bool_] | None,
    boxes_xyxy: Sequence[BoxXyxy] | NDArray[np.floating[Any]],
    labels: Sequence[str],
    scores: Sequence[float | None] | None = None,
    alpha: float = 0.5,
    *,
    colours: Mapping[str, Colour] | None = None,
    side: int | None = None,
) -> Image.Image:
    """Return a copy of the image with masks, boxes and labels drawn on it.

    Args:
        image: Any mode and size.
        masks: For each object its mask, of the size of the image; ``None`` for boxes only.
        boxes_xyxy: ``(N, 4)`` in pixels of ``image``.
        labels: One for each object; objects of one label share a colour.
        scores: 0 to 1, shown after the labels.
        alpha: Opacity of the masks, 0 (unseen) to 1 (solid).
        colours: RGB for each label; by default :func:`label_colours` of the labels.
        side: Longest side of the result in pixels. By default that of the image, or 448 if it is smaller.

    Raises:
        ValueError: If the lengths differ or a mask is not of the size of the image.
    """
    count = len(labels)
    instances = [
        Instance(label, [float(edge) for edge in box], mask, score)
        for label, box, mask, score in zip(
            labels,
            boxes_xyxy,
            [None] * count if masks is None else masks,
            [None] * count if scores is None else scores,
            strict=True,
        )
    ]
    return draw_instances(
        image, instances, alpha, colours or label_colours(labels), side or max(_MIN_SIDE, *image.size)
    )


def label_colours(labels: Iterable[str]) -> dict[str, Colour]:
    """Return a colour for each distinct label, in order of first appearance; the first fourteen differ most."""
    distinct = list(dict.fromkeys(labels))
    return {label: _colour(index) for index, label in enumerate(distinct)}


def draw_instances(
    image: Image.Image, instances: Sequence[Instance], alpha: float, colours: Mapping[str, Colour], side: int
) -> Image.Image:
    """Draw at the final size, so that lines and text are as sharp on small images as on large ones."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    pixels = np.array(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    line = max(2, side // 300)
    by_area = sorted(instances, key=lambda item: -_area(item.box_xyxy))  # small ones stay visible
    for item in by_area:
        if item.mask is not None:
            _blend(pixels, _scaled_mask(item.mask, image.size, size), colours[item.category], alpha, line)
    canvas = Image.fromarray(pixels.round().astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    for item in by_area:
        pen.rectangle(_scaled_box(item.box_xyxy, scale, size), outline=colours[item.category], width=line)
    taken: list[tuple[int, int, int, int]] = []
    for item in by_area:
        box = _scaled_box(item.box_xyxy, scale, size)
        _draw_tag(pen, _tag_text(item), box, colours[item.category], size, max(13, side // 50), taken)
    return canvas


@cache
def font_of_size(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # a bitmap font only if no size is given
    return font


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Cut the text so that it fits into ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    fitting = bisect_right(range(1, len(text)), width, key=lambda length: font.getlength(f"{text[:length]}…"))
    return f"{text[:fitting].rstrip()}…"


def _colour(index: int) -> Colour:
    if index < len(_PALETTE):
        return _PALETTE[index]
    hue = index * 0.618034 % 1  # the golden ratio spreads any number of hues
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.65 + 0.3 * (index % 2), 0.95 - 0.25 * (index % 3) / 2)
    return round(red * 255), round(green * 255), round(blue * 255)


def _area(box_xyxy: BoxXyxy) -> float:
    x0, y0, x1, y1 = box_xyxy
    return (x1 - x0) * (y1 - y0)


def _scaled_box(box_xyxy: BoxXyxy, scale: float, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Scale a box, keep it inside the picture, and make it at least a pixel wide and high."""
    x0, x1 = (min(max(edge * scale, 0), size[0] - 1) for edge in (box_xyxy[0], box_xyxy[2]))
    y0, y1 = (min(max(edge * scale, 0), size[1] - 1) for edge in (box_xyxy[1], box_xyxy[3]))
    return x0, y0, max(x0, x1), max(y0, y1)


def _scaled_mask(mask: Mask, image_size: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    """Return the mask at ``size`` (width, height) with smooth edges, 0 or 255."""
    if isinstance(mask, np.ndarray):
        array = mask
    else:
        array = coco_mask.decode(compressed_run_lengths(mask, (image_size[1], image_size[0])))
    if array.shape != (image_size[1], image_size[0]):
        raise ValueError(
            f"the mask has the shape {array.shape}, the image is {image_size[0]} wide and {image_size[1]} high"
        )
    grey = Image.fromarray(array.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    enlarged = size[0] / image_size[0]
    if enlarged > 1:
        grey = grey.filter(ImageFilter.GaussianBlur(enlarged / 2))  # else every pixel of the mask is a step
    return grey.point([0] * 128 + [255] * 128)


def _blend(pixels: NDArray[np.float32], mask: Image.Image, colour: Colour, alpha: float, line: int) -> None:
    """Lay the colour over the mask and draw its outline, in place."""
    inside = np.asarray(mask) > 0
    core = np.asarray(mask.filter(ImageFilter.MinFilter(2 * line - 1))) > 0
    pixels[inside] += alpha * (np.array(colour, dtype=np.float32) - pixels[inside])
    pixels[inside & ~core] = colour


def _tag_text(item: Instance) -> str:
    return item.category if item.score is None else f"{item.category} {item.score:.2f}"


def _draw_tag(
    pen: ImageDraw.ImageDraw,
    text: str,
    box: tuple[float, float, float, float],
    colour: Colour,
    size: tuple[int, int],
    text_size: int,
    taken: list[tuple[int, int, int, int]],
) -> None:
    """Draw the label at a corner of the box where it hides no other label, and add its place to ``taken``."""
    font = font_of_size(text_size)
    pad = max(3, text_size // 4)
    text = shorten(text, font, size[0] - 2 * pad)
    width, height = round(font.getlength(text)) + 2 * pad, text_size + 2 * pad
    x0, y0, x1, y1 = (round(edge) for edge in box)
    left, right = (max(0, min(x, size[0] - width)) for x in (x0, x1 - width))
    above, below = [(left, y0 - height)], [(left, y1)]
    inside = [(left, y0), (left, y1 - height), (right, y0), (right, y1 - height)]
    roomy = y1 - y0 > 4 * height and x1 - x0 > width
    corners = above + (inside + below if roomy else below + inside)
    places = [(x, y, x + width, y + height) for x, y in corners if 0 <= y <= size[1] - height]
    places.append((left, 0, left + width, height))
    place = next((p for p in places if not any(_overlap(p, other) for other in taken)), places[0])
    taken.append(place)
    pen.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=colour)
    pen.text((place[0] + pad, place[1] + height / 2), text, fill=_text_colour(colour), font=font, anchor="lm")


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _text_colour(background: Colour) -> Colour:
    """Dark on bright colours, white on the others (by the relative luminance of WCAG 2)."""
    linear = [
        channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
        for channel in (c / 255 for c in background)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return INK if luminance > 0.25 else PAPER
