"""How an index of a COCO file is written: a header in JSON, then columns of numbers, then all masks."""

from __future__ import annotations

import json
import os
import shutil
import struct
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from sam3_lora.data.stream import read_entries
from sam3_lora.errors import DataError

NO_MASK, POLYGONS, RUN_LENGTHS, PLAIN_RUN_LENGTHS = range(4)

IndexColumns = dict[str, NDArray[Any]]

_ALIGNED = 64  # bytes


def collect(annotation_file: Path, masks: IO[bytes]) -> tuple[dict[int, str], IndexColumns]:
    """Return the categories of a COCO file and its columns of numbers, and write its masks, in the order of the file.

    Raises:
        DataError: If the file cannot be read, or an entry is not as the check of datasets wants it.
    """
    images: dict[int, tuple[bytes, int, int]] = {}
    categories: dict[int, str] = {}
    rows = _Rows(masks)
    for key, position, entry in read_entries(annotation_file):
        try:
            if key == "annotations":
                rows.add(entry)
            elif key == "categories":
                categories[entry["id"]] = entry["name"]
            else:
                name = entry["file_name"].encode("utf-8", "surrogatepass")
                images[entry["id"]] = (name, entry["height"], entry["width"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(
                f"{annotation_file}: {key}[{position}] cannot be used ({error!r}); 'sam3-lora data check' says what is wrong"
            ) from error
    return categories, _image_columns(images) | rows.sorted_by_image(sorted(images))


def write_index(
    path: Path, categories: Mapping[int, str], columns: Mapping[str, NDArray[Any]], masks: IO[bytes]
) -> None:
    """Write an index file.

    Args:
        path: The file, which is not there yet.
        categories: Of :func:`collect`, as the columns and the masks.
    """
    header = _header(categories, columns)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for column in columns.values():
            file.write(bytes(-file.tell() % _ALIGNED) + column.tobytes())
        file.write(bytes(-file.tell() % _ALIGNED))
        masks.seek(0)
        shutil.copyfileobj(masks, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())


def _header(categories: Mapping[int, str], columns: Mapping[str, NDArray[Any]]) -> bytes:
    """Return the header with the offsets of the columns, which begin behind it, and of the masks."""
    text = {"categories": list(categories.items()), "columns": {}, "masks": 0}
    room = len(json.dumps(text)) + 256 * (len(columns) + 1)
    offset, places = 8 + room, {}
    for name, column in columns.items():
        offset += -offset % _ALIGNED
        places[name] = (column.dtype.str, list(column.shape), offset)
        offset += column.nbytes
    return json.dumps(text | {"columns": places, "masks": offset + -offset % _ALIGNED}).encode().ljust(room)


def _image_columns(images: Mapping[int, tuple[bytes, int, int]]) -> IndexColumns:
    ids = sorted(images)
    names = [images[key][0] for key in ids]
    return {
        "image_ids": np.array(ids, dtype=np.int64),
        "sizes_hw": np.array([images[key][1:] for key in ids], dtype=np.int64).reshape(-1, 2),
        "name_ends": np.cumsum([0, *map(len, names)], dtype=np.int64),
        "names": np.frombuffer(b"".join(names), dtype=np.uint8),
    }


class _Rows:
    """Annotations as columns, in the order of the file."""

    def __init__(self, masks: IO[bytes]) -> None:
        self._masks = masks
        self._end = 0
        self._numbers = {name: array("q") for name in ("annotation_ids", "images", "categories", "ends")}
        self._crowds, self._mask_kinds, self._boxes = array("b"), array("b"), array("d")

    def add(self, entry: Mapping[str, Any]) -> None:
        kind, data = _packed(entry.get("segmentation"))
        box = entry["bbox"]
        if len(box) != 4:
            raise ValueError("bbox")
        self._end += len(data)
        for name, value in (
            ("annotation_ids", entry["id"]),
            ("images", entry["image_id"]),
            ("categories", entry["category_id"]),
            ("ends", self._end),
        ):
            self._numbers[name].append(value)
        self._crowds.append(int(entry["iscrowd"]))
        self._mask_kinds.append(kind)
        self._boxes.extend(box)
        self._masks.write(data)

    def sorted_by_image(self, image_ids: list[int]) -> IndexColumns:
        """Return the columns with the annotations of an image together, in their order, and where each image begins."""
        numbers = {name: np.frombuffer(column, dtype=np.int64) for name, column in self._numbers.items()}
        order = np.argsort(numbers["images"], kind="stable")
        known = np.isin(numbers["images"][order], np.array(image_ids, dtype=np.int64))
        order = order[known]
        ends = numbers["ends"]
        spans = np.stack([np.concatenate([[0], ends[:-1]])[: len(ends)], ends], axis=1).astype(np.int64)
        return {
            "starts": np.searchsorted(
                numbers["images"][order], [*image_ids, np.iinfo(np.int64).max], side="left"
            ).astype(np.int64),
            "annotation_ids": numbers["annotation_ids"][order],
            "categories": numbers["categories"][order],
            "crowds": np.frombuffer(self._crowds, dtype=np.int8)[order],
            "boxes": np.frombuffer(self._boxes, dtype=np.float64).reshape(-1, 4)[order],
            "mask_kinds": np.frombuffer(self._mask_kinds, dtype=np.int8)[order],
            "mask_spans": spans[order],
        }


def _packed(segmentation: Any) -> tuple[int, bytes]:
    if segmentation is None or segmentation == []:
        return NO_MASK, b""
    if isinstance(segmentation, list):
        lengths = struct.pack(f"<{len(segmentation) + 1}I", len(segmentation), *map(len, segmentation))
        return POLYGONS, lengths + b"".join(array("d", part).tobytes() for part in segmentation)
    size, counts = struct.pack("<qq", *segmentation["size"]), segmentation["counts"]
    if isinstance(counts, str):
        return RUN_LENGTHS, size + counts.encode("ascii")
    return PLAIN_RUN_LENGTHS, size + array("q", counts).tobytes()
