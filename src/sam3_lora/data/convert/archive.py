"""Zip archives from anywhere, unpacked so that nothing lands outside the folder and no bomb fills the disk."""

from __future__ import annotations

import shutil
import stat
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path, PurePosixPath

from sam3_lora.data.convert.report import ARCHIVE
from sam3_lora.data.problems import Findings, describe
from sam3_lora.errors import DataError

#: A larger archive is refused if it grows by more than this when unpacked. Images do not shrink; masks and labels do,
#: by 20 to 200 times at most; a file of zeros by 1000.
_MOST_GROWTH = 100
_ALWAYS_FINE = 256 << 20  # bytes
_MOST_ENTRIES = 4_000_000
_CHUNK = 1 << 20
_JUNK = ("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini")
_FLAG_ENCRYPTED, _FLAG_UTF8 = 0x1, 0x800


def extract_zip(path: Path, folder: Path) -> None:
    """Unpack a zip archive into a folder, once all its entries are found safe.

    Raises:
        DataError: With all unsafe entries: absolute or with ``..``, links, encrypted, twice there; or if the archive is
            damaged, or grows beyond reason.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [(entry, _name(entry)) for entry in archive.infolist()]
            entries = [(entry, name) for entry, name in entries if not _is_junk(name)]
            _refuse_unsafe(path, entries)
            _refuse_growth(path, sum(entry.file_size for entry, _ in entries), folder)
            budget = _limit(path)
            for entry, name in entries:
                budget = _extract(archive, entry, folder / name, budget, path)
    # A RuntimeError, or the kind of it that says so, is for a way of packing that zipfile does not know.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DataError(f"{path} is not a whole zip archive: {error}; download it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be unpacked: {error.strerror or error}") from error


def _name(entry: zipfile.ZipInfo) -> str:
    """Return the name; where its encoding is not said, UTF-8 if it is that, else that of MS-DOS, as the format has it."""
    name = entry.filename
    if not entry.flag_bits & _FLAG_UTF8:
        with suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


def _is_junk(name: str) -> bool:
    return any(part in _JUNK for part in PurePosixPath(name).parts)


def _refuse_unsafe(path: Path, entries: list[tuple[zipfile.ZipInfo, str]]) -> None:
    found, seen = Findings(), set()
    if len(entries) > _MOST_ENTRIES:
        found.add(ARCHIVE, f"{len(entries)} entries; {_MOST_ENTRIES} are allowed")
    for entry, name in entries:
        reason = _unsafe(entry, name)
        if not reason and name in seen:
            reason = "is there twice"
        seen.add(name)
        if reason:
            found.add(ARCHIVE, f"{name!r} {reason}")
    if problems := found.problems():
        raise DataError(describe(f"{path} cannot be unpacked", problems))


def _unsafe(entry: zipfile.ZipInfo, name: str) -> str:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or (len(name) > 1 and name[1] == ":"):
        return "is an absolute path"
    if ".." in parts:
        return "leads out of the archive"
    if not parts or "\0" in name or any(len(part.encode("utf-8", "replace")) > 255 for part in parts):
        return "is not a usable file name"
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a symbolic link" if kind == stat.S_IFLNK else "is a device"
    return "is encrypted" if entry.flag_bits & _FLAG_ENCRYPTED else ""


def _limit(path: Path) -> int:
    return max(_ALWAYS_FINE, _MOST_GROWTH * path.stat().st_size)


def _refuse_growth(path: Path, total: int, folder: Path) -> None:
    if total > _limit(path):
        raise _bomb(path, total)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise DataError(
            f"{path} needs {total / 1e9:.1f} GB unpacked, and {free / 1e9:.1f} GB are free beside the target; make room"
        )


def _bomb(path: Path, total: int) -> DataError:
    return DataError(
        f"{path} is {path.stat().st_size / 1e6:.1f} MB and would become {total / 1e6:,.0f} MB or more, which labelled "
        f"images do not; if you trust it, unpack it yourself and give the folder"
    )


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, to: Path, budget: int, path: Path) -> int:
    """Unpack one entry and return how many bytes may still come: the sizes that an archive states may be lies."""
    if entry.is_dir() or entry.filename.endswith("\\"):
        to.mkdir(parents=True, exist_ok=True)
        return budget
    to.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(entry) as packed, to.open("xb") as file:
        while chunk := packed.read(_CHUNK):
            budget -= len(chunk)
            if budget < 0:
                raise _bomb(path, _limit(path))
            file.write(chunk)
    return budget
