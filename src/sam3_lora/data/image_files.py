"""Image files: their pixels; and what they are, and whether they are whole, mostly without decoding them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sam3_lora.data.similar import Signature, signature
from sam3_lora.errors import DataError

#: What Pillow raises for a file that is damaged or no image, by format and place of the damage.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

_JPEG_END = b"\xff\xd9"
_JPEG_TAIL = 4096  # some cameras write a little after the end of the picture
_JPEG = ("JPEG", "MPO")

_ORIENTATION = 0x0112  # the tag of EXIF; 1 is upright
_THUMBNAIL = (256, 256)  # at least; a JPEG decodes to it at once


@dataclass(frozen=True)
class ImageFacts:
    """What an image file is, as it is stored: ``size_hw`` and ``mode`` as Pillow opens it, the ``orientation`` of its EXIF
    data (1 to 8), whether it has an ``alpha`` channel (that is not opaque, if it was decoded), and then the signature of its
    picture."""

    size_hw: tuple[int, int]
    mode: str
    orientation: int = 1
    alpha: bool = False
    signature: Signature | None = None

    @property
    def sixteen_bits(self) -> bool:
        return self.mode == "F" or self.mode.startswith("I")


def read_facts(path: Path, pixels: bool = False) -> ImageFacts:
    """Return what an image file is.

    Args:
        path: The file.
        pixels: Decode it. Else PNG and JPEG files are decoded only if they look damaged, which takes about a millisecond.

    Raises:
        DataError: If the file is missing, no image, or cut short.
    """
    with _damage_reported(path), Image.open(path) as image:
        width, height = image.size
        mode, alpha = image.mode, _has_alpha(image)
        orientation, found = _orientation(image), None
        if pixels:
            image.draft("RGB", _THUMBNAIL)  # all of the file is read all the same
            found = signature(to_thumbnail(image))
            alpha = alpha and image.convert("RGBA").getextrema()[3][0] < 255
        elif image.format == "PNG":
            image.verify()  # the checksum of every chunk, up to the last
        elif image.format not in _JPEG or not _has_jpeg_end(path):
            image.load()
    return ImageFacts((height, width), mode, orientation, alpha, found)


def to_thumbnail(image: Image.Image) -> Image.Image:
    """Return the picture in RGB, for its looks only."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        low, high = np.nan_to_num([values.min(), values.max()])
        scaled = np.nan_to_num(values - low) * (255 / max(high - low, 1e-9))
        image = Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _orientation(image: Image.Image) -> int:
    if image.format not in (*_JPEG, "PNG", "WEBP") or "exif" not in image.info:  # Pillow turns a TIFF itself
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
    return value if value in range(1, 9) else 1


def read_image(path: str | Path) -> Image.Image:
    """Return the picture in a file in 8-bit RGB, upright: a rotation in its EXIF data is applied.

    Of several frames it is the first. See :func:`to_rgb` for the pixels.

    Raises:
        DataError: If the file is missing, no image, or cut short.
    """
    path = Path(path)
    with _damage_reported(path), Image.open(path) as image:
        return to_rgb(ImageOps.exif_transpose(image), str(path))


def to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """Return the image in 8-bit RGB, as the official training data loader does (``sam3_image_dataset.py:219``): alpha
    is left out, and colours below it show.

    Unlike there, 16 bits are scaled to 8 rather than clipped to white: 65535 becomes 255, and 1.0 of a float image.

    Raises:
        DataError: If the values of an integer image leave 0 to 65535, or those of a float image 0 to 1.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _scaled_to_8_bits(image, name).convert("RGB")
    if "transparency" in image.info:
        image = image.convert("RGBA")  # from a palette straight to RGB, Pillow warns
    return image.convert("RGB")


def _scaled_to_8_bits(image: Image.Image, name: str) -> Image.Image:
    values, white = np.asarray(image), 1.0 if image.mode == "F" else 65535.0
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # NaN fails as well
        raise DataError(
            f"{name} has pixel values from {low:g} to {high:g}; scale them to 0 to {white:g}, or save it with 8 bits"
        )
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))


@contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    """Turn what Pillow raises for a file into a ``DataError`` that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"no file {path}") from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path} is empty" if not path.stat().st_size else f"{path} is not an image"
        ) from error
    except (IsADirectoryError, PermissionError) as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except _DAMAGE as error:
        raise DataError(f"{path} is damaged: {error}") from error


def _has_jpeg_end(path: Path) -> bool:
    """Whether the end marker is there: the compressed picture itself cannot contain it."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _JPEG_TAIL))
        return _JPEG_END in file.read()
