"""VGG Image Annotator: projects and exports of versions 1, 2 and 3, as JSON and as CSV."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sam3_lora.data.convert.items import Item, Known, Source, note_unlabelled
from sam3_lora.data.convert.objects import CocoObject, box_object, ellipse
from sam3_lora.data.convert.pictures import FilePicture
from sam3_lora.data.convert.report import BAD_SHAPE, NO_AREA, NO_CLASS, Report
from sam3_lora.data.convert.tree import Tree, split_in_name, split_of
from sam3_lora.data.convert.via_files import Region, read_files

#: What people call the attribute that holds the class, the likeliest first.
_CLASS_ATTRIBUTES = ("class", "label", "name", "category", "type", "object", "class_name", "object_name")
_WITHOUT_AREA = ("point", "line", "polyline")


def plan(tree: Tree, report: Report, class_name: str | None = None) -> Source:
    """Return the images of all VIA files below a folder. A project counts more than the exports beside it."""
    files = read_files(tree, report)
    names = [attributes for _, regions in files for found in regions.values() for _, attributes in found]
    attribute = class_attribute(names)
    by_image: dict[Path, list[CocoObject]] = defaultdict(list)
    reports: dict[Path, Report] = defaultdict(Report)
    places: dict[Path, tuple[str, str | None]] = {}
    for path, regions in files:
        for name, found in regions.items():
            image = tree.find_image(_base_name(name), path.parent, report, f"{path}")
            if image is not None:
                place = f"{path}: {name}"
                by_image[image] += via_to_coco(found, attribute, reports[image], place, class_name=class_name)
                own = (
                    split_in_name(path.stem)
                    or split_of(tree.relative(path))
                    or split_of(tree.relative(image))
                )
                places.setdefault(image, (place, own))
    items = [
        Item(FilePicture(image), Known(objects, places[image][0], reports[image]), places[image][1])
        for image, objects in sorted(by_image.items())
    ]
    note_unlabelled(tree.images, items, report)
    return Source(items)


def class_attribute(attributes: Iterable[Mapping[str, Any]]) -> str | None:
    """Return the attribute that holds the class: one that is called so, else the one that most regions have."""
    counts = Counter(key for found in attributes for key, value in found.items() if _value(value))
    by_lower = {key.lower(): key for key in counts}
    named = next((by_lower[name] for name in _CLASS_ATTRIBUTES if name in by_lower), None)
    return named or next((key for key, _ in counts.most_common(1)), None)


def via_to_coco(
    regions: Sequence[Region],
    attribute: str | None,
    report: Report | None = None,
    place: str = "the labels",
    *,
    class_name: str | None = None,
) -> list[CocoObject]:
    """Return the objects of one image.

    Args:
        regions: ``shape_attributes`` and ``region_attributes`` of each, as version 2 writes them.
        attribute: The one that holds the class.
        class_name: The class of regions that have none.

    Raises:
        DataError: If a region cannot be used and no report takes the problems.
    """
    given, report = report, report or Report()
    objects = []
    for number, (shape, attributes) in enumerate(regions, 1):
        where = f"{place}: region {number}"
        label = _value(attributes.get(attribute)) if attribute else ""
        if shape.get("name") in _WITHOUT_AREA:
            report.note(NO_AREA, f"{where} is a {shape['name']}")
        elif not (label := label or class_name or ""):
            report.problem(NO_CLASS, f"{where} has attributes {dict(attributes)}")
        elif found := _object(shape, label, report, f"{where} ({label!r})"):
            objects.append(found)
    if given is None:
        report.raise_problems(place)
    return objects


def _object(shape: Mapping[str, Any], label: str, report: Report, where: str) -> CocoObject | None:
    kind = shape.get("name")
    try:
        if kind == "polygon":
            xs, ys = shape["all_points_x"], shape["all_points_y"]
            return CocoObject(label, [[v for pair in zip(xs, ys, strict=True) for v in map(float, pair)]])
        if kind == "rect":
            return box_object(label, [float(shape[key]) for key in ("x", "y", "width", "height")])
        if kind == "circle":
            cx, cy, radius = (float(shape[key]) for key in ("cx", "cy", "r"))
            return CocoObject(label, [ellipse(cx, cy, radius, radius)])
        if kind == "ellipse":
            cx, cy, rx, ry = (float(shape[key]) for key in ("cx", "cy", "rx", "ry"))
            return CocoObject(label, [ellipse(cx, cy, rx, ry, float(shape.get("theta") or 0))])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        report.problem(BAD_SHAPE, f"{where}, a {kind}, has {str(dict(shape))[:80]}: {error}")
        return None
    report.problem(BAD_SHAPE, f"{where} is a {kind!r}")
    return None


def _value(value: Any) -> str:
    """Return the text of an attribute; of a checkbox, which is ``{"cat": true}``, the one that is ticked."""
    if isinstance(value, dict):
        ticked = [key for key, on in value.items() if on]
        return str(ticked[0]).strip() if len(ticked) == 1 else ""
    return str(value).strip() if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""


def _base_name(name: str) -> str:
    return name.partition("?")[0] if "://" in name else name
