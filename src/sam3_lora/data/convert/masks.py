"""Datasets of masks: PNG files beside the images, for each class, with the class or with the object as pixel value."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sam3_lora.data.convert.items import Item, Size, Source, note_unlabelled
from sam3_lora.data.convert.mask_files import (
    BACKGROUND,
    connected_parts,
    instances_to_coco,
    masks_to_coco,
    read_binary,
    read_values,
    semantic_to_coco,
    unnamed,
    value_names,
)
from sam3_lora.data.convert.objects import CocoObject, mask_object
from sam3_lora.data.convert.pictures import FilePicture
from sam3_lora.data.convert.report import MASK_SIZE, MASK_VALUE, NO_CLASS, UNREADABLE, Report
from sam3_lora.data.convert.tree import Tree, split_of
from sam3_lora.errors import DataError

_FOLDERS = re.compile(
    r"(masks?|labels?|annotations?|annots?|gt|ground_?truth|seg(mentation)?s?(_?maps?)?|semantic|instances?(_?ids?)?)"
    r"(_?png)?(_?(train|val|valid|test))?$",
    re.IGNORECASE,
)
_ENDING = re.compile(
    r"[_\-. ](masks?|labels?|seg|segmentation|gt|annotation|instance_?ids?|label_?ids?)$", re.IGNORECASE
)
_MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")
_SAMPLE = 24
KINDS = ("masks-binary", "masks-semantic", "masks-instances")


class _Mask(NamedTuple):
    """A mask file of an image, with the class that its name or folder says, or the number of its object."""

    path: Path
    category: str | None
    is_one_object: bool


@dataclass(frozen=True)
class MaskLabels:
    """The mask files of one image.

    Attributes:
        kind: One of :data:`KINDS`.
        names: Class by pixel value, for semantic masks.
        class_name: The class of masks that name none.
    """

    masks: Sequence[_Mask]
    kind: str
    names: Mapping[int, str] = field(default_factory=dict)
    class_name: str | None = None

    @property
    def place(self) -> str:
        return str(self.masks[0].path) if len(self.masks) == 1 else str(self.masks[0].path.parent)

    @property
    def are_empty(self) -> bool:
        return False

    def objects(self, size_hw: Size, report: Report) -> list[CocoObject]:
        found: list[CocoObject] = []
        for mask in self.masks:
            try:
                found += self._objects_of(mask, size_hw, report)
            except DataError as error:
                report.problem(UNREADABLE, str(error))
        return found

    def _objects_of(self, mask: _Mask, size_hw: Size, report: Report) -> list[CocoObject]:
        category = mask.category or self.class_name
        if self.kind == "masks-binary" and category is not None:
            covered = read_binary(mask.path)
            if not _fits(covered.shape, mask.path, size_hw, report):
                return []
            if mask.is_one_object:
                return masks_to_coco([covered], category)
            return [mask_object(category, part) for part in connected_parts(covered)]
        values, _ = read_values(mask.path)
        if not _fits(values.shape, mask.path, size_hw, report):
            return []
        if self.kind == "masks-instances" and category is not None:
            return instances_to_coco(values, {int(v): category for v in np.unique(values) if v})
        if unknown := unnamed(values, self.names):
            report.problem(
                MASK_VALUE, f"{mask.path} has {', '.join(map(str, unknown))}; named are {_shown(self.names)}"
            )
            return []
        return semantic_to_coco(values, {v: n for v, n in self.names.items() if n.lower() not in BACKGROUND})


def recognise(tree: Tree) -> str:
    """Return what shows that there are masks, or ``""``."""
    pairs = _pairs(tree)
    first = next(iter(pairs.values()), None)
    return f"{tree.relative(first[0].path)}, a mask of an image" if first else ""


def plan(tree: Tree, report: Report, class_name: str | None = None, kind: str | None = None) -> Source:
    """Return the images that have masks.

    Args:
        kind: One of :data:`KINDS`, or None to find it out.
    """
    pairs = _pairs(tree)
    names = value_names(tree, report)
    kind = kind or _kind(pairs, names, tree)
    if kind == "masks-semantic" and not names and class_name:
        names = {1: class_name, 255: class_name}
    has_class = all(mask.category or class_name for masks in pairs.values() for mask in masks)
    if kind == "masks-semantic" and not names:
        report.problem(
            NO_CLASS, f"{tree.root}: no file says what pixel values mean; write classes.txt, a name a line"
        )
    elif kind != "masks-semantic" and not has_class:
        report.problem(NO_CLASS, f"{tree.root}: neither folders nor names of the masks say their class")
    items = [
        Item(
            FilePicture(image),
            MaskLabels(masks, kind, names, class_name),
            split_of(tree.relative(image)),
            upright=False,
        )
        for image, masks in sorted(pairs.items())
    ]
    used = {mask.path for masks in pairs.values() for mask in masks}
    note_unlabelled([image for image in tree.images if image not in used], items, report)
    return Source(items, list(dict.fromkeys(n for n in names.values() if n.lower() not in BACKGROUND)))


def _fits(shape: tuple[int, ...], path: Path, size_hw: Size, report: Report) -> bool:
    if shape == size_hw:
        return True
    report.problem(MASK_SIZE, f"{path} is {shape[1]} x {shape[0]}, its image {size_hw[1]} x {size_hw[0]}")
    return False


def _kind(pairs: Mapping[Path, Sequence[_Mask]], names: Mapping[int, str], tree: Tree) -> str:
    """Return what the masks are.

    Raises:
        DataError: If that cannot be seen.
    """
    masks = [mask for found in pairs.values() for mask in found]
    if any(
        part.lower().startswith("instance")
        for mask in masks[:_SAMPLE]
        for part in tree.relative(mask.path).parts
    ):
        return "masks-instances"
    if any(mask.category or mask.is_one_object for mask in masks):
        return "masks-binary"
    if names:
        return "masks-semantic"
    if all(len(np.unique(read_values(mask.path)[0])) <= 2 for mask in masks[:_SAMPLE]):
        return "masks-binary"
    raise DataError(
        f"{tree.root} has masks with several values, such as {tree.relative(masks[0].path)}, and nothing says whether "
        "these are classes or objects; name the values in classes.txt, a class a line from value 1, or say "
        "--from masks-instances with --class-name"
    )


def _pairs(tree: Tree) -> dict[Path, list[_Mask]]:
    """Return the masks of each image."""
    masks: list[Path] = []
    photos: list[Path] = []
    for path in tree.images:
        is_mask = path.suffix.lower() in _MASK_SUFFIXES and (
            _mask_folder(path, tree) or _ENDING.search(path.stem)
        )
        (masks if is_mask else photos).append(path)
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for photo in photos:
        by_stem[photo.stem].append(photo)
    pairs: dict[Path, list[_Mask]] = defaultdict(list)
    for path in masks:
        found = _photo_of(path, by_stem, tree)
        if found is not None:
            photo, rest = found
            pairs[photo].append(
                _Mask(path, _category(path, rest, tree), rest.isdigit() or _is_own_folder(path, photo))
            )
    return dict(pairs)


def _mask_folder(path: Path, tree: Tree) -> Path | None:
    """Return the folder of masks that a file is in, itself or one above, below the root."""
    for folder in path.parents:
        if folder == tree.root or not folder.is_relative_to(tree.root):
            return None
        if _FOLDERS.match(folder.name):
            return folder
    return None


def _photo_of(path: Path, by_stem: Mapping[str, list[Path]], tree: Tree) -> tuple[Path, str] | None:
    """Return the image of a mask, and what its name has more than that of the image."""
    stem = _ENDING.sub("", path.stem)
    candidates = [(stem, "")]
    candidates += [
        (stem[: m.start()], stem[m.end() :]) for m in reversed(list(re.finditer(r"[_\-. ]", stem)))
    ]
    for name, rest in candidates:
        photos = by_stem.get(name, [])
        if len(photos) > 1:
            split = split_of(tree.relative(path))
            photos = [p for p in photos if p.parent == path.parent] or [
                p for p in photos if split_of(tree.relative(p)) == split
            ]
        if len(photos) == 1:
            return photos[0], rest
    folder = path.parent.parent  # <name>/images/<name>.png and <name>/masks/*.png
    own = [p for p in by_stem.get(folder.name, []) if p.parent.parent == folder]
    return (own[0], "") if own else None


def _is_own_folder(path: Path, photo: Path) -> bool:
    """Whether the masks of this image have a folder to themselves, so that each of them is an object."""
    return path.parent.parent == photo.parent.parent and path.parent.parent.name == photo.stem


def _category(path: Path, rest: str, tree: Tree) -> str | None:
    """Return the class that the name of a mask, or a folder below the folder of masks, says."""
    if rest and not rest.isdigit():
        return rest
    folder = _mask_folder(path, tree)
    if folder is not None and folder != path.parent:
        below = path.parent.relative_to(folder).parts
        named = [
            part for part in below if part.lower() not in ("train", "val", "valid", "test", "validation")
        ]
        return named[-1] if named else None
    return None


def _shown(names: Mapping[int, str]) -> str:
    return ", ".join(f"{value} {name}" for value, name in list(names.items())[:6]) or "none"
