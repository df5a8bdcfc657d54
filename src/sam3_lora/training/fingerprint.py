"""What a run was started with, in a form that a later start can be compared with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

Fingerprint = dict[str, str]  # dotted name of a setting -> its value as text

# Where things lie and how they are fetched does not change the result; what lies there does, and is hashed instead.
_NOT_COMPARED = frozenset(
    {"img_folder", "ann_file", "gt_path", "num_workers", "pin_memory", "prepare", "cache"}
)

_FILES = frozenset({"phrases"})  # compared by what is in them


def fingerprint_of_run(settings: Mapping[str, Any]) -> Fingerprint:
    """Return the fingerprint of resolved trainer settings, with the contents of the datasets that they name.

    Args:
        settings: Parts of the trainer's config by name. A mapping with ``img_folder`` and ``ann_file`` in it is a
            dataset: its annotation file is hashed, and the names and sizes of its images.
    """
    container = OmegaConf.to_container(OmegaConf.create(dict(settings)), resolve=True)
    return dict(sorted(_flatten(container)))


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return a line for each setting that is not the same, or only there in one of the two."""
    return [
        f"{name} was {before.get(name, 'not set')}, is now {now.get(name, 'not set')}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        if value.get("img_folder") and value.get("ann_file"):
            yield from _dataset(Path(value["img_folder"]), Path(value["ann_file"]), name)
        for key, child in value.items():
            if key in _FILES and child:
                content = Path(child).expanduser().read_bytes()
                yield f"{name}.{key}", f"sha256 {hashlib.sha256(content).hexdigest()[:16]}"
            elif key not in _NOT_COMPARED:
                yield from _flatten(child, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, child in enumerate(value):
            yield from _flatten(child, f"{name}.{index}")
    else:
        yield name, repr(value)


def _dataset(folder: Path, annotation_file: Path, name: str) -> Iterator[tuple[str, str]]:
    content = annotation_file.read_bytes()
    yield f"{name}.annotations", f"sha256 {hashlib.sha256(content).hexdigest()[:16]}"
    sizes = {
        image["file_name"]: (folder / image["file_name"]).stat().st_size
        for image in json.loads(content)["images"]
        if (folder / image["file_name"]).is_file()
    }
    listing = json.dumps(sizes, sort_keys=True).encode()
    yield f"{name}.images", f"{len(sizes)} files, sha256 {hashlib.sha256(listing).hexdigest()[:16]}"
