"""Whether two pictures are the same: signatures that survive another size, format or compression."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SIDE = 8
_MOST_BITS = 6  # of 128 that may differ
_MOST_COLOUR = 16  # of 255 that a patch may differ by
_LEAST_CONTRAST = 3  # of 255; below, compression decides about the bits
_PARTS = 8  # 6 different bits leave two of eight parts alone

#: 16 bytes of bits, then the colours of 4 x 4 patches.
Signature = bytes


def signature(image: Image.Image) -> Signature:
    """Return 64 bytes that are near for pictures that look the same. ``image`` is RGB; a thumbnail will do.

    The bits say whether it gets brighter to the right and downwards (dHash, https://www.hackerfactor.com/blog/?/archives/529).
    """
    grey = image.convert("L")
    right = np.asarray(grey.resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), dtype=np.int16)
    down = np.asarray(grey.resize((_SIDE, _SIDE + 1), Image.Resampling.BOX), dtype=np.int16)
    steps = np.concatenate([np.diff(right, axis=1).ravel(), np.diff(down, axis=0).ravel()])
    colours = np.asarray(image.resize((4, 4), Image.Resampling.BOX), dtype=np.uint8)
    return np.packbits(steps > _LEAST_CONTRAST).tobytes() + colours.tobytes()


def same_pictures(first: Sequence[Signature], second: Sequence[Signature]) -> Iterator[tuple[int, int]]:
    """Yield a pair of positions for each picture of ``second`` that is in ``first`` too."""
    if not first or not second:
        return
    known = np.frombuffer(b"".join(first), dtype=np.uint8).reshape(len(first), -1)
    known, places = np.unique(known, axis=0, return_index=True)
    bits = known[:, :16].view(np.uint16)  # a column for each part
    orders = [np.argsort(bits[:, part], kind="stable") for part in range(_PARTS)]
    columns = [bits[order, part] for part, order in enumerate(orders)]
    for position, each in enumerate(second):
        asked = np.frombuffer(each, dtype=np.uint8)
        for part, value in enumerate(asked[:16].view(np.uint16)):
            low, high = np.searchsorted(columns[part], [value, value + np.uint32(1)])
            near = orders[part][low:high]
            if len(near) and len(match := near[_are_same(known[near], asked)]):
                yield int(places[match[0]]), position
                break


def _are_same(known: NDArray[np.uint8], asked: NDArray[np.uint8]) -> NDArray[np.bool_]:
    bits = np.bitwise_count(known[:, :16] ^ asked[:16]).sum(axis=1) <= _MOST_BITS
    colours = np.abs(known[:, 16:].astype(np.int16) - asked[16:]).max(axis=1) <= _MOST_COLOUR
    return bits & colours
