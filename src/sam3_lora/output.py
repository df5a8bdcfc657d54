"""Output folders that never cost a user anything that was there, and files that are whole or absent."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3_lora.errors import OutputError

if TYPE_CHECKING:
    from PIL import Image

#: In every folder that a command made; only what holds it is ever deleted.
MARKER_FILE = ".sam3-lora-run.json"

#: Commands whose folder is a result to look at: running one again replaces what it left.
_REPLACES_ITS_OWN = frozenset({"demo"})


def check_output(folder: Path, made_by: str, overwrite: bool = False) -> None:
    """Do nothing if :func:`claim_output` may use the folder; nothing on disk changes.

    Raises:
        OutputError: If the folder holds something that must not be deleted, is a file, or cannot be written.
    """
    _check_contents(folder, made_by, overwrite)
    try:
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise _not_writable(folder, error) from error


def claim_output(folder: Path, made_by: str, overwrite: bool = False) -> None:
    """Make the folder, or empty it where that is allowed, and mark it as made by a command.

    A folder that is not empty is only replaced if sam3-lora made it, and then with ``overwrite`` or when the demo
    finds its own.

    Args:
        folder: Made with its parents. If it exists, it stays and its contents go, so it may be a mount or a link.
        made_by: The verb of the command line, such as ``"train"``.
        overwrite: Replace an earlier run.

    Raises:
        OutputError: If the folder must be left alone or cannot be written.
    """
    check_output(folder, made_by, overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark_made(folder, made_by)
        _delete_contents(folder, keep=MARKER_FILE)
    except OSError as error:
        raise _not_writable(folder, error) from error


def mark_made(folder: Path, made_by: str) -> None:
    """Mark a folder as made by a command, so that the command may replace it."""
    write_json_atomic(folder / MARKER_FILE, {"command": made_by, "version": version("sam3-lora")})


def mark_finished(folder: Path) -> None:
    """Note in a folder that :func:`claim_output` made that its command has come to its end."""
    write_json_atomic(folder / MARKER_FILE, {**_marker(folder), "finished": True})


def is_finished(folder: Path) -> bool:
    """Whether :func:`mark_finished` was called for a folder."""
    return _marker(folder).get("finished") is True


def write_text_atomic(path: Path, text: str) -> None:
    """Write a UTF-8 text file, mode 0644, so that a reader or a crash sees the old file or the new one, never a part."""
    _write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_image_atomic(path: Path, image: Image.Image) -> None:
    """Write a picture in the format that its name says, as :func:`write_text_atomic` writes text."""
    file_format = path.suffix.removeprefix(".")
    _write_atomic(path, lambda temporary: image.save(temporary, format=file_format))


def write_json_atomic(path: Path, value: Any) -> None:
    """Write a value as indented JSON, as :func:`write_text_atomic` writes text."""
    write_text_atomic(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it takes the place of ``folder`` at the end, and is deleted if the block fails.

    What was there is moved aside before and deleted after, so a crash leaves one of the two whole, in the worst
    case the old one under the name ``.<name>.old``, from where the next call puts it back.
    """
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_contents(folder: Path, made_by: str, overwrite: bool) -> None:
    try:
        present = sorted(entry.name for entry in folder.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:  # a file, or a folder that may not be listed
        raise OutputError(
            f"{folder} cannot be the output folder: {error.strerror}; choose another"
        ) from error
    if not present:
        return
    maker = _maker(folder)
    if maker is not None and (overwrite or (maker == made_by and made_by in _REPLACES_ITS_OWN)):
        return
    shown = ", ".join(present[:4]) + (f" and {len(present) - 4} more" if len(present) > 4 else "")
    if maker == "train" and not is_finished(folder):
        way_out = f"it holds an unfinished run: go on with --resume {folder}, or --overwrite to start anew"
    elif maker is None:
        way_out = "choose another folder, or empty this one yourself: sam3-lora deletes only what it made"
    else:
        way_out = f"it was made by 'sam3-lora {maker}': choose another folder, or --overwrite to replace it"
    raise OutputError(f"{folder} is not empty (it holds {shown}); {way_out}")


def _not_writable(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"{folder} cannot be written: {error.strerror}; choose another output folder")


def _maker(folder: Path) -> str | None:
    """Return the command that made a folder; None if none of ours did."""
    command = _marker(folder).get("command")
    return command if isinstance(command, str) else None


def _marker(folder: Path) -> dict[str, Any]:
    try:
        marker = json.loads((folder / MARKER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return marker if isinstance(marker, dict) else {}


def _delete_contents(folder: Path, keep: str) -> None:
    for entry in folder.iterdir():
        if entry.name == keep:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o644)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave the new name with no contents
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def cache_folder(kind: str) -> Path:
    """Return the folder, there or not, in which things of a kind are kept from run to run: in the one that the environment
    variable ``SAM3_LORA_CACHE`` names, or else in ``~/.cache/sam3-lora``."""
    return Path(os.environ.get("SAM3_LORA_CACHE", "~/.cache/sam3-lora"), kind).expanduser()
