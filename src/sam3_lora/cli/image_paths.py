"""Which images the words of a command line stand for, and names for what is made of each."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from sam3_lora.errors import DataError, as_report

#: What is taken from a folder; a file named by itself may have any suffix.
IMAGE_SUFFIXES = frozenset(".avif .bmp .gif .jpeg .jpg .png .tif .tiff .webp".split())


def find_images(words: Iterable[str]) -> list[Path]:
    """Return the files that words name, each once, in the order of the words and then by name.

    Args:
        words: Files, folders (their images, not those of their subfolders), and patterns such as ``"photos/**/*.jpg"``.

    Raises:
        DataError: If a word stands for nothing; names every such word.
    """
    found: dict[str, Path] = {}
    problems = []
    for word in words:
        paths = _expand(word)
        if not paths:
            problems.append(_nothing_found(word))
        for path in paths:
            found.setdefault(os.path.abspath(path), path)
    if problems:
        raise DataError(as_report(problems))
    return list(found.values())


def unique_stems(paths: Sequence[Path]) -> list[str]:
    """Return a file name without suffix for each path, no two the same.

    It is the stem of the path where no other has the same, else made of all its parts that differ: ``a/x.jpg`` and
    ``b/x.jpg`` become ``a_x.jpg`` and ``b_x.jpg``.
    """
    absolute = [Path(os.path.abspath(path)) for path in paths]
    shared = os.path.commonpath([path.parent for path in absolute]) if paths else ""
    count = Counter(path.stem.casefold() for path in absolute)
    taken: set[str] = set()
    stems = []
    for path in absolute:
        alone = count[path.stem.casefold()] == 1
        stem = _not_taken(path.stem if alone else "_".join(path.relative_to(shared).parts), taken)
        taken.add(stem.casefold())
        stems.append(stem)
    return stems


def _expand(word: str) -> list[Path]:
    path = Path(word)
    if path.is_dir():
        return sorted(file for file in path.iterdir() if _is_image_name(file) and file.is_file())
    if path.exists():
        return [path]
    return sorted(match for match in map(Path, glob.glob(word, recursive=True)) if match.is_file())


def _is_image_name(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _nothing_found(word: str) -> str:
    if Path(word).is_dir():
        pattern = os.path.join(word, "**", "*.jpg")
        return f"no image in the folder {word!r}; for its subfolders give a pattern, such as {pattern!r}"
    return f"nothing matches {word!r}" if glob.has_magic(word) else f"no file or folder {word!r}"


def _not_taken(stem: str, taken: set[str]) -> str:
    candidate, number = stem, 1
    while candidate.casefold() in taken:
        number += 1
        candidate = f"{stem}-{number}"
    return candidate
