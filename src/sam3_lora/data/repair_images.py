"""Repair of the images of a split: found, copied under a plain name, and saved anew where the trainer would misread them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from PIL import Image, ImageOps

from sam3_lora.data.image_files import ImageFacts, read_facts, read_image
from sam3_lora.data.split_check import size_hw_of
from sam3_lora.errors import DataError

Say = Callable[[str], None]

_ASPECT = 0.01  # by how much the sides of a resized image may differ in scale


@dataclass(frozen=True)
class RepairedImage:
    """An entry for the new file, and the size of the image that its labels are for."""

    entry: dict[str, Any]
    labelled_hw: tuple[int, int]

    @property
    def size_hw(self) -> tuple[int, int]:
        return self.entry["height"], self.entry["width"]


class ImageCopier:
    """Copies the images of one split into a new folder."""

    def __init__(self, source: Path, target: Path) -> None:
        self._source, self._target = source, target
        self._taken: set[str] = set()

    def copy(self, entry: Mapping[str, Any], say: Say) -> RepairedImage | None:
        """Return the entry of a copy of the image, or ``None`` if it must go; ``say`` gets what is done.

        The original is only read.
        """
        path = self.find(entry.get("file_name"))
        if path is None:
            say("image deleted: its file is missing")
            return None
        try:
            facts = read_facts(path)
            sizes = _sizes(size_hw_of(dict(entry)), facts)
            if sizes is None:
                say("image deleted: its size is not that of its file, and its labels may be for either")
                return None
            name = self._new_name(str(entry["file_name"]), path, say)
            size_hw = self._write(path, name, facts, sizes, say)
        except DataError:
            say("image deleted: its file cannot be read")
            return None
        if size_hw_of(dict(entry)) != size_hw:
            say("width and height written as they are in the file")
        kept = {**entry, "file_name": name, "height": size_hw[0], "width": size_hw[1]}
        return RepairedImage(kept, sizes)

    def find(self, file_name: object) -> Path | None:
        """Return the file that is meant: as it is called, or else by another case, slash or folder."""
        if not isinstance(file_name, str) or not file_name:
            return None
        slashed = file_name.replace("\\", "/")
        beside = PurePath(slashed).name
        for name in (file_name, slashed, beside, f"images/{beside}"):
            path = self._source / name
            if os.path.isfile(path):  # pathlib's raises for names that no file can have
                return path
            if os.path.isdir(path.parent):
                same = [e for e in path.parent.iterdir() if e.name.casefold() == path.name.casefold()]
                if len(same) == 1 and same[0].is_file():
                    return same[0]
        return None

    def _new_name(self, file_name: str, path: Path, say: Say) -> str:
        """Return a path inside the split that no other image has, on no machine."""
        lexical = PurePath(file_name)
        inside = not lexical.is_absolute() and ".." not in lexical.parts and self._source / lexical == path
        name = PurePath(file_name if inside else path.name)
        number = 1
        while str(new := name.with_stem(name.stem + f"-{number}" * (number > 1))).casefold() in self._taken:
            number += 1
        self._taken.add(str(new).casefold())
        if str(new) != file_name:
            say("image renamed: its path was not inside the split, or another name differed only by case")
        elif path.is_symlink() or self._source.resolve() not in path.resolve().parents:
            say("image copied from behind a symbolic link")
        return str(new)

    def _write(
        self, path: Path, name: str, facts: ImageFacts, labelled_hw: tuple[int, int], say: Say
    ) -> tuple[int, int]:
        target = self._target / name
        target.parent.mkdir(parents=True, exist_ok=True)
        upright = facts.orientation > 4 and labelled_hw == facts.size_hw[::-1] != facts.size_hw
        reads_wrong = facts.sixteen_bits or facts.mode == "CMYK" or facts.alpha
        if not upright and not reads_wrong:
            shutil.copyfile(path, target)
            return facts.size_hw
        with Image.open(path) as stored:
            format_ = "JPEG" if stored.format == "MPO" else stored.format
            picture = stored
            if facts.sixteen_bits:
                picture = read_image(path)  # upright
            elif upright:
                picture = ImageOps.exif_transpose(stored)
            if facts.sixteen_bits and not upright and facts.orientation > 1:
                raise DataError(f"{path} is turned and of 16 bits")
            picture = picture.convert("RGBA").convert("RGB") if facts.alpha else picture.convert("RGB")
            picture.save(target, format=format_, **_save_options(format_))
        say("image saved upright, as it was labelled" if upright else "image saved in 8-bit RGB")
        return picture.height, picture.width


def _sizes(listed_hw: tuple[int, int] | None, facts: ImageFacts) -> tuple[int, int] | None:
    """Return the size that labels are for, or ``None`` if that is not certain."""
    if listed_hw is None or listed_hw == facts.size_hw:
        return facts.size_hw
    if facts.orientation > 4 and listed_hw == facts.size_hw[::-1]:
        return listed_hw
    scales = [stored / listed for stored, listed in zip(facts.size_hw, listed_hw, strict=True)]
    return listed_hw if abs(scales[0] / scales[1] - 1) < _ASPECT else None


def _save_options(format_: str | None) -> dict[str, Any]:
    if format_ == "JPEG":
        return {"quality": 95, "subsampling": 0}
    return {"lossless": True} if format_ == "WEBP" else {}
