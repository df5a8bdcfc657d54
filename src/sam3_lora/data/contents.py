"""What one annotation file holds, and what is only seen when all of it was read: names, balance, files listed twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sam3_lora.data import kinds
from sam3_lora.data.names import poor_prompt
from sam3_lora.data.problems import Kind

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


_Add = Callable[[Kind, str], None]


def check_contents(contents: SplitContents, add: _Add) -> None:
    """Add what is wrong with an annotation file as a whole."""
    _check_names(contents, add)
    _check_balance(contents, add)
    _check_file_names(contents, add)


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
