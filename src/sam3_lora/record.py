"""``sam3_lora.json``: what an adapter was made with and for, so that loading it can be strict. Plain data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sam3_lora.components import COMPONENT_MAP_VERSION
from sam3_lora.errors import AdapterError
from sam3_lora.output import write_text_atomic

RECORD_FILE = "sam3_lora.json"

_FORMAT = 1  # raise it when an older sam3-lora would misread the file
# In adapter_config.json, but of no consequence for what the adapter does.
_NO_SETTINGS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
_PACKAGES = ("sam3-lora", "sam3", "peft", "torch")


@dataclass(frozen=True)
class AdapterRecord:
    """The contents of ``sam3_lora.json``.

    Attributes:
        base: Name of the base, as :func:`sam3_lora.load_base` takes it.
        base_fingerprint: Component -> hash, from :func:`sam3_lora.fingerprint.base_fingerprint`.
        preset: Its name, or ``None`` for a choice of the user's own.
        modules: Number of adapted modules.
        parameters: How many numbers the adapter holds.
        config_sha256: Hash of the settings in ``adapter_config.json``.
        weights_sha256: Hash of ``adapter_model.safetensors``.
        prompts: What it was trained to find.
        training: Summary of the run: epoch, images, metrics and so on. Empty for an adapter that was not trained by us.
        thresholds: Prompt -> score from which on an object is reported, where the validation split said a better one
            than 0.5.
        versions: Package -> version that wrote it.
    """

    base: str | None
    base_fingerprint: Mapping[str, str]
    preset: str | None
    modules: int
    parameters: int
    config_sha256: str
    weights_sha256: str
    prompts: Sequence[str] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    component_map_version: int = COMPONENT_MAP_VERSION
    versions: Mapping[str, str] = field(
        default_factory=lambda: {package: version(package) for package in _PACKAGES}
    )
    format_version: int = _FORMAT

    def as_json(self) -> str:
        """Return the text of the file."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def read_record(folder: Path) -> AdapterRecord | None:
    """Return the record of an adapter folder; ``None`` if it has none, as when plain PEFT wrote it.

    Raises:
        AdapterError: If the file is damaged or of a newer format.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format_version"] > _FORMAT:
            raise AdapterError(
                f"{str(path)!r} was written by sam3-lora {values.get('versions', {}).get('sam3-lora', '?')} in a format "
                f"that this one, {version('sam3-lora')}, does not know; install the newer one"
            )
        known = {f.name for f in dataclasses.fields(AdapterRecord)}
        return AdapterRecord(**{name: value for name, value in values.items() if name in known})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterError(
            f"{str(path)!r} is damaged ({type(error).__name__}: {error}); copy it again"
        ) from error


def record_thresholds(folder: Path, thresholds: Mapping[str, float]) -> None:
    """Replace the thresholds in the record of an adapter folder.

    Raises:
        AdapterError: If the folder has no record, or a damaged one.
    """
    record = read_record(folder)
    if record is None:
        raise AdapterError(
            f"{folder} has no {RECORD_FILE}, where thresholds are kept; load the adapter and save it with save_adapter"
        )
    changed = dataclasses.replace(record, thresholds=dict(thresholds))
    write_text_atomic(folder / RECORD_FILE, changed.as_json())


def version_problems(record: AdapterRecord) -> list[str]:
    """Return why an adapter of these versions cannot be trusted here: other names of modules, or another SAM3."""
    problems = []
    if record.component_map_version != COMPONENT_MAP_VERSION:
        problems.append(
            f"component map: the adapter has version {record.component_map_version!r}, this sam3-lora "
            f"{COMPONENT_MAP_VERSION}; load it with sam3-lora {record.versions.get('sam3-lora', '?')}"
        )
    written, here = record.versions.get("sam3", ""), version("sam3")
    if written and _series(written) != _series(here):
        problems.append(
            f"sam3: the adapter was trained with {written}, here is {here}; install sam3=={written}"
        )
    return problems


def config_digest(path: Path) -> str:
    """Return the SHA-256 of what matters in an ``adapter_config.json``, in whatever order it stands there."""
    values = json.loads(path.read_text(encoding="utf-8"))
    settings = {name: value for name, value in values.items() if name not in _NO_SETTINGS}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _series(release: str) -> list[str]:
    return release.split(".")[:2]
