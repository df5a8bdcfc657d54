"""Training images on their way to the model: augmented, and brought to the square that it takes.

Made of the official transforms where there is one, and in their interface: a ``Datapoint`` in, a ``Datapoint`` out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sam3_lora.base.cpu import provide_triton
from sam3_lora.errors import ConfigError, as_report
from sam3_lora.training.image_settings import chosen_augmentations, image_problems

provide_triton()

from sam3.train.transforms.basic import get_random_resize_scales  # noqa: E402
from sam3.train.transforms.basic_for_api import (  # noqa: E402
    ColorJitter,
    PadToSizeAPI,
    RandomHorizontalFlip,
    RandomResizeAPI,
    crop,
    pad,
    resize,
)

# Small enough that "red" stays red: a hue of 0.03 is 11 degrees.
_COLOR = {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.03}
_ZOOM = (0.5, 2.0)
_TRIES = 10
_LEAST_VISIBLE = 0.25  # of an object that a crop cuts; less would teach slivers

_Region = tuple[int, int, int, int]  # top, left, height, width in pixels, as the official crop takes it


class TrainImages:
    """The transform that augments a training image and makes it a square of ``resolution`` pixels.

    It draws from Python's and torch's random state; in training ``SeededItems`` sets both for each image.

    Args:
        augment: ``none``, ``flip``, ``color``, ``scale``, ``all``, or a list of them.
        resize: ``squash`` resizes to the square, as prediction does; ``official`` to a smaller one of a random side,
            at a random place of a black canvas, as the official training recipe does.
        resolution: Side in pixels of the square.

    Raises:
        ConfigError: For names that do not exist, all at once.
    """

    def __init__(
        self,
        augment: str | Sequence[str] = "none",
        resize: str = "squash",
        resolution: int = 1008,
    ) -> None:
        if problems := image_problems({"training.augment": augment, "training.resize": resize}, ""):
            raise ConfigError(as_report(problems))
        self._transforms = [
            *_augmentations(chosen_augmentations(augment), resize, resolution),
            *_resizing(resize, resolution),
        ]

    def __call__(self, datapoint: Any, **_: Any) -> Any:
        for transform in self._transforms:
            datapoint = transform(datapoint)
        return datapoint


class RandomZoom:
    """Show a part of each image, or all of it smaller on a black canvas; the aspect of what is seen stays.

    A crop leaves input boxes and points whole, keeps at least one object if there was one, and of each object it cuts
    at least a quarter; where ten tries give no such crop, the image stays as it is. Masks are moved by whole pixels, an
    object that is cut gets the box of what is left of it, and one that is outside area 0, for ``FilterEmptyTargets``.

    Args:
        least: The smallest zoom, 1 or less; drawn evenly on a logarithmic scale.
        most: The largest, 1 or more.
        resolution: Side in pixels of the canvas on which a smaller image is put, squashed.
    """

    def __init__(self, least: float, most: float, resolution: int) -> None:
        self._range = (math.log(least), math.log(most))
        self._resolution = resolution

    def __call__(self, datapoint: Any, **_: Any) -> Any:
        for index in range(len(datapoint.images)):
            zoom = math.exp(random.uniform(*self._range))
            change = self._enlarge if zoom > 1 else self._shrink
            datapoint = change(datapoint, index, zoom)
        return datapoint

    def _shrink(self, datapoint: Any, index: int, zoom: float) -> Any:
        side = round(self._resolution * zoom)
        left, top = (random.randint(0, self._resolution - side) for _ in range(2))
        datapoint = resize(datapoint, index, side, square=True)
        pad(datapoint, index, (left, top, self._resolution - side - left, self._resolution - side - top))
        return datapoint

    def _enlarge(self, datapoint: Any, index: int, zoom: float) -> Any:
        width, height = datapoint.images[index].data.size
        w, h = max(1, round(width / zoom)), max(1, round(height / zoom))
        for _ in range(_TRIES):
            region = (random.randint(0, height - h), random.randint(0, width - w), h, w)
            shares = [_visible_share(item, region) for item in datapoint.images[index].objects]
            if _is_fair(shares) and _keeps_prompts(datapoint, index, region):
                return _cropped(datapoint, index, region, shares)
        return datapoint


def _augmentations(names: Sequence[str], resize: str, resolution: int) -> list[Any]:
    # The official resizing shrinks by itself.
    zoom = _ZOOM if resize == "squash" else (1.0, _ZOOM[1])
    made = {
        "flip": RandomHorizontalFlip(consistent_transform=False),
        "color": ColorJitter(consistent_transform=False, **_COLOR),
        "scale": RandomZoom(*zoom, resolution),
    }
    return [made[name] for name in names]


def _resizing(resize: str, resolution: int) -> list[Any]:
    if resize == "squash":
        return [RandomResizeAPI(sizes=resolution, square=True, consistent_transform=False)]
    # The official recipe says 480 of 1008.
    sides = get_random_resize_scales(resolution, min_size=480 * resolution // 1008, rounded=False)
    return [
        RandomResizeAPI(sizes=sides, square=True, consistent_transform=False),
        PadToSizeAPI(size=resolution, consistent_transform=False),
    ]


def _visible_share(item: Any, region: _Region) -> float:
    """Return how much of an object lies in the region, 0 to 1: of its mask, or else of its box."""
    top, left, height, width = region
    if item.segment is not None:
        inside = item.segment[top : top + height, left : left + width]
        return float(inside.sum()) / max(1, int(item.segment.sum()))
    x0, y0, x1, y1 = item.bbox.flatten().tolist()
    w = min(x1, left + width) - max(x0, left)
    h = min(y1, top + height) - max(y0, top)
    return max(w, 0) * max(h, 0) / max((x1 - x0) * (y1 - y0), 1e-9)


def _is_fair(shares: Sequence[float]) -> bool:
    whole_or_part = all(share == 0 or share >= _LEAST_VISIBLE for share in shares)
    return whole_or_part and (any(shares) or not shares)


def _keeps_prompts(datapoint: Any, index: int, region: _Region) -> bool:
    """Return whether all input boxes and points of an image lie in the region."""
    top, left, height, width = region
    queries = [query for query in datapoint.find_queries if query.image_id == index]
    points = [query.input_bbox.reshape(-1, 2) for query in queries if query.input_bbox is not None]
    points += [
        query.input_points.reshape(-1, 3)[:, :2] for query in queries if query.input_points is not None
    ]
    least, most = torch.tensor([left, top]), torch.tensor([left + width, top + height])
    return all(bool(((xy >= least) & (xy <= most)).all()) for xy in points)


def _cropped(datapoint: Any, index: int, region: _Region, shares: Sequence[float]) -> Any:
    areas = [item.area for item in datapoint.images[index].objects]
    datapoint = crop(datapoint, index, region, check_validity=False)
    for item, area, share in zip(datapoint.images[index].objects, areas, shares, strict=True):
        item.area = area * share  # the official crop changes its unit
        if 0 < share < 1 and item.segment is not None:
            item.bbox = _box_of(item.segment)
    return datapoint


def _box_of(mask: Tensor) -> Tensor:
    """Return the box ``(1, 4)`` xyxy of a mask ``(H, W)``, right and lower edge outside, as annotations have it; the
    official function has them inside."""
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    return torch.tensor([[float(edge) for edge in edges]])
