"""The annotations of a COCO file on disk, as loader processes share them: mapped into memory, an image read when asked."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam3_lora.data.index_file import NO_MASK, POLYGONS, RUN_LENGTHS, IndexColumns, collect, write_index
from sam3_lora.errors import DataError
from sam3_lora.output import cache_folder

_VERSION = 1  # of the file's layout; another one is built anew

_KEPT = 30 * 24 * 3600  # seconds that an index is kept after its last use

Row = Mapping[str, Any]


class CocoIndex:
    """The images of a COCO file by ascending id, each with its annotations, as the official loader keeps them.

    ``index[i]["image"]`` is ``{"id", "file_name", "width", "height"}``, ``index[i]["annotations"]`` a list of
    ``{"id", "category_id", "iscrowd", "bbox", "segmentation"}``; they are read from the file at that moment. A copy in another
    process, as of a ``DataLoader``, costs as good as nothing: the numbers are mapped, and the system keeps one copy of them.

    Attributes:
        path: The index file.
        categories: Category id -> name, in the order of the COCO file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        header, self._columns = _map(path)
        self._masks: int = header["masks"]
        self.categories: dict[int, str] = {int(key): name for key, name in header["categories"]}

    def __reduce__(self) -> tuple[type[CocoIndex], tuple[Path]]:
        return CocoIndex, (self.path,)

    def __len__(self) -> int:
        return len(self._columns["image_ids"])

    def __iter__(self) -> Iterator[Row]:
        return (self[position] for position in range(len(self)))

    def __getitem__(self, position: int) -> Row:
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        return _Row(self, position % len(self))

    def image(self, position: int) -> dict[str, Any]:
        """Return an image's entry of 'images'."""
        columns = self._columns
        start, end = columns["name_ends"][position : position + 2]
        height, width = columns["sizes_hw"][position].tolist()
        name = columns["names"][start:end].tobytes().decode("utf-8", "surrogatepass")
        return {
            "id": int(columns["image_ids"][position]),
            "file_name": name,
            "width": width,
            "height": height,
        }

    def annotations(self, position: int) -> list[dict[str, Any]]:
        """Return an image's entries of 'annotations', in the order of the COCO file."""
        return [self._annotation(row) for row in range(*self._rows(position))]

    def categories_of(self, position: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the category ids of an image's annotations, and which of them are crowds, without reading masks."""
        start, end = self._rows(position)
        return self._columns["categories"][start:end], self._columns["crowds"][start:end] != 0

    def _rows(self, position: int) -> tuple[int, int]:
        start, end = self._columns["starts"][position : position + 2].tolist()
        return start, end

    def _annotation(self, row: int) -> dict[str, Any]:
        columns = self._columns
        start, end = columns["mask_spans"][row].tolist()
        # Not mapped: what was read would count as this process's memory for as long as it is the only one.
        data = os.pread(self._file.fileno(), end - start, self._masks + start)
        return {
            "id": int(columns["annotation_ids"][row]),
            "category_id": int(columns["categories"][row]),
            "iscrowd": int(columns["crowds"][row]),
            "bbox": columns["boxes"][row].tolist(),
            "segmentation": _segmentation(int(columns["mask_kinds"][row]), data),
        }


class _Row(Mapping[str, Any]):
    """An image with its annotations, each read when it is asked for."""

    def __init__(self, index: CocoIndex, position: int) -> None:
        self._index, self._position = index, position

    def __getitem__(self, key: str) -> Any:
        if key == "image":
            return self._index.image(self._position)
        if key == "annotations":
            return self._index.annotations(self._position)
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(("image", "annotations"))

    def __len__(self) -> int:
        return 2


def open_index(annotation_file: str | Path) -> CocoIndex:
    """Return the index of a COCO file that passed the check, and build it first if it was not built since the file changed.

    It lies in the folder ``index`` of ``$SAM3_LORA_CACHE``, by default ``~/.cache/sam3-lora``, or where that cannot be
    written in the folder for temporary files. Several processes may call it at once: one builds, the others wait.

    Raises:
        DataError: If the file cannot be read, or its entries are not those of a checked dataset.
    """
    path = Path(annotation_file)
    try:
        resolved, stat = path.resolve(), path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    owner = hashlib.sha256(os.fsencode(resolved)).hexdigest()[:24]
    folder = _cache_folder()
    index = folder / f"{owner}-{stat.st_size}-{stat.st_mtime_ns}-{_VERSION}.index"
    with open(folder / f"{owner}.lock", "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            opened = CocoIndex(index)
        except (OSError, ValueError):  # not there, or of a disk that was full
            _build(resolved, index)
            opened = CocoIndex(index)
            _delete_old(folder, owner, index)
        os.utime(index)  # says when it was used last
    return opened


def _delete_old(folder: Path, owner: str, index: Path) -> None:
    """Delete other indexes of the same file, and those of any file that were not used for long."""
    for old in folder.glob("*.index"):
        with suppress(OSError):  # another process was first
            if old != index and (old.name.startswith(owner) or time.time() - old.stat().st_mtime > _KEPT):
                old.unlink()  # who has it open keeps it


def _build(annotation_file: Path, index: Path) -> None:
    temporary = index.with_name(f".{index.name}.{os.getpid()}.tmp")
    try:
        with tempfile.TemporaryFile(dir=index.parent) as masks:
            categories, columns = collect(annotation_file, masks)
            write_index(temporary, categories, columns, masks)
        temporary.replace(index)
    except OSError as error:
        raise DataError(
            f"the index of {annotation_file} cannot be written to {index.parent}: {error.strerror}; let SAM3_LORA_CACHE name "
            "another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _cache_folder() -> Path:
    wanted = cache_folder("index")
    for folder in (wanted, Path(tempfile.gettempdir(), f"sam3_lora-{os.getuid()}", "index")):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
        except OSError as error:
            problem = error
    raise DataError(
        f"no folder for the index of the annotations: {wanted} cannot be written: {problem.strerror}; let SAM3_LORA_CACHE "
        "name another"
    ) from problem


def _map(path: Path) -> tuple[dict[str, Any], IndexColumns]:
    """Return the header of an index file, and its columns as views of the mapped file."""
    mapped: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
    (length,) = struct.unpack("<Q", mapped[:8].tobytes())
    header = json.loads(mapped[8 : 8 + length].tobytes())
    columns = {}
    for name, (kind, shape, offset) in header["columns"].items():
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        columns[name] = mapped[offset : offset + size].view(kind).reshape(shape)
    return header, columns


def _segmentation(kind: int, data: bytes) -> Any:
    """Return what a mask was in the COCO file: polygons with numbers as floats, run lengths, or ``None``."""
    if kind == NO_MASK:
        return None
    if kind == POLYGONS:
        (count,) = struct.unpack_from("<I", data)
        ends = np.cumsum(np.frombuffer(data, dtype="<u4", count=count, offset=4))[:-1]
        numbers = np.frombuffer(data, dtype="<f8", offset=4 + 4 * count)
        return [part.tolist() for part in np.split(numbers, ends)]
    size, counts = list(struct.unpack_from("<qq", data)), data[16:]
    if kind == RUN_LENGTHS:
        return {"size": size, "counts": counts.decode("ascii")}
    return {"size": size, "counts": np.frombuffer(counts, dtype="<i8").tolist()}
