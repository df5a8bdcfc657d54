"""COCO files wherever they lie: the original's ``annotations/instances_train2017.json``, Roboflow's
``_annotations.coco.json``, one file for everything, with the images beside, in a folder of their own or anywhere below."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam3_lora.data.convert.items import Item, Known, Size, Source, note_unlabelled
from sam3_lora.data.convert.objects import CocoObject, as_run_lengths, box_object
from sam3_lora.data.convert.pictures import FilePicture
from sam3_lora.data.convert.report import (
    BAD_SHAPE,
    EMPTY_NAME,
    IGNORED,
    JOINED,
    PARENT,
    UNKNOWN_CLASS,
    UNREADABLE,
    Report,
)
from sam3_lora.data.convert.tree import Tree, split_in_name, split_of


@dataclass
class _Gathered:
    """What the files say about one image."""

    size_hw: Size | None
    split: str | None
    place: str
    objects: list[CocoObject] = field(default_factory=list)
    report: Report = field(default_factory=Report)


def is_coco(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), list) for key in ("images", "annotations")
    )


def recognise(tree: Tree) -> str:
    """Return what shows that there are COCO files, or ``""``."""
    for path in tree.with_suffix(".json"):
        if is_coco(tree.json(path)):
            return f"{tree.relative(path)} with 'images' and 'annotations'"
    return ""


def plan(tree: Tree, report: Report, class_name: str | None = None) -> Source:
    """Return the images of all COCO files below a folder, each once, with its objects."""
    classes: dict[str, None] = {}
    images: dict[Path, _Gathered] = {}
    for path in _chosen(tree, report):
        document = tree.json(path)
        names = _class_names(document.get("categories"), path, report)
        if names:
            _gather(document, names, path, tree, images, report)
            classes.update(dict.fromkeys(_without_groups(document, names, path, report)))
    items = [
        Item(FilePicture(path), Known(g.objects, g.place, g.report), g.split, g.size_hw, upright=False)
        for path, g in sorted(images.items())
    ]
    note_unlabelled(tree.images, items, report)
    return Source(items, list(classes))


def coco_to_coco(
    annotation: Mapping[str, Any],
    names: Mapping[Any, str],
    report: Report | None = None,
    place: str = "the annotation",
) -> list[CocoObject]:
    """Return the object of one annotation of any COCO file; polygons and run lengths stay what they are.

    Args:
        names: The classes by their id.

    Raises:
        DataError: If it cannot be used and no report takes the problems.
    """
    given, report = report, report or Report()
    found = _object(annotation, names, report, place)
    if given is None:
        report.raise_problems(place)
    return [found] if found else []


def _object(
    annotation: Mapping[str, Any], names: Mapping[Any, str], report: Report, place: str
) -> CocoObject | None:
    key = annotation.get("category_id")
    name = names.get(key) if isinstance(key, (int, str)) else None
    if name is None:
        report.problem(UNKNOWN_CLASS, f"{place} has category_id {key!r}")
        return None
    crowd = 1 if annotation.get("iscrowd") in (1, True, "1") else 0
    segmentation, box = annotation.get("segmentation"), annotation.get("bbox")
    if isinstance(segmentation, dict):
        return CocoObject(name, as_run_lengths(segmentation), crowd)
    if isinstance(segmentation, list) and segmentation:
        parts = segmentation if isinstance(segmentation[0], list) else [segmentation]
        if all(isinstance(part, list) for part in parts):
            return CocoObject(name, [part for part in parts if part], crowd)
    elif isinstance(box, list) and len(box) == 4 and all(isinstance(v, (int, float)) for v in box):
        return box_object(name, box, crowd)
    report.problem(BAD_SHAPE, f"{place} has segmentation {str(segmentation)[:40]} and bbox {str(box)[:40]}")
    return None


def _chosen(tree: Tree, report: Report) -> list[Path]:
    """Return the files to convert. Where there are ``instances_*``, the original's keypoints and captions are not."""
    found = [path for path in tree.with_suffix(".json") if is_coco(tree.json(path))]
    instances = [path for path in found if path.name.startswith("instances")]
    for path in found:
        if instances and path not in instances:
            report.note(IGNORED, str(path))
    return instances or found


def _class_names(categories: Any, path: Path, report: Report) -> dict[Any, str]:
    names: dict[Any, str] = {}
    for category in categories if isinstance(categories, list) else []:
        key, name = (category.get("id"), category.get("name")) if isinstance(category, dict) else (None, None)
        if not isinstance(key, (int, str)) or not isinstance(name, (str, int)) or not str(name).strip():
            report.problem(EMPTY_NAME, f"{path}: category {str(category)[:60]}")
        else:
            names[key] = str(name)
    if not names:
        report.problem(UNREADABLE, f"{path} has no 'categories'")
    return names


def _without_groups(document: Any, names: Mapping[Any, str], path: Path, report: Report) -> list[str]:
    """Return the classes without those that label nothing and only group others, as Roboflow's class 0 does."""
    used = {a.get("category_id") for a in document["annotations"] if isinstance(a, dict) and _has_class(a)}
    above = [(c.get("id"), c.get("supercategory")) for c in document["categories"] if isinstance(c, dict)]
    kept = []
    for key, name in names.items():
        groups_others = any(group == name and other != key for other, group in above)
        if key not in used and groups_others and (key, name) not in above:
            report.note(PARENT, f"{path}: {name!r}")
        else:
            kept.append(name)
    return kept


def _has_class(annotation: Mapping[str, Any]) -> bool:
    return isinstance(annotation.get("category_id"), (int, str))


def _gather(
    document: Any,
    names: Mapping[Any, str],
    path: Path,
    tree: Tree,
    images: dict[Path, _Gathered],
    report: Report,
) -> None:
    by_image: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    known = {
        i.get("id") for i in document["images"] if isinstance(i, dict) and isinstance(i.get("id"), (int, str))
    }
    for number, annotation in enumerate(document["annotations"]):
        key = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not isinstance(key, (int, str)) or key not in known:
            report.problem(
                BAD_SHAPE, f"{path}: annotation at position {number} is of image {key!r}, which is not listed"
            )
        else:
            by_image[key].append(annotation)
    # A file says its split by its own name, or by its folder; else each image by its folder.
    split = split_in_name(path.stem) or split_of(tree.relative(path))
    for number, image in enumerate(document["images"]):
        place = f"{path}: image at position {number}"
        if not isinstance(image, dict) or not isinstance(image.get("id"), (int, str)):
            report.problem(UNREADABLE, f"{place} is {str(image)[:60]}, without an id")
            continue
        file = tree.find_image(image.get("file_name"), _near(path, tree), report, place, split)
        if file is not None:
            gathered = _entry(file, image, split or split_of(tree.relative(file)), path, images, report)
            for annotation in by_image[image["id"]]:
                where = f"{path}: annotation {annotation.get('id')!r}"
                gathered.objects += coco_to_coco(annotation, names, gathered.report, where)


def _near(path: Path, tree: Tree) -> Path:
    """Return the folder where the images of a file probably are: ``val2017`` for ``instances_val2017.json``."""
    for folder in (path.parent, path.parent.parent):
        word = path.stem.rpartition("_")[2]
        if word and (folder / word).is_dir() and folder.is_relative_to(tree.root):
            return folder / word
    return path.parent


def _entry(
    file: Path, image: Any, split: str | None, path: Path, images: dict[Path, _Gathered], report: Report
) -> _Gathered:
    if file in images:
        report.note(JOINED, str(file))
        return images[file]
    width, height = image.get("width"), image.get("height")
    whole = type(width) is int and type(height) is int
    images[file] = _Gathered((height, width) if whole else None, split, str(path))
    return images[file]
