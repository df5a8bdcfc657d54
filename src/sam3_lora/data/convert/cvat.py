"""CVAT's own XML: images with shapes ("CVAT for images 1.1"), and frames with tracks ("CVAT for video 1.1")."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from sam3_lora.data.convert import label_files
from sam3_lora.data.convert.items import Item, Known, Size, Source, note_unlabelled
from sam3_lora.data.convert.label_files import head_of
from sam3_lora.data.convert.objects import CocoObject, box_object, ellipse, mask_object
from sam3_lora.data.convert.pictures import FilePicture
from sam3_lora.data.convert.report import BAD_SHAPE, MISSING_IMAGE, NO_AREA, NO_CLASS, UNREADABLE, Report
from sam3_lora.data.convert.tree import Tree, split_in_name, split_of
from sam3_lora.errors import DataError

_SHAPES = ("polygon", "box", "mask", "ellipse")
_WITHOUT_AREA = ("polyline", "points", "cuboid", "skeleton", "tag")


def recognise(tree: Tree) -> str:
    """Return what shows that there is a CVAT file, or ``""``."""
    return next((f"{tree.relative(path)} with <annotations>" for path in _files(tree)), "")


def plan(tree: Tree, report: Report, class_name: str | None = None) -> Source:
    """Return the images of all CVAT files below a folder, and the classes that these list."""
    items: list[Item] = []
    classes: dict[str, None] = {}
    for path in _files(tree):
        try:
            root = label_files.read_xml(path)
        except DataError as error:
            report.problem(UNREADABLE, str(error))
            continue
        names = [label.findtext("name", "").strip() for label in root.iterfind("meta//labels/label")]
        classes.update(dict.fromkeys(filter(None, names)))
        items += _images(root, path, tree, report)
        items += _frames(root, path, tree, report)
    note_unlabelled(tree.images, items, report)
    return Source(items, list(classes))


def cvat_to_coco(
    shape: Element,
    size_hw: Size,
    label: str | None = None,
    report: Report | None = None,
    place: str = "the shape",
) -> CocoObject | None:
    """Return the object of one element, ``<polygon>``, ``<box>``, ``<ellipse>`` or ``<mask>``; masks keep every pixel.

    Args:
        label: The class, for shapes of a track, which do not name it.

    Raises:
        DataError: If it cannot be used and no report takes the problem.
    """
    given, report = report, report or Report()
    found = None
    label = shape.get("label") or label
    if shape.tag in _WITHOUT_AREA:
        report.note(NO_AREA, f"{place} is a <{shape.tag}>")
    elif not label:
        report.problem(NO_CLASS, place)
    else:
        try:
            found = _object(shape, size_hw, label)
        except (KeyError, ValueError, OverflowError) as error:
            report.problem(BAD_SHAPE, f"{place}, a <{shape.tag}>: {type(error).__name__} {error}")
    if given is None:
        report.raise_problems(place)
    return found


def _object(shape: Element, size_hw: Size, label: str) -> CocoObject:
    given = shape.attrib
    if shape.tag == "polygon":
        points = [pair.split(",") for pair in given["points"].split(";")]
        return CocoObject(label, [[float(value) for pair in points for value in pair]])
    if shape.tag == "mask":
        return mask_object(label, _mask(given, size_hw))
    angle = math.radians(float(given.get("rotation", 0)))
    if shape.tag == "ellipse":
        cx, cy, rx, ry = (float(given[key]) for key in ("cx", "cy", "rx", "ry"))
        return CocoObject(label, [ellipse(cx, cy, rx, ry, angle)])
    x0, y0, x1, y1 = (float(given[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
    if not angle:
        return box_object(label, [x0, y0, x1 - x0, y1 - y0])
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    cosine, sine = math.cos(angle), math.sin(angle)
    corners = [(x0 - cx, y0 - cy), (x1 - cx, y0 - cy), (x1 - cx, y1 - cy), (x0 - cx, y1 - cy)]
    turned = [(cx + x * cosine - y * sine, cy + x * sine + y * cosine) for x, y in corners]
    return CocoObject(label, [[value for point in turned for value in point]], is_box=True)


def _mask(given: Mapping[str, str], size_hw: Size) -> Any:
    """Return the mask whose run lengths go row by row through a box of the image, from what is not covered."""
    runs = [int(word) for word in given["rle"].split(",")]
    x, y, width, height = (round(float(given[key])) for key in ("left", "top", "width", "height"))
    if min(x, y) < 0 or min(width, height) < 1 or x + width > size_hw[1] or y + height > size_hw[0]:
        raise ValueError(f"its box {width} x {height} at {x}, {y} leaves the image")
    if min(runs) < 0 or sum(runs) > width * height:
        raise ValueError(f"its run lengths have {sum(runs)} pixels; its box has {width * height}")
    flat = np.zeros(width * height, dtype=bool)
    ends = np.cumsum(runs)
    for start, end in zip(ends[0::2], ends[1::2], strict=False):
        flat[start:end] = True
    mask = np.zeros(size_hw, dtype=bool)
    mask[y : y + height, x : x + width] = flat.reshape(height, width)
    return mask


def _files(tree: Tree) -> list[Path]:
    return [path for path in tree.with_suffix(".xml") if re.search(rb"<annotations[\s>]", head_of(path))]


def _images(root: Element, path: Path, tree: Tree, report: Report) -> list[Item]:
    items = []
    for image in root.iterfind("image"):
        place = f"{path}: {image.get('name')}"
        file = tree.find_image(image.get("name"), path.parent, report, str(path))
        size_hw = _size_hw(image.get("width"), image.get("height"))
        if size_hw is None:
            report.problem(UNREADABLE, f"{place} has no width and height")
        if file is None or size_hw is None:
            continue
        own = Report()
        objects = []
        for number, shape in enumerate(image, 1):
            if shape.tag in _SHAPES or shape.tag in _WITHOUT_AREA:
                where = f"{place}: shape {number} ({shape.get('label')!r})"
                found = cvat_to_coco(shape, size_hw, None, own, where)
                objects += [found] if found else []
        split = (
            split_in_name(image.get("subset") or "")
            or split_in_name(path.stem)
            or split_of(tree.relative(file))
        )
        items.append(Item(FilePicture(file), Known(objects, place, own), split, size_hw))
    return items


def _frames(root: Element, path: Path, tree: Tree, report: Report) -> list[Item]:
    """Return the images of the frames that tracks are on; CVAT writes out the shapes between its key frames."""
    size_hw = _size_hw(
        root.findtext("meta//original_size/width"), root.findtext("meta//original_size/height")
    )
    tracks = root.findall("track")
    if not tracks:
        return []
    if size_hw is None:
        report.problem(UNREADABLE, f"{path} has tracks, and no <original_size> in its <meta>")
        return []
    objects: dict[int, list[CocoObject]] = defaultdict(list)
    own = Report()
    for track in tracks:
        place = f"{path}: track {track.get('id')} ({track.get('label')!r})"
        for shape in track:
            if shape.tag not in _SHAPES or shape.get("outside") == "1":
                continue
            found = cvat_to_coco(
                shape, size_hw, track.get("label"), own, f"{place} frame {shape.get('frame')}"
            )
            number = shape.get("frame", "")
            if found and number.isdigit():
                objects[int(number)].append(found)
    report.merge(own)
    files = _frame_files(path, tree)
    for frame in sorted(objects.keys() - files.keys()):
        report.problem(
            MISSING_IMAGE, f"{path} means frame {frame}: export with 'Save images', or cut the video"
        )
    return [
        Item(
            FilePicture(file),
            Known(objects[frame], f"{path}: frame {frame}"),
            split_of(tree.relative(file)),
            size_hw,
        )
        for frame, file in sorted(files.items())
    ]


def _frame_files(path: Path, tree: Tree) -> dict[int, Path]:
    """Return the images by the number at the end of their names, ``frame_000012.png``."""
    files: dict[int, Path] = {}
    for image in tree.images:
        number = re.search(r"(\d+)$", image.stem)
        if number and path.parent in image.parents:
            files.setdefault(int(number[1]), image)
    return files


def _size_hw(width: str | None, height: str | None) -> Size | None:
    if (width or "").isdigit() and (height or "").isdigit():
        return int(height or 0), int(width or 0)
    return None
