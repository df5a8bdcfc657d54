"""An image and its labels on the way from any format to COCO; each is one step that any process can do."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from sam3_lora.data.convert.objects import CocoObject, to_annotation
from sam3_lora.data.convert.pictures import FilePicture, Picture, sizes_hw, turn_upright
from sam3_lora.data.convert.report import BROKEN_IMAGE, IMAGE_SIZE, UNLABELLED, UPRIGHT, Report
from sam3_lora.errors import DataError

Size = tuple[int, int]
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class Labels(Protocol):
    """The labels of one image in the form of a format, not yet read."""

    def objects(self, size_hw: Size, report: Report) -> list[CocoObject]:
        """Return the objects in an image of this size; what is wrong with them goes to the report."""

    @property
    def place(self) -> str:
        """Where a person finds them."""

    @property
    def are_empty(self) -> bool:
        """Whether it is sure, before they are read, that there are no objects."""


@dataclass(frozen=True)
class Item:
    """One image of the source.

    Attributes:
        split: ``train``, ``valid`` or ``test`` where the source says so.
        size_hw: The size that the labels say the image has.
        upright: Whether the tool showed the image turned as its EXIF data say, so that labels are of the turned one.
    """

    picture: Picture
    labels: Labels
    split: str | None = None
    size_hw: Size | None = None
    upright: bool = True


@dataclass(frozen=True)
class Source:
    """What a format found: images with labels, and the classes that it lists; more classes may come with the labels."""

    items: Sequence[Item]
    classes: Sequence[str] = ()
    one_process: bool = False


class Converted(NamedTuple):
    """An image in its place. ``annotations`` are the class of each, and a JSON object without ids."""

    name: str
    size_hw: Size
    annotations: list[tuple[str, str]]
    report: Report


@dataclass(frozen=True)
class Known:
    """Labels that were read with the list of images."""

    found: Sequence[CocoObject] = ()
    place: str = ""
    report: Report = field(default_factory=Report)

    @property
    def are_empty(self) -> bool:
        return not self.found

    def objects(self, size_hw: Size, report: Report) -> list[CocoObject]:
        report.merge(self.report)
        return list(self.found)


def note_unlabelled(images: Iterable[Path], items: Iterable[Item], report: Report) -> None:
    """Note the images that no item has: nobody says that nothing is on them."""
    used = {item.picture.path for item in items if isinstance(item.picture, FilePicture)}
    for path in images:
        if path not in used:
            report.note(UNLABELLED, str(path))


def convert_item(item: Item, target: Path, copy: bool, box_masks: bool) -> Converted:
    """Bring an image to its path and return its annotations."""
    report = Report()
    size = (0, 0)
    annotations: list[tuple[str, str]] = []
    try:
        size = _bring(item, target, copy, report)
    except DataError as error:
        report.problem(BROKEN_IMAGE, str(error))
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise  # not the fault of this image
        report.problem(BROKEN_IMAGE, f"{item.picture.place} cannot be brought to {target}: {error.strerror}")
    if size != (0, 0):
        for number, found in enumerate(item.labels.objects(size, report), 1):
            place = f"{item.labels.place}: object {number} ({found.category!r})"
            annotation = to_annotation(found, size, report, place, box_masks)
            if annotation is not None:
                annotations.append((found.category, json.dumps(annotation)))
    return Converted(target.name, size, annotations, report)


def _bring(item: Item, target: Path, copy: bool, report: Report) -> Size:
    """Write the picture and return the size that its labels refer to; (0, 0) if that is not the size of the picture."""
    if isinstance(item.picture, FilePicture):
        stored, seen, is_turned = sizes_hw(item.picture.path)  # before anything is written
        item.picture.write(target, copy)
    else:
        item.picture.write(target, copy)
        stored, seen, is_turned = sizes_hw(target)
    as_seen = item.upright and is_turned
    if item.size_hw is not None and stored != seen:  # the size says which of the two was labelled
        as_seen = item.size_hw == seen
    size = seen if as_seen else stored
    if item.size_hw not in (None, size):
        wanted = item.size_hw or size
        report.problem(
            IMAGE_SIZE,
            f"{item.picture.place} is {size[1]} x {size[0]}, {item.labels.place} says {wanted[1]} x {wanted[0]}",
        )
        return (0, 0)
    if as_seen:
        report.note(UPRIGHT, item.picture.place)
        turn_upright(target)
    return size
