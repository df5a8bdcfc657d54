"""The pictures of a source, and how each of them comes to the target: linked, copied, turned upright or written."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image, ImageOps

from sam3_lora.data.image_files import read_facts

_TRANSPOSED = (5, 6, 7, 8)  # orientations of EXIF that swap height and width
_JPEG_QUALITY = 95


class Picture(Protocol):
    """One picture, wherever it is kept."""

    @property
    def name(self) -> str:
        """The file name that it should have."""

    @property
    def place(self) -> str:
        """Where a person finds it."""

    def write(self, target: Path, copy: bool) -> None:
        """Bring it to a path that does not exist.

        Raises:
            DataError: If there is no picture.
            OSError: If it cannot be read or written.
        """


@dataclass(frozen=True)
class FilePicture:
    """A picture that is a file of the source."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def place(self) -> str:
        return str(self.path)

    def write(self, target: Path, copy: bool) -> None:
        real = os.path.realpath(self.path)
        if not copy:
            try:
                os.link(real, target)
                return
            except OSError:  # another disk, a file system without links, or somebody else's file
                pass
        shutil.copyfile(real, target)


@dataclass(frozen=True)
class StoredPicture:
    """A picture that is stored in a label file or a table; ``read`` returns the bytes of an image file."""

    name: str
    place: str
    read: Callable[[], bytes]

    def write(self, target: Path, copy: bool) -> None:
        target.write_bytes(self.read())


def sizes_hw(path: Path) -> tuple[tuple[int, int], tuple[int, int], bool]:
    """Return the size of an image file as stored and as seen upright, and whether the two are turned to each other.

    Raises:
        DataError: If the file is missing, no image, or cut short.
    """
    facts = read_facts(path)
    height, width = facts.size_hw
    seen = (width, height) if facts.orientation in _TRANSPOSED else (height, width)
    return facts.size_hw, seen, facts.orientation != 1


def turn_upright(path: Path) -> None:
    """Replace an image file of ours by its upright copy, in the same format, without the rotation in its EXIF data."""
    with Image.open(path) as image:
        kind = image.format or "PNG"
        upright = ImageOps.exif_transpose(image)
    memory = io.BytesIO()
    if kind in ("JPEG", "MPO"):
        upright.save(
            memory, "JPEG", quality=_JPEG_QUALITY, subsampling=0, icc_profile=upright.info.get("icc_profile")
        )
    else:
        upright.save(memory, kind)
    path.unlink()  # it may be a link to the user's file
    path.write_bytes(memory.getvalue())


def free_name(wanted: str, taken: set[str], folder: str = "") -> str:
    """Return the name, or one like it that no file system takes for another of the target, and add it to ``taken``.

    Args:
        taken: Names in use, in lower case.
        folder: The name of the folder that the image came from, to tell two of the same name apart.
    """
    name = "".join(
        "_" if "\ud800" <= c <= "\udfff" or ord(c) < 32 or c in '\\/:*?"<>|' else c for c in wanted
    )
    candidates = [name, f"{folder}_{name}" if folder else name]
    stem, suffix = os.path.splitext(name)
    number = 2
    for candidate in candidates:
        if candidate.lower() not in taken:
            break
    else:
        while f"{stem}_{number}{suffix}".lower() in taken:
            number += 1
        candidate = f"{stem}_{number}{suffix}"
    taken.add(candidate.lower())
    return candidate
