"""YOLO labels: a text file for each image, a row for each object, in shares of the image's size.

Layouts: Ultralytics' ``images/`` and ``labels/`` with a YAML that names classes and splits, Roboflow's ``train/``,
``valid/`` and ``test/`` with ``data.yaml``, and Darknet's text files beside the images with ``obj.names``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam3_lora.data.convert import label_files
from sam3_lora.data.convert.items import Item, Size, Source
from sam3_lora.data.convert.objects import CocoObject, box_object
from sam3_lora.data.convert.pictures import FilePicture
from sam3_lora.data.convert.report import (
    BAD_SHAPE,
    EMPTY_NAME,
    IGNORED,
    LOST,
    ORPHAN,
    OUTSIDE,
    REPEATED,
    UNKNOWN_CLASS,
    UNREADABLE,
    Report,
)
from sam3_lora.data.convert.tree import Tree, split_of
from sam3_lora.errors import DataError

_NAME_FILES = ("classes.txt", "obj.names", "labels.names", "_darknet.labels")
_SPLIT_KEYS = {"train": "train", "val": "valid", "valid": "valid", "test": "test"}
_UNKNOWN = ("?",) * 10_000  # so that labels are checked for all else
_MOST_OVER = 0.05  # shares of the image; exports round, and crops cut. Ultralytics drops images with any


@dataclass(frozen=True)
class YoloLabels:
    """The label file of an image; None for an image without objects."""

    path: Path | None
    names: Sequence[str]
    keypoints: bool = False

    @property
    def place(self) -> str:
        return str(self.path)

    @property
    def are_empty(self) -> bool:
        return self.path is None or not self.path.stat().st_size

    def objects(self, size_hw: Size, report: Report) -> list[CocoObject]:
        if self.path is None:
            return []
        try:
            text = label_files.read_text(self.path)
        except DataError as error:
            report.problem(UNREADABLE, str(error))
            return []
        return yolo_to_coco(text, size_hw, self.names, report, self.place, keypoints=self.keypoints)


def recognise(tree: Tree) -> str:
    """Return what shows that these are YOLO labels, or ``""``."""
    for path in tree.with_suffix(".yaml", ".yml"):
        try:
            value = label_files.read_yaml(path)
        except DataError:
            if path.name == "data.yaml":
                return f"{tree.relative(path)}"
            continue
        if isinstance(value, dict) and "names" in value:
            return f"{tree.relative(path)} with 'names'"
    if tree.only is not None:
        return ""
    expected = {key for image in tree.images for key in _label_keys(image)}
    for path in tree.with_suffix(".txt"):
        if path.with_suffix("") in expected and path.name not in _NAME_FILES and _is_label_file(path):
            return f"{tree.relative(path)} with a row of numbers for each object"
    return ""


def plan(tree: Tree, report: Report, class_name: str | None = None) -> Source:
    """Return the images below a folder with their label files."""
    config, config_path = _config(tree, report)
    names = _names(config, config_path, tree, report)
    splits = _config_splits(config, config_path, tree, report)
    labels = {path.with_suffix(""): path for path in tree.with_suffix(".txt")}
    keypoints = "kpt_shape" in config
    items, used = [], set()
    for image in tree.images:
        if splits and image not in splits:
            report.note(IGNORED, f"{image} is in no split of {config_path}")
            continue
        path = next((labels[key] for key in _label_keys(image) if key in labels), None)
        used.add(path)
        split = splits.get(image) or split_of(tree.relative(image))
        items.append(Item(FilePicture(image), YoloLabels(path, names, keypoints), split))
    for path in labels.values():
        if path not in used and (path.parent.name == "labels" or "labels" in tree.relative(path).parts):
            report.note(ORPHAN, str(path))
    if used <= {None}:
        report.problem(
            UNREADABLE, f"{tree.root} has no label file for any image: labels/x.txt belongs to images/x.jpg"
        )
    return Source(items, names)


def yolo_to_coco(
    text: str,
    size_hw: Size,
    names: Sequence[str],
    report: Report | None = None,
    place: str = "the labels",
    *,
    keypoints: bool = False,
) -> list[CocoObject]:
    """Return the objects of one label file.

    A row of five values is ``class cx cy w h``, a box; one of seven or more is ``class x1 y1 x2 y2 x3 y3 ...``, a
    polygon. All are shares of the image's size.

    Args:
        names: The classes by their number.
        keypoints: Whether more than five values are a box and keypoints, which are left out.

    Raises:
        DataError: If a row cannot be used and no report takes the problems.
    """
    given, report = report, report or Report()
    objects: list[CocoObject] = []
    seen: set[str] = set()
    for number, row in enumerate(text.splitlines(), 1):
        if not row.strip():
            continue
        where = f"{place} line {number}"
        if row.strip() in seen:
            report.note(REPEATED, where)
            continue
        seen.add(row.strip())
        found = _row_to_object(row, size_hw, names, report, where, keypoints)
        objects += [found] if found else []
    if given is None:
        report.raise_problems(place)
    return objects


def _row_to_object(
    row: str, size_hw: Size, names: Sequence[str], report: Report, where: str, keypoints: bool
) -> CocoObject | None:
    try:
        index, *values = [float(word) for word in row.split()]
    except ValueError:
        report.problem(BAD_SHAPE, f"{where} is {row.strip()[:40]!r}, not a row of numbers")
        return None
    if index != int(index) if math.isfinite(index) else True:
        report.problem(UNKNOWN_CLASS, f"{where} has class {row.split()[0]}, which is not a whole number")
        return None
    if not 0 <= index < len(names):
        report.problem(UNKNOWN_CLASS, f"{where} has class {index:.0f}; 'names' has 0 to {len(names) - 1}")
        return None
    if keypoints and len(values) > 4:
        report.note(LOST, f"{where}: keypoints")
        values = values[:4]
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        report.problem(
            BAD_SHAPE, f"{where} has {len(values)} numbers after the class: 4 are a box, 6, 8, ... a polygon"
        )
        return None
    if not all(map(math.isfinite, values)):
        report.problem(BAD_SHAPE, f"{where} has a NaN or infinite number")
        return None
    if min(values) < -_MOST_OVER or max(values) > 1 + _MOST_OVER:
        report.problem(
            OUTSIDE, f"{where} has {max(values, key=abs):g}; values are shares of the image, 0 to 1"
        )
        return None
    return _shape(names[int(index)], values, size_hw)


def _shape(name: str, values: list[float], size_hw: Size) -> CocoObject:
    height, width = size_hw
    if len(values) == 4:
        cx, cy, w, h = values
        return box_object(name, [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height])
    return CocoObject(name, [[v * (height if i % 2 else width) for i, v in enumerate(values)]])


def _is_label_file(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            words = file.readline(65536).split()
        return len(words) >= 5 and all(math.isfinite(float(word)) for word in words)
    except (OSError, ValueError):
        return False


def _label_keys(image: Path) -> list[Path]:
    """Return the paths without suffix that the labels of an image may have: in ``labels/`` for ``images/``, or beside."""
    parts = list(image.with_suffix("").parts)
    keys = []
    for position in range(len(parts) - 2, -1, -1):
        if parts[position].lower() in ("images", "jpegimages", "obj_train_data"):
            keys.append(Path(*parts[:position], "labels", *parts[position + 1 :]))
            break
    return [*keys, image.with_suffix(""), image.parent / "labels" / image.stem]


def _config(tree: Tree, report: Report) -> tuple[dict[str, Any], Path | None]:
    """Return the YAML with the classes, or an empty one."""
    found: list[tuple[dict[str, Any], Path]] = []
    for path in tree.with_suffix(".yaml", ".yml"):
        try:
            value = label_files.read_yaml(path)
        except DataError as error:
            report.problem(UNREADABLE, str(error))
            continue
        if isinstance(value, dict) and "names" in value:
            found.append((value, path))
    if len(found) > 1:
        shown = ", ".join(str(tree.relative(path)) for _, path in found)
        report.problem(
            UNREADABLE, f"{tree.root} has several lists of classes: {shown}; give one of them as the source"
        )
    return found[0] if found else ({}, None)


def _names(config: dict[str, Any], path: Path | None, tree: Tree, report: Report) -> Sequence[str]:
    """Return the classes by their number; where they cannot be known, as many as any label needs."""
    if path is not None:
        return _config_names(config["names"], path, report)
    for file in tree.with_suffix(".txt", ".names", ".labels"):
        if file.name in _NAME_FILES:
            try:
                return [line.strip() for line in label_files.read_text(file).splitlines() if line.strip()]
            except DataError as error:
                report.problem(UNREADABLE, str(error))
                return _UNKNOWN
    report.problem(
        UNKNOWN_CLASS, f"{tree.root} names no classes: it has no data.yaml with 'names' and no classes.txt"
    )
    return _UNKNOWN


def _config_names(names: Any, path: Path, report: Report) -> Sequence[str]:
    if isinstance(names, dict):
        numbered = {int(key): name for key, name in names.items() if str(key).isdecimal()}
        whole = bool(names) and len(numbered) == len(names) and max(numbered) < len(_UNKNOWN)
        # A number that is left out is not named, and no mistake as long as no label has it.
        listed: Any = [numbered.get(i, f"class {i}") for i in range(max(numbered) + 1)] if whole else None
    else:
        listed = names
    if not isinstance(listed, list) or not listed:
        report.problem(UNREADABLE, f"{path}: 'names' is {repr(names)[:60]}, not a list of classes")
        return _UNKNOWN
    for number, name in enumerate(listed):
        if not isinstance(name, (str, int, float)) or not str(name).strip():
            report.problem(EMPTY_NAME, f"{path}: class {number} has the name {repr(name)[:60]}")
    return [str(name) for name in listed]


def _config_splits(config: dict[str, Any], path: Path | None, tree: Tree, report: Report) -> dict[Path, str]:
    """Return the split of each image that the YAML lists; empty if it lists none."""
    splits: dict[Path, str] = {}
    for key, split in _SPLIT_KEYS.items():
        value = config.get(key)
        entries = value if isinstance(value, list) else [value] if value else []
        for entry in entries:
            images = _listed_images(str(entry), str(config.get("path") or ""), path or tree.root, tree)
            if images is None:
                report.note(LOST, f"{path}: '{key}: {entry}' is not below {tree.root}")
            splits.update(dict.fromkeys(images or [], split))
    return splits


def _listed_images(entry: str, base: str, config: Path, tree: Tree) -> list[Path] | None:
    """Return the images in a folder or in a list; None if there is none such below the root.

    Roboflow writes ``../train/images`` for what lies beside the YAML, and Ultralytics' ``path`` is that of another
    machine more often than not: so the end of the path counts.
    """
    parts = [p for p in f"{base}/{entry}".replace("\\", "/").split("/") if p not in ("", ".", "..")]
    for start in range(len(parts)):
        place = config.parent.joinpath(*parts[start:])
        if place.suffix == ".txt" and place.is_file():
            return _images_in_list(place, tree)
        images = [image for image in tree.images if place in image.parents]
        if images:
            return images
    return None


def _images_in_list(path: Path, tree: Tree) -> list[Path]:
    found = []
    for line in label_files.read_text(path).splitlines():
        image = tree.find_image(line, path.parent, Report(), "") if line.strip() else None
        found += [image] if image else []
    return found
