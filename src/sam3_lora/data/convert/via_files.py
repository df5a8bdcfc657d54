"""The files of VGG Image Annotator, whatever the version, as shapes and attributes in the form of version 2."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sam3_lora.data.convert import label_files
from sam3_lora.data.convert.report import BAD_SHAPE, NO_AREA, UNREADABLE, Report
from sam3_lora.data.convert.tree import Tree
from sam3_lora.errors import DataError

_VERSION_3_SHAPES = {
    1: "point",
    2: "rect",
    3: "circle",
    4: "ellipse",
    5: "line",
    6: "polyline",
    7: "polygon",
    8: "extreme_rect",
    9: "extreme_circle",
}
_VERSION_3_HEADER = "metadata_id,file_list,flags,temporal_coordinates,spatial_coordinates,metadata"

#: A shape in the form of version 2, and its attributes.
Region = tuple[Mapping[str, Any], Mapping[str, Any]]
Regions = dict[str, list[Region]]


def recognise(tree: Tree) -> str:
    """Return what shows that there are VIA files, or ``""``."""
    for path in tree.with_suffix(".json"):
        if _version_2(tree.json(path)) is not None or _is_version_3(tree.json(path)):
            return f"{tree.relative(path)}, a VIA file"
    for path in tree.with_suffix(".csv"):
        if _csv_version(path):
            return f"{tree.relative(path)}, a VIA export"
    return ""


def read_files(tree: Tree, report: Report) -> list[tuple[Path, Regions]]:
    """Return the regions by image of each file, of one kind only: the same labels are often there in several forms."""
    found: dict[str, list[tuple[Path, Regions]]] = defaultdict(list)
    for path in tree.with_suffix(".json"):
        value = tree.json(path)
        if (images := _version_2(value)) is not None:
            kind = "project" if "_via_img_metadata" in value else "export"
            found[kind].append((path, _regions_2(images, path, report)))
        elif _is_version_3(value):
            found["project 3"].append((path, _regions_3(value, path, report)))
    for path in tree.with_suffix(".csv"):
        if version := _csv_version(path):
            read = _csv_3 if version == 3 else _csv_2
            try:
                found[f"csv {version}"].append((path, read(label_files.read_text(path), path, report)))
            except (DataError, csv.Error) as error:
                report.problem(UNREADABLE, f"{path}: {error}" if isinstance(error, csv.Error) else str(error))
    return next(iter(found.values()), [])


def _version_2(value: Any) -> Mapping[str, Any] | None:
    """Return the images in a project or export of version 1 or 2."""
    if not isinstance(value, dict) or not value:
        return None
    images = value.get("_via_img_metadata", value)
    if not isinstance(images, dict):
        return None
    entries = list(images.values())
    ours = [e for e in entries if isinstance(e, dict) and "filename" in e and "regions" in e]
    return images if len(ours) == len(entries) and (ours or "_via_img_metadata" in value) else None


def _regions_2(images: Mapping[str, Any], path: Path, report: Report) -> Regions:
    found: Regions = {}
    for entry in images.values():
        regions = entry["regions"]
        listed = list(regions.values()) if isinstance(regions, dict) else regions  # a mapping in version 1
        own = found.setdefault(str(entry["filename"]), [])
        for region in listed if isinstance(listed, list) else []:
            shape = region.get("shape_attributes") if isinstance(region, dict) else None
            if isinstance(shape, dict):
                attributes = region.get("region_attributes")
                own.append((shape, attributes if isinstance(attributes, dict) else {}))
            else:
                report.problem(BAD_SHAPE, f"{path}: {entry['filename']} has a region {str(region)[:40]}")
    return found


def _csv_version(path: Path) -> int:
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            head = file.read(8192)
    except OSError:
        return 0
    if _VERSION_3_HEADER in head:
        return 3
    first = head.partition("\n")[0]
    return 2 if "region_shape_attributes" in first and "filename" in first else 0


def _csv_2(text: str, path: Path, report: Report) -> Regions:
    found: Regions = {}
    for number, row in enumerate(csv.DictReader(text.lstrip("#").splitlines()), 2):
        own = found.setdefault(str(row.get("filename")), [])
        shape = _cell(row.get("region_shape_attributes"), path, number, report)
        if shape:  # {} for an image without regions
            own.append((shape, _cell(row.get("region_attributes"), path, number, report) or {}))
    return found


def _cell(text: str | None, path: Path, number: int, report: Report) -> Any:
    try:
        value = json.loads(text or "{}")
        return value if isinstance(value, (dict, list)) else {}
    except (ValueError, RecursionError) as error:
        report.problem(UNREADABLE, f"{path} row {number} has {str(text)[:40]!r}: {error}")
        return {}


def _is_version_3(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), dict) for key in ("file", "metadata", "view")
    )


def _regions_3(value: Mapping[str, Any], path: Path, report: Report) -> Regions:
    attributes = value.get("attribute")
    views = value["view"]
    names = {key: str(file.get("fname")) for key, file in value["file"].items() if isinstance(file, dict)}
    found: Regions = {name: [] for name in names.values()}
    for key, entry in value["metadata"].items():
        view = views.get(str(entry.get("vid"))) if isinstance(entry, dict) else None
        files = view.get("fid_list") if isinstance(view, dict) else None
        if not isinstance(files, list) or len(files) != 1 or str(files[0]) not in names:
            report.problem(BAD_SHAPE, f"{path}: label {key!r} is of no single file")
            continue
        own = found[names[str(files[0])]]
        own += _region_3(
            entry.get("xy"), entry.get("av"), entry.get("z"), attributes, f"{path}: {key}", report
        )
    return found


def _csv_3(text: str, path: Path, report: Report) -> Regions:
    found: Regions = {}
    attributes: Any = {}
    rows = []
    for line in text.splitlines():
        if line.startswith("# ATTRIBUTE"):
            attributes = _cell(line.partition("=")[2], path, 0, report)
        elif line and not line.startswith("#"):
            rows.append(line)
    for number, row in enumerate(csv.reader(rows), 1):
        if len(row) < 6:
            report.problem(
                UNREADABLE, f"{path} row {number} has {len(row)} cells; {_VERSION_3_HEADER} are six"
            )
            continue
        files, times, shape, values = (_cell(row[i], path, number, report) for i in (1, 3, 4, 5))
        if isinstance(files, list) and len(files) == 1:
            own = found.setdefault(str(files[0]), [])
            own += _region_3(shape, values, times, attributes, f"{path} row {number}", report)
    return found


def _region_3(
    shape: Any, values: Any, times: Any, attributes: Any, where: str, report: Report
) -> list[Region]:
    if times:
        report.note(NO_AREA, f"{where} is a time of a video")
        return []
    if not isinstance(shape, list) or not shape:
        return []  # an attribute of the whole image
    named = {}
    for key, value in values.items() if isinstance(values, dict) else []:
        about = attributes.get(key) if isinstance(attributes, dict) else None
        about = about if isinstance(about, dict) else {"aname": about or key}
        options = about.get("options")
        named[str(about.get("aname"))] = (
            options.get(value, value) if isinstance(options, dict) and isinstance(value, str) else value
        )
    return [(_shape_3(shape), named)]


def _shape_3(numbers: list[Any]) -> Mapping[str, Any]:
    """Return a shape of version 3, a number for its kind and then coordinates, as version 2 would write it."""
    kind, *values = numbers
    name = _VERSION_3_SHAPES.get(kind, kind) if isinstance(kind, int) else kind
    if name == "polygon":
        return {"name": name, "all_points_x": values[0::2], "all_points_y": values[1::2]}
    if name == "extreme_rect" and len(values) == 8 and all(isinstance(v, (int, float)) for v in values):
        xs, ys = values[0::2], values[1::2]
        x, y = min(xs), min(ys)
        return {"name": "rect", "x": x, "y": y, "width": max(xs) - x, "height": max(ys) - y}
    if name == "extreme_circle" and len(values) == 6:
        return _circle_through(values) or {"name": name}
    keys = {"rect": "x y width height", "circle": "cx cy r", "ellipse": "cx cy rx ry"}.get(str(name), "")
    return {"name": name, **dict(zip(keys.split(), values, strict=False))}


def _circle_through(values: Sequence[Any]) -> Mapping[str, Any] | None:
    """Return the circle through three points, or None if they are on a line."""
    try:
        ax, ay, bx, by, cx, cy = map(float, values)
    except (TypeError, ValueError):
        return None
    twice_area = 2 * (ax * (by - cy) + bx * (cy - ay) + cx * (ay - by))
    if not twice_area:
        return None
    a, b, c = ax * ax + ay * ay, bx * bx + by * by, cx * cx + cy * cy
    x = (a * (by - cy) + b * (cy - ay) + c * (ay - by)) / twice_area
    y = (a * (cx - bx) + b * (ax - cx) + c * (bx - ax)) / twice_area
    return {"name": "circle", "cx": x, "cy": y, "r": math.hypot(ax - x, ay - y)}
