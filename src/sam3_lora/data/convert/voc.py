"""Pascal VOC: an XML file for each image with boxes, and masks of objects and of classes where there are some."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from sam3_lora.data.convert import label_files
from sam3_lora.data.convert.items import Item, Size, Source, note_unlabelled
from sam3_lora.data.convert.label_files import head_of
from sam3_lora.data.convert.mask_files import (
    Colour,
    instances_to_coco,
    read_label_map,
    read_values,
    semantic_to_coco,
    voc_colours,
)
from sam3_lora.data.convert.objects import CocoObject, box_object
from sam3_lora.data.convert.pictures import FilePicture
from sam3_lora.data.convert.report import BAD_SHAPE, MASK_SIZE, MASK_VALUE, NO_CLASS, UNREADABLE, Report
from sam3_lora.data.convert.tree import Tree, split_in_name, split_of
from sam3_lora.errors import DataError

_OBJECTS, _CLASSES, _LISTS = "SegmentationObject", "SegmentationClass", "ImageSets"
_LIST_FOLDERS = ("Segmentation", "Main")
_VOID = ("void", "ignore", "__ignore__", "background", "_background_")
_VOID_COLOUR = (224, 224, 192)  # the border that the original draws around objects

#: The classes of the original, in the order of their values.
VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
).split()


@dataclass(frozen=True)
class VocLabels:
    """The files of one image; None where it has none."""

    xml: Path | None
    object_mask: Path | None = None
    class_mask: Path | None = None
    names: Mapping[Colour, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        return str(self.xml or self.class_mask or self.object_mask)

    @property
    def are_empty(self) -> bool:
        return False

    def objects(self, size_hw: Size, report: Report) -> list[CocoObject]:
        try:
            if self.class_mask is not None:
                return _masked_objects(self.object_mask, self.class_mask, self.names, size_hw, report)
            if self.xml is not None:
                return voc_to_coco(label_files.read_xml(self.xml), report, self.place)
        except DataError as error:
            report.problem(UNREADABLE, str(error))
        return []


def recognise(tree: Tree) -> str:
    """Return what shows that these are VOC files, or ``""``."""
    for path in tree.with_suffix(".xml"):
        if re.search(rb"<annotation[\s>]", head_of(path)):
            return f"{tree.relative(path)} with <annotation>"
    masked = next((path for path in tree.images if path.parent.name == _CLASSES), None)
    return f"{tree.relative(masked)}" if masked else ""


def plan(tree: Tree, report: Report, class_name: str | None = None) -> Source:
    """Return the images that have a label file or masks."""
    colours = _colours(tree, report)
    masks = {name: {p.stem: p for p in tree.images if p.parent.name == name} for name in (_OBJECTS, _CLASSES)}
    photos = [path for path in tree.images if path.parent.name not in (_OBJECTS, _CLASSES)]
    xml_files = [path for path in tree.with_suffix(".xml") if re.search(rb"<annotation[\s>]", head_of(path))]
    items: dict[Path, Item] = {}
    splits = _list_splits(tree, report)
    for path in xml_files:
        try:
            root = label_files.read_xml(path)
        except DataError as error:
            report.problem(UNREADABLE, str(error))
            continue
        image = _image(root, path, photos, tree, report)
        if image is not None:
            labels = VocLabels(path, masks[_OBJECTS].get(path.stem), masks[_CLASSES].get(path.stem), colours)
            split = splits.get(path.stem) or split_of(tree.relative(image))
            items[image] = Item(FilePicture(image), labels, split, _size_hw(root), upright=False)
    for image in photos:
        if image not in items and image.stem in masks[_CLASSES]:
            labels = VocLabels(None, masks[_OBJECTS].get(image.stem), masks[_CLASSES][image.stem], colours)
            split = splits.get(image.stem) or split_of(tree.relative(image))
            items[image] = Item(FilePicture(image), labels, split, upright=False)
    listed = [items[image] for image in sorted(items)]
    note_unlabelled(photos, listed, report)
    return Source(listed)


def voc_to_coco(root: Element, report: Report | None = None, place: str = "the labels") -> list[CocoObject]:
    """Return the objects of one ``<annotation>``: polygons as Roboflow writes them, else boxes.

    The boxes of the original, which names itself in ``<source>``, count pixels from 1 and hold the last one. CVAT,
    Roboflow and LabelImg write the same words and mean the edges of the box.

    Raises:
        DataError: If an object cannot be used and no report takes the problems.
    """
    given, report = report, report or Report()
    from_one = "PASCAL VOC" in " ".join(
        root.findtext(f"source/{key}") or "" for key in ("annotation", "database")
    )
    objects = []
    for number, element in enumerate(root.iterfind("object"), 1):
        where = f"{place}: object {number}"
        name = (element.findtext("name") or "").strip()
        if not name:
            report.problem(NO_CLASS, where)
            continue
        try:
            objects.append(_object(element, name, from_one))
        except (ValueError, OverflowError) as error:
            report.problem(BAD_SHAPE, f"{where} ({name!r}): {error}")
    if given is None:
        report.raise_problems(place)
    return objects


def _object(element: Element, name: str, from_one: bool) -> CocoObject:
    polygon = element.find("polygon")
    if polygon is not None:
        return CocoObject(name, [_polygon(polygon)])
    if element.find("bndbox") is None:
        raise ValueError("it has neither <bndbox> nor <polygon>")
    x0, y0, x1, y1 = (
        float(element.findtext(f"bndbox/{key}") or "nan") for key in ("xmin", "ymin", "xmax", "ymax")
    )
    first = 1 if from_one else 0
    return box_object(name, [x0 - first, y0 - first, x1 - x0 + first, y1 - y0 + first])


def _polygon(polygon: Element) -> list[float]:
    """Return the points of Roboflow's ``<x1>`` ``<y1>`` ..., or of LabelMe's ``<pt>``."""
    if points := polygon.findall("pt"):
        return [float(point.findtext(axis) or "nan") for point in points for axis in "xy"]
    values = {child.tag: float(child.text or "nan") for child in polygon}
    return [values.get(f"{axis}{i}", float("nan")) for i in range(1, len(values) // 2 + 1) for axis in "xy"]


def _masked_objects(
    object_mask: Path | None, class_mask: Path, names: Mapping[Colour, str], size_hw: Size, report: Report
) -> list[CocoObject]:
    classes, class_colours = read_values(class_mask)
    if classes.shape != size_hw:
        shape = f"{classes.shape[1]} x {classes.shape[0]}"
        report.problem(MASK_SIZE, f"{class_mask} is {shape}, its image {size_hw[1]} x {size_hw[0]}")
        return []
    named = _named_values(classes, class_colours, names, report, class_mask)
    if object_mask is None:
        return semantic_to_coco(classes, named)
    instances, colours = read_values(object_mask)
    if instances.shape != size_hw:
        shape = f"{instances.shape[1]} x {instances.shape[0]}"
        report.problem(MASK_SIZE, f"{object_mask} is {shape}, its image {size_hw[1]} x {size_hw[0]}")
        return []
    of_instance = {}
    for value in np.unique(instances):
        if int(value) == 0 or colours.get(int(value)) == _VOID_COLOUR or (colours == {} and value == 255):
            continue
        found = Counter(classes[instances == value].tolist()).most_common()
        of_instance[int(value)] = next((named[v] for v, _ in found if v in named), None)
        if of_instance[int(value)] is None:
            report.problem(MASK_VALUE, f"{object_mask}: object {value} has no class in {class_mask.name}")
    return instances_to_coco(instances, {v: name for v, name in of_instance.items() if name})


def _named_values(
    classes: np.ndarray,
    colours: Mapping[int, Colour],
    names: Mapping[Colour, str],
    report: Report,
    path: Path,
) -> dict[int, str]:
    """Return the class of each value of a mask, without background and border. Grey masks count in VOC's order."""
    by_index = list(names.values())
    named = {}
    for value in map(int, np.unique(classes)):
        colour = colours.get(value) if colours else None
        name = names.get(colour) if colour else by_index[value] if value < len(by_index) else None
        if name is None and value != 0 and colour != _VOID_COLOUR and not (colour is None and value == 255):
            report.problem(
                MASK_VALUE, f"{path} has {f'the colour {colour}' if colour else f'the value {value}'}"
            )
        elif name is not None and name.lower() not in _VOID:
            named[value] = name
    return named


def _colours(tree: Tree, report: Report) -> dict[Colour, str]:
    path = next((path for path in tree.with_suffix(".txt") if path.name == "labelmap.txt"), None)
    standard = voc_colours()
    if path is None:
        return {standard[i]: name for i, name in enumerate(VOC_CLASSES)}
    try:
        entries = read_label_map(path)
    except DataError as error:
        report.problem(UNREADABLE, str(error))
        return {}
    return {colour or standard[i % 256]: name for i, (name, colour) in enumerate(entries)}


def _image(root: Element, path: Path, photos: list[Path], tree: Tree, report: Report) -> Path | None:
    """Return the image of a label file: that of the same name, in its own folder or ``JPEGImages``, or the one it names."""
    name = (root.findtext("filename") or "").strip() or path.stem
    if f"{path.stem}." not in name and not name.startswith(path.stem):
        own = [photo for photo in photos if photo.stem == path.stem]
        if len(own) == 1:
            return own[0]
    near = path.parent.parent / "JPEGImages"
    near = near if near.is_dir() and near.is_relative_to(tree.root) else path.parent
    found = tree.find_image(name if "." in name else f"{name}.jpg", near, report, str(path))
    if found is not None and found.parent.name in (_OBJECTS, _CLASSES):
        return next((photo for photo in photos if photo.stem == found.stem), None)
    return found


def _list_splits(tree: Tree, report: Report) -> dict[str, str]:
    """Return the split of each name that ``ImageSets`` lists; the lists of one class, ``cat_train.txt``, do not count."""
    splits: dict[str, str] = {}
    lists = [
        p
        for p in tree.with_suffix(".txt")
        if p.parent.parent.name == _LISTS and p.parent.name in _LIST_FOLDERS
    ]
    for path in sorted(lists, key=lambda p: _LIST_FOLDERS.index(p.parent.name), reverse=True):
        if path.stem in ("train", "val", "valid", "test"):
            try:
                lines = label_files.read_text(path).split("\n")
            except DataError as error:
                report.problem(UNREADABLE, str(error))
                continue
            split = split_in_name(path.stem) or "train"
            splits.update({Path(line.split()[0]).name: split for line in lines if line.strip()})
    return splits


def _size_hw(root: Element) -> Size | None:
    width, height = (root.findtext(f"size/{key}") or "" for key in ("width", "height"))
    return (int(height), int(width)) if width.isdigit() and height.isdigit() and int(width) else None
