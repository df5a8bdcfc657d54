"""What lies in a source folder, listed once, and the images that label files mean."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from sam3_lora.data.convert import label_files
from sam3_lora.data.convert.report import MISSING_IMAGE, SAME_NAME, UNREADABLE, Report
from sam3_lora.errors import DataError

IMAGE_SUFFIXES = frozenset(".jpg .jpeg .jfif .png .bmp .tif .tiff .webp .gif .avif .mpo".split())

#: Files that go with the one that the user named: lists of classes and images, and the labels that a YAML belongs to.
_LISTS = (".txt", ".names", ".labels")

#: What folders and files call a split, and what it is called here.
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "valid",
    "valid": "valid",
    "validation": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
}


@dataclass
class Tree:
    """The files below a folder, sorted; links are followed once. JSON files are read once.

    Attributes:
        only: The label file that the user named; others are not looked at.
    """

    root: Path
    files: list[Path]
    only: Path | None = None
    _json: dict[Path, Any] = field(default_factory=dict)
    _broken: dict[Path, str] = field(default_factory=dict)

    def with_suffix(self, *suffixes: str) -> list[Path]:
        """Return the label files with these suffixes, in lower case."""
        found = [path for path in self.files if path.suffix.lower() in suffixes]
        return [path for path in found if self.only in (None, path) or path.suffix.lower() in _LISTS]

    @cached_property
    def images(self) -> list[Path]:
        return [path for path in self.files if path.suffix.lower() in IMAGE_SUFFIXES]

    def relative(self, path: Path) -> PurePosixPath:
        return PurePosixPath(path.relative_to(self.root))

    def json(self, path: Path) -> Any:
        """Return the value in a JSON file, or None if it is broken."""
        if path not in self._json and path not in self._broken:
            try:
                self._json[path] = label_files.read_json(path)
            except DataError as error:
                self._broken[path] = str(error)
        return self._json.get(path)

    def report_broken(self, report: Report) -> None:
        """Report each JSON file that could not be read."""
        for reason in self._broken.values():
            report.problem(UNREADABLE, reason)

    @property
    def broken(self) -> list[str]:
        return list(self._broken.values())

    def find_image(
        self, name: Any, near: Path, report: Report, place: str, split: str | None = None
    ) -> Path | None:
        """Return the image that a label file in the folder ``near`` means, or report that there is none or several.

        It is searched there first, then anywhere below the root by the longest part of its path that fits, also with
        another suffix; but not in the folder of another split, which often has other images of the same names. A path
        that leads out of the root is never followed.

        Args:
            split: That of the label file, if not the folder says it.
        """
        if not isinstance(name, str) or not name.strip():
            report.problem(MISSING_IMAGE, f"{place} names no image")
            return None
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        here = Path(os.path.normpath(near.joinpath(*parts))) if parts else near
        if here in self._image_set:
            return here
        parts = [part for part in parts if part != ".."]
        found = self._by_name.get(parts[-1].lower(), []) if parts else []
        if not found and parts:
            found = self._by_stem.get(PurePosixPath(parts[-1]).stem.lower(), [])
        split = split or split_of(self.relative(near / "any"))
        found = [path for path in found if self._may_be(path, split, parts)]
        best = _closest(found, parts, near)
        if len(best) == 1:
            return best[0]
        if best:
            shown = " and ".join(str(self.relative(path)) for path in best[:2])
            report.problem(SAME_NAME, f"{place} means {name!r}: it may be {shown}")
        else:
            report.problem(MISSING_IMAGE, f"{place} means {name!r}")
        return None

    def _may_be(self, path: Path, split: str | None, parts: list[str]) -> bool:
        own = split_of(self.relative(path))
        named = len(parts) > 1 and path.parent.name.lower() == parts[-2].lower()
        return named or None in (own, split) or own == split

    @cached_property
    def _image_set(self) -> frozenset[Path]:
        return frozenset(self.images)

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        return _grouped((path.name.lower(), path) for path in self.images)

    @cached_property
    def _by_stem(self) -> dict[str, list[Path]]:
        return _grouped((path.stem.lower(), path) for path in self.images)


def list_tree(root: Path, exclude: Iterable[Path] = (), only: Path | None = None) -> Tree:
    """Return the tree below a folder; hidden files, and folders in ``exclude``, are left out."""
    excluded = {os.path.realpath(path) for path in exclude}
    seen: set[str] = set()
    files: list[Path] = []
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_refuse):
        real = os.path.realpath(folder)
        if real in seen or real in excluded:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += (Path(folder, name) for name in names if not name.startswith("."))
    return Tree(root, sorted(files), only)


def split_of(relative: PurePosixPath) -> str | None:
    """Return the split that a path names, such as ``valid`` for ``images/val2017/1.jpg``; the last folder counts most."""
    for part in reversed(relative.parts[:-1]):
        if found := split_in_name(part):
            return found
    return None


def split_in_name(name: str) -> str | None:
    """Return the split in a name such as ``instances_val2017.json``."""
    words = "".join(c if c.isalpha() else " " for c in name.lower()).split()
    found = {_SPLITS[word] for word in words if word in _SPLITS}
    return found.pop() if len(found) == 1 else None


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error


def _grouped(pairs: Iterable[tuple[str, Path]]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = defaultdict(list)
    for key, path in pairs:
        groups[key].append(path)
    return groups


def _closest(paths: list[Path], parts: list[str], near: Path) -> list[Path]:
    """Return those that share the most of the end of their path with ``parts``; of these, the nearest to a folder."""
    if len(paths) < 2:
        return paths
    scored = [(_shared(path.parts[-2::-1], parts[-2::-1]), path) for path in paths]
    most = max(score for score, _ in scored)
    best = [path for score, path in scored if score == most]
    if len(best) > 1:
        inside = [path for path in best if near in path.parents]
        split = split_in_name(near.name)
        same_split = [path for path in best if split and split_in_name(path.parent.name) == split]
        best = inside or same_split or best
    return best


def _shared(one: Iterable[str], other: Iterable[str]) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a.lower() != b.lower():
            break
        count += 1
    return count
