"""The files of an adapter folder: PEFT's own with our record and card beside them, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sam3_lora.adapter.layers import PEFT_PREFIX, PREFIX
from sam3_lora.adapter.methods import refuse_method
from sam3_lora.adapter.wrapping import INIT_FROM_WEIGHTS
from sam3_lora.errors import AdapterError, ConfigError
from sam3_lora.record import RECORD_FILE, AdapterRecord, read_record

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
CARD_FILE = "README.md"
ADAPTER_FILES = (WEIGHTS_FILE, CONFIG_FILE, RECORD_FILE, CARD_FILE)
_PICKLES = ("*.pth", "*.pt", "*.bin", "*.ckpt")


@dataclass(frozen=True)
class SavedAdapter:
    """What an adapter folder holds; ``record`` is ``None`` where plain PEFT wrote it."""

    folder: Path
    config: PeftConfig
    tensors: Mapping[str, Tensor]
    record: AdapterRecord | None


def adapter_folder(folder: str | Path) -> Path:
    """Return where the files of an adapter lie: the one place that turns what a user names into a folder."""
    return Path(folder)


def read_adapter(folder: str | Path) -> SavedAdapter:
    """Read the files of an adapter.

    Raises:
        AdapterError: If files are missing or damaged, or of another kind of adapter.
    """
    folder = adapter_folder(folder)
    _refuse_other_kinds(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT does not check what it reads
        raise AdapterError(f"{str(folder / CONFIG_FILE)!r} is damaged: {error}") from error
    try:
        refuse_method(config)
    except ConfigError as error:
        raise AdapterError(f"{str(folder)!r} cannot be loaded: {error}") from error
    try:
        tensors: dict[str, Tensor] = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise AdapterError(f"{str(folder / WEIGHTS_FILE)!r} is damaged: {error}") from error
    if tensors and not any(name.startswith(PEFT_PREFIX) for name in tensors):
        raise AdapterError(
            f"{str(folder / WEIGHTS_FILE)!r} has keys without PEFT's prefix {PREFIX!r}; PEFT would ignore them"
        )
    return SavedAdapter(folder, config, tensors, read_record(folder))


def recorded_base(folder: str | Path) -> str:
    """Return the name of the base model that a saved adapter was made for.

    Raises:
        AdapterError: If files are missing or damaged, or the base was not recorded.
    """
    config = read_adapter(folder).config
    if not config.base_model_name_or_path:
        raise AdapterError(f"{str(folder)!r} does not say which base it was made for; name it with base=")
    return str(config.base_model_name_or_path)


def changes_base(config: PeftConfig) -> str:
    """Return the setting by which an adapter of this kind changes weights of the base in place, or ``""``."""
    if (bias := getattr(config, "bias", "none")) != "none":
        return f"bias={bias!r}"
    start = getattr(config, "init_lora_weights", None)
    return f"init_lora_weights={start!r}" if str(start).startswith(INIT_FROM_WEIGHTS) else ""


def _refuse_other_kinds(folder: Path) -> None:
    """Raise if this is no folder with an adapter's files, and say what it is instead where that can be told."""
    if folder.is_file():
        raise AdapterError(
            f"{str(folder)!r} is a file. An adapter is a folder with {WEIGHTS_FILE} and {CONFIG_FILE}; pickles such as "
            ".pth can run code when they are read and do not say which modules they belong to, so they are not loaded"
        )
    missing = [name for name in (WEIGHTS_FILE, CONFIG_FILE) if not (folder / name).is_file()]
    if not missing:
        return
    hint = ""
    if (folder / "adapters").is_dir():
        hint = f"; did you mean {str(folder / 'adapters' / 'best')!r}?"
    elif pickles := sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
        hint = f"; {pickles[0]} is a pickle, which can run code when it is read: save as safetensors"
    raise AdapterError(
        f"{str(folder)!r} is not an adapter folder: it has no {' and no '.join(missing)}{hint}"
    )
