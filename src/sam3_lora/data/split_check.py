"""The check of one annotation file, read entry by entry: what is kept grows with the images, not with their masks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam3_lora.data import kinds
from sam3_lora.data.contents import ImageEntry, SplitContents, check_contents
from sam3_lora.data.labels import Flaw, box_flaw, disagreement, segmentation_flaw
from sam3_lora.data.problems import Findings, Kind
from sam3_lora.data.stream import read_entries

Entry = dict[str, Any]

_TINY = 8.0  # pixels at SAM3's resolution, of the side of a square of the box's area
_RESOLUTION = 1008


@dataclass(frozen=True)
class Needs:
    """What a split is for: ``masks`` are trained or measured, ``None``: if it has any; ``measured`` splits need areas."""

    masks: bool | None = True
    measured: bool = False


def check_annotation_file(
    folder: Path,
    path: Path,
    needs: Needs,
    found: Findings,
    on_progress: Callable[[str, int, int], None] = lambda *_: None,
) -> SplitContents:
    """Return what a COCO file holds, and add what is wrong with it, but for the image files, which lie in ``folder``.

    Raises:
        DataError: If it cannot be read to its end.
    """
    check = _SplitCheck(SplitContents(folder, path), needs, found)
    check.run(on_progress)
    return check.contents


def size_hw_of(image: Entry) -> tuple[int, int] | None:
    """Return height and width of an entry of 'images', if it has good ones."""
    height, width = image.get("height"), image.get("width")
    if type(height) is int and type(width) is int and min(height, width) > 0 and max(height, width) < 1 << 31:
        return height, width
    return None


def _short(value: object, length: int = 40) -> str:
    try:
        return repr(str(value)[:length]) if isinstance(value, str) else str(value)[:length]
    except RecursionError:  # a thousand open brackets
        return f"a {type(value).__name__}"


class _SplitCheck:
    def __init__(self, contents: SplitContents, needs: Needs, found: Findings) -> None:
        self.contents = contents
        self._needs = needs
        self._found = found
        self._counts: Counter[str] = Counter()
        self._ids: dict[str, set[int]] = {"images": set(), "annotations": set(), "categories": set()}
        self._unknown = Findings()  # by category, as these may come later in the file
        self._without_mask = Findings()
        self._has_masks = False

    def run(self, on_progress: Callable[[str, int, int], None]) -> None:
        path, late = self.contents.annotation_file, False
        total = 1 + path.stat().st_size // 1_000_000

        def show(done: int) -> None:
            on_progress(f"MB of {path.parent.name}", 1 + done // 1_000_000, total)

        for key, position, entry in read_entries(path, on_read=show):
            self._counts[key] += 1
            if key == "images":
                self._image(position, entry)
            elif key == "categories":
                self._category(position, entry)
            elif self._counts["images"]:
                self._annotation(position, entry)
            else:
                late = True  # annotations in front of the images that they are of
        if late:
            for position, entry in self._annotations_again():
                self._annotation(position, entry)
        self._at_the_end()

    def _annotations_again(self) -> Iterator[tuple[int, Entry]]:
        for key, position, entry in read_entries(self.contents.annotation_file):
            if key == "annotations":
                yield position, entry

    def _add(self, kind: Kind, text: str) -> None:
        self._found.add(kind, f"{self.contents.annotation_file}: {text}")

    def _new_id(self, key: str, position: int, entry: Entry) -> int | None:
        """Return the id of an entry if it is a good one and the first of its kind."""
        value, noun = entry.get("id"), {"categories": "category"}.get(key, key[:-1])
        if type(value) is not int or abs(value) >= 1 << 63:
            self._add(kinds.FIELD["id"], f"{noun} at position {position} has id {_short(value)}")
        elif value in self._ids[key]:
            self._add(kinds.DUPLICATE_ID, f"{noun} {value}")
        else:
            self._ids[key].add(value)
            return value
        return None

    def _image(self, position: int, entry: Entry) -> None:
        key, name, size_hw = (
            self._new_id("images", position, entry),
            entry.get("file_name"),
            size_hw_of(entry),
        )
        if size_hw is None:
            self._add(kinds.FIELD["size"], f"image {_short(entry.get('id'))} ({_short(name, 200)})")
        if not isinstance(name, str) or not name:
            self._add(kinds.FIELD["file_name"], f"image {_short(entry.get('id'))}")
            name = ""
        if key is not None:
            self.contents.images[key] = ImageEntry(name, size_hw)

    def _category(self, position: int, entry: Entry) -> None:
        key, name = self._new_id("categories", position, entry), entry.get("name")
        if not isinstance(name, str) or not name.strip():
            self._add(kinds.NAME, f"category {_short(entry.get('id'))} has the name {_short(name)}")
            name = ""
        if key is not None:
            self.contents.categories[key] = name

    def _annotation(self, position: int, entry: Entry) -> None:
        self._new_id("annotations", position, entry)
        image_id = entry.get("image_id")
        image = self.contents.images.get(image_id) if type(image_id) is int else None

        def place() -> str:
            return f"annotation {_short(entry.get('id'))}" + (
                f" of {_short(image.file_name, 200)}" if image else ""
            )

        if image is None:
            self._add(kinds.UNKNOWN_IMAGE, f"{place()} has image_id {_short(image_id)}")
        else:
            image.objects += 1
        self._count_category(entry, place)
        self._check_fields(entry, place)
        if image is not None and image.size_hw is not None:
            for name, flaw in _label_flaws(entry, image.size_hw, self._needs.masks):
                shown = f"{name} {_short(entry[name], 60)}" if name == "bbox" else name
                self._add(flaw.kind, f"{place()}: {shown} {flaw.text}")

    def _count_category(self, entry: Entry, place: Callable[[], str]) -> None:
        category = entry.get("category_id")
        if type(category) is not int:
            self._add(kinds.UNKNOWN_CATEGORY, f"{place()} has category_id {_short(category)}")
            return
        if not entry.get("iscrowd"):
            self.contents.objects[category] += 1
        if category not in self.contents.categories:
            self._unknown.add(Kind(str(category), ""), f"{place()} has category_id {category!r}")

    def _check_fields(self, entry: Entry, place: Callable[[], str]) -> None:
        crowd, area = entry.get("iscrowd"), entry.get("area")
        if not (type(crowd) in (int, float, bool) and crowd in (0, 1)):
            said = "" if crowd is None else f" has {_short(crowd)}, which is neither 0 nor 1"
            self._add(kinds.FIELD["iscrowd"], place() + said)
        if entry.get("bbox") is None:
            self._add(kinds.FIELD["bbox"], place())
        self._check_has_mask(entry, place)
        if area is None:
            self._add(kinds.FIELD["area"] if self._needs.measured else kinds.UNREAD_AREA, place())
        elif self._needs.measured and not _is_good_area(area):
            self._add(kinds.BAD_AREA, f"{place()} has area {_short(area)}")

    def _check_has_mask(self, entry: Entry, place: Callable[[], str]) -> None:
        if self._needs.masks is None and entry.get("segmentation"):
            self._has_masks = True
        elif self._needs.masks is None:
            self._without_mask.add(kinds.FIELD["segmentation"], f"{self.contents.annotation_file}: {place()}")
        elif self._needs.masks and entry.get("segmentation") is None:
            self._add(kinds.FIELD["segmentation"], place())

    def _at_the_end(self) -> None:
        contents = self.contents
        for key, kind in (
            ("images", kinds.NO_IMAGES),
            ("annotations", kinds.NO_OBJECTS),
            ("categories", kinds.NO_CATEGORIES),
        ):
            if not self._counts[key]:
                self._found.add(kind, str(contents.annotation_file))
        for problem in self._unknown.problems():
            if int(problem.kind) not in contents.categories:
                for place in problem.examples:
                    self._add(kinds.UNKNOWN_CATEGORY, place)
                self._found.add_more(kinds.UNKNOWN_CATEGORY, problem.count - len(problem.examples))
        if self._has_masks:
            self._found.update(self._without_mask)
        check_contents(contents, self._add)


def _label_flaws(entry: Entry, size_hw: tuple[int, int], masks: bool | None) -> Iterator[tuple[str, Flaw]]:
    box, segmentation = entry.get("bbox"), entry.get("segmentation")
    flaw, edges = None, None
    if masks is not True and not segmentation:
        segmentation = (
            None  # but what is there must be good: the official loader reads it, whether it is trained or not
        )
    if box is not None and (flaw := box_flaw(box, size_hw)):
        yield "bbox", flaw
    if segmentation is not None:
        mask_flaw, edges = segmentation_flaw(segmentation, size_hw)
        if mask_flaw:
            yield "segmentation", mask_flaw
    if box is None or flaw:
        return
    if edges and (flaw := disagreement(box, edges)):
        yield "bbox", flaw
    side = math.sqrt(box[2] * box[3]) * _RESOLUTION / max(size_hw)
    if side < _TINY:
        yield "bbox", Flaw(kinds.TINY, f"is {side:.1f} pixels of {_RESOLUTION}")


def _is_good_area(area: object) -> bool:
    if type(area) not in (int, float):
        return False
    try:
        return math.isfinite(area) and area >= 0  # type: ignore[operator, arg-type]
    except OverflowError:
        return False
