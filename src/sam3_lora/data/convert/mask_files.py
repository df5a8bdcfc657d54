"""Masks as image files, turned into objects: their values, and the parts that are connected."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sam3_lora.data.convert import label_files
from sam3_lora.data.convert.objects import CocoObject, mask_object
from sam3_lora.data.convert.report import UNREADABLE, Report
from sam3_lora.data.convert.tree import Tree
from sam3_lora.errors import DataError

_LISTS = (
    "_classes.csv",
    "classes.txt",
    "labels.txt",
    "labelmap.txt",
    "classes.json",
    "id2label.json",
    "class_names.txt",
)
#: Names of what is not an object.
BACKGROUND = ("background", "_background_", "bg", "void", "unlabeled", "unlabelled", "ignore", "__ignore__")

Values = NDArray[np.int64]
Colour = tuple[int, int, int]


def read_values(path: Path) -> tuple[Values, dict[int, Colour]]:
    """Return the value of each pixel ``(H, W)``, and the colour of each value where the file has colours.

    Values of a palette or of grey are as stored; those of RGB are ``red << 16 | green << 8 | blue``.

    Raises:
        DataError: If the file is no image, or a photograph with too many colours.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode == "P":
                values = np.asarray(image).astype(np.int64)
                palette = (image.getpalette() or [])[:768]
                return values, {
                    i: (r, g, b) for i, (r, g, b) in enumerate(zip(*[iter(palette)] * 3, strict=False))
                }
            if image.mode in ("1", "L", "LA"):
                return np.asarray(image.convert("L")).astype(np.int64), {}
            if image.mode.startswith("I"):
                return np.asarray(image).astype(np.int64), {}
            rgb = np.asarray(image.convert("RGB")).astype(np.int64)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is no usable mask: {error}") from error
    values = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
    return values, {int(v): (int(v) >> 16, int(v) >> 8 & 255, int(v) & 255) for v in np.unique(values)}


def read_binary(path: Path) -> NDArray[np.bool_]:
    """Return which pixels ``(H, W)`` a mask of one class covers: 1 of 0 and 1, else the brighter half, so that JPEG does.

    Raises:
        DataError: If the file is no image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            values = np.asarray(
                image if image.mode in ("1", "P") or image.mode[0] == "I" else image.convert("L")
            )
            has_index = image.mode in ("1", "P") or image.mode[0] == "I"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is no usable mask: {error}") from error
    return values > (0 if has_index or values.max(initial=0) <= 1 else 127)


def masks_to_coco(masks: Sequence[NDArray[np.bool_]], category: str) -> list[CocoObject]:
    """Return an object for each mask ``(H, W)`` that is not empty, pixel by pixel."""
    return [mask_object(category, mask) for mask in masks if mask.any()]


def semantic_to_coco(values: Values, names: Mapping[int, str]) -> list[CocoObject]:
    """Return an object for each connected part of each named value; parts that touch at a corner are one."""
    objects = []
    for value, name in names.items():
        objects += [mask_object(name, part) for part in connected_parts(values == value)]
    return objects


def connected_parts(mask: NDArray[np.bool_]) -> Iterator[NDArray[np.bool_]]:
    """Yield each connected part of a mask ``(H, W)`` as a mask of the same size, in the order of rows."""
    count, labelled = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    for number in range(1, count):
        yield labelled == number


def instances_to_coco(values: Values, names: Mapping[int, str]) -> list[CocoObject]:
    """Return an object for each named value, all of its parts and holes together."""
    return [mask_object(name, values == value) for value, name in names.items()]


def voc_colours(count: int = 256) -> dict[int, Colour]:
    """Return Pascal VOC's colour of each value, the bits of which are spread over the three channels."""
    colours = {}
    for index in range(count):
        channels = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                channels[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
        colours[index] = (channels[0], channels[1], channels[2])
    return colours


def read_label_map(path: Path) -> list[tuple[str, Colour | None]]:
    """Return names and colours in CVAT's ``labelmap.txt``: ``name:r,g,b:parts:actions`` in each line.

    Raises:
        DataError: If it cannot be read.
    """
    entries: list[tuple[str, Colour | None]] = []
    for line in label_files.read_text(path).splitlines():
        if line.strip() and not line.startswith("#"):
            name, _, rest = line.partition(":")
            numbers = [int(n) for n in re.findall(r"\d+", rest.partition(":")[0])]
            entries.append(
                (name.strip(), (numbers[0], numbers[1], numbers[2]) if len(numbers) == 3 else None)
            )
    return entries


def unnamed(values: Values, names: Mapping[int, Any], ignored: Sequence[int] = (0,)) -> list[int]:
    """Return the values that are neither named nor ignored, the first few."""
    return [int(v) for v in np.unique(values) if int(v) not in names and int(v) not in ignored][:5]


def value_names(tree: Tree, report: Report) -> dict[int, str]:
    """Return the class of each pixel value that a list of classes beside the masks gives."""
    for name in _LISTS:
        for path in tree.files:
            if path.name == name:
                try:
                    return _read_names(path)
                except (DataError, ValueError, KeyError, csv.Error) as error:
                    report.problem(
                        UNREADABLE, str(error) if isinstance(error, DataError) else f"{path}: {error!r}"
                    )
    return {}


def _read_names(path: Path) -> dict[int, str]:
    if path.name == "labelmap.txt":
        entries = read_label_map(path)
        names = {i: name for i, (name, _) in enumerate(entries)}
        names.update({r << 16 | g << 8 | b: name for name, (r, g, b) in ((n, c) for n, c in entries if c)})
        return names
    if path.suffix == ".csv":  # Roboflow: "Pixel Value, Class"
        rows = list(csv.reader(label_files.read_text(path).splitlines(), skipinitialspace=True))
        return {int(row[0]): row[1].strip() for row in rows[1:] if len(row) > 1}
    if path.suffix == ".json":
        return _names_in(label_files.read_json(path), path)
    lines = [line.strip() for line in label_files.read_text(path).splitlines() if line.strip()]
    lines = [line for line in lines if line != "__ignore__"]
    start = 0 if lines and lines[0].lower() in BACKGROUND else 1
    return dict(enumerate(lines, start))


def _names_in(value: Any, path: Path) -> dict[int, str]:
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        start = 0 if value and value[0].lower() in BACKGROUND else 1
        return dict(enumerate(value, start))
    if isinstance(value, dict) and value:
        if all(isinstance(name, str) for name in value.values()):
            return {int(key): name for key, name in value.items()}
        return {int(number): str(name) for name, number in value.items()}
    raise DataError(f"{path} holds {json.dumps(value)[:60]}, not names by pixel value")
