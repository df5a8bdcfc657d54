"""Image files: their size, and whether they are whole, mostly without decoding them."""

from __future__ import annotations

import struct
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from sam3_lora.errors import DataError

#: What Pillow raises for a file that is damaged or no image, by format and place of the damage.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

_JPEG_END = b"\xff\xd9"
_JPEG_TAIL = 4096  # some cameras write a little after the end of the picture


def read_size_hw(path: Path) -> tuple[int, int]:
    """Return height and width of an image file as it is stored: a rotation in its EXIF data is not applied.

    PNG and JPEG files are not decoded unless they look damaged, so this takes about a millisecond.

    Raises:
        DataError: If the file is missing, no image, or cut short.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.format == "PNG":
                image.verify()  # the checksum of every chunk, up to the last
            elif image.format not in ("JPEG", "MPO") or not _has_jpeg_end(path):
                image.load()
    except FileNotFoundError as error:
        raise DataError(f"no file {path}") from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path} is empty" if not path.stat().st_size else f"{path} is not an image"
        ) from error
    except _DAMAGE as error:
        raise DataError(f"{path} is damaged: {error}") from error
    return height, width


def _has_jpeg_end(path: Path) -> bool:
    """Whether the end marker is there: the compressed picture itself cannot contain it."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _JPEG_TAIL))
        return _JPEG_END in file.read()
