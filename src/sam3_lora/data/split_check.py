"""The check of one annotation file, read entry by entry: what is kept grows with the images, not with their masks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam3_lora.data import kinds
from sam3_lora.data.labels import Flaw, box_flaw, disagreement, segmentation_flaw
from sam3_lora.data.names import poor_prompt
from sam3_lora.data.problems import Findings, Kind
from sam3_lora.data.stream import read_entries

Entry = dict[str, Any]

_TINY = 8.0  # pixels at SAM3's resolution, of the side of a square of the box's area
_RESOLUTION = 1008
_IMBALANCE = 20  # times as many objects as the rarest category has


@dataclass
class ImageEntry:
    """What is kept of an image: its name (``""`` if it has none), its size if it has one, and how many objects it has."""

    file_name: str
    size_hw: tuple[int, int] | None
    objects: int = 0


@dataclass
class SplitContents:
    """What an annotation file holds, whatever is wrong with it."""

    folder: Path  # that the file names of the images start from
    annotation_file: Path
    images: dict[int, ImageEntry] = field(default_factory=dict)
    categories: dict[int, str] = field(default_factory=dict)
    objects: Counter[int] = field(default_factory=Counter)  # of a category, without crowds

    @property
    def objects_per_prompt(self) -> dict[str, int]:
        """How many objects each category has, in the official loader's order."""
        return {name: self.objects[key] for key, name in sorted(self.categories.items())}


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
    if type(height) is int and type(width) is int and min(height, width) > 0:
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
        late = False
        for key, position, entry in read_entries(self.contents.annotation_file):
            self._counts[key] += 1
            on_progress(f"{key} of {self.contents.folder.name}", position + 1, 0)
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
        if type(value) is not int:
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
            return f"annotation {_short(entry.get('id'))}" + (f" of {image.file_name!r}" if image else "")

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
        _check_names(contents, self._add)
        _check_balance(contents, self._add)
        _check_file_names(contents, self._add)


def _label_flaws(entry: Entry, size_hw: tuple[int, int], masks: bool | None) -> Iterator[tuple[str, Flaw]]:
    box, segmentation = entry.get("bbox"), entry.get("segmentation")
    flaw, edges = None, None
    if masks is False or (masks is None and not segmentation):
        segmentation = None
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


_Add = Callable[[Kind, str], None]


def _check_names(contents: SplitContents, add: _Add) -> None:
    seen: dict[str, int] = {}
    for key, name in contents.categories.items():
        prompt = " ".join(name.lower().split())  # all that SAM3's tokenizer sees of it
        if not prompt:
            continue
        if prompt in seen:
            add(kinds.DUPLICATE_NAME, f"categories {seen[prompt]!r} and {key!r} are both {prompt!r}")
        elif why := poor_prompt(name):
            add(kinds.POOR_NAME, f"category {key}, {name!r}, {why}")
        seen.setdefault(prompt, key)


def _check_balance(contents: SplitContents, add: _Add) -> None:
    counts = {key: contents.objects[key] for key in contents.categories}
    used = {key: count for key, count in counts.items() if count}
    if not used:
        return
    for key, count in counts.items():
        if not count:
            add(kinds.UNUSED_CATEGORY, f"category {key}, {contents.categories[key]!r}")
    commonest = max(used, key=lambda key: used[key])
    for key, count in used.items():
        if used[commonest] >= _IMBALANCE * count:
            names = [f"{contents.categories[k]!r}: {used[k]} objects" for k in (key, commonest)]
            add(kinds.IMBALANCE, " against ".join(names))
    for key, image in contents.images.items():
        if not image.objects:
            add(kinds.NO_OBJECTS_IN_IMAGE, f"image {key} ({image.file_name!r})")


def _check_file_names(contents: SplitContents, add: _Add) -> None:
    seen: dict[str, str] = {}
    for image in contents.images.values():
        first = seen.setdefault(image.file_name.casefold(), image.file_name)
        if first != image.file_name:
            add(kinds.SAME_BUT_CASE, f"{first!r} and {image.file_name!r}")
    counts = Counter(image.file_name for image in contents.images.values() if image.file_name)
    for name, count in counts.items():
        if count > 1:
            add(kinds.LISTED_TWICE, f"{name!r}, {count} times")
