"""Adapter folders, written whole."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from sam3_lora.adapter.conversion import as_plain_lora, plain_strength, start_changes_base
from sam3_lora.adapter.files import ADAPTER_FILES, CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, changes_base
from sam3_lora.adapter.layers import (
    adapter_tensors,
    config_of,
    fingerprint_of,
    inner_model,
    method_of,
    modules_with,
    strengths_of,
)
from sam3_lora.adapter.origin import Origin, origin_of
from sam3_lora.adapter.wrapper import check_unpadded
from sam3_lora.errors import OutputError
from sam3_lora.model_card import model_card
from sam3_lora.output import replaced_folder
from sam3_lora.plan import preset_of
from sam3_lora.record import RECORD_FILE, AdapterRecord, config_digest, file_digest


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    prompts: Sequence[str] | None = None,
    training: Mapping[str, Any] | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> Path:
    """Write an adapter in PEFT's format, with a record of its making and a model card, and return the folder.

    The folder appears whole: it is written beside its place and renamed. An adapter that is there is
    replaced. Plain PEFT loads it with ``PeftModel.from_pretrained(split_attention(base), folder)``.

    Args:
        model: A ``PeftModel``, or the ``Sam3Image`` inside one.
        folder: Where to write; parents are made.
        adapter_name: Which adapter to write.
        prompts: What it was trained to find, for the record; ``None`` keeps those that it was loaded with.
        training: Summary of the training as JSON values, for the record; ``None`` as above.
        thresholds: Prompt -> score from which on :class:`~sam3_lora.Predictor` reports an object; ``None`` as above.

    Raises:
        AdapterError: If the model has no adapter of that name.
        OutputError: If something else than an adapter is at ``folder``.
    """
    inner = inner_model(model)
    config = copy.deepcopy(config_of(inner, adapter_name))
    check_unpadded(inner, adapter_name)
    config.inference_mode = True  # as PEFT saves it: a loaded adapter is frozen unless asked for
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in adapter_tensors(inner, adapter_name).items()
    }
    origin = _origin(inner, adapter_name, config, prompts, training, thresholds)
    if origin.initial and isinstance(config, LoraConfig):
        config, tensors = as_plain_lora(config, tensors, origin.initial)
    made_for = {"base_model_class": type(inner).__name__, "parent_library": type(inner).__module__}
    folder = Path(folder)
    _refuse_to_replace(folder)
    with replaced_folder(folder.resolve()) as new:
        save_file(tensors, new / WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(new), auto_mapping_dict=made_for)
        record = _record(inner, adapter_name, origin, tensors, new)
        (new / RECORD_FILE).write_text(record.as_json(), encoding="utf-8")
        (new / CARD_FILE).write_text(_card(inner, adapter_name, config, record), encoding="utf-8")
        for file in new.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read
    return folder


def _refuse_to_replace(folder: Path) -> None:
    """Raise if anything but an adapter would be lost."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputError(f"{str(folder)!r} is a file, which an adapter would replace; choose another place")
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in ADAPTER_FILES)
    if foreign:
        raise OutputError(f"{str(folder)!r} holds {foreign}, which an adapter would replace; choose another")


def _origin(
    inner: nn.Module,
    adapter_name: str,
    config: PeftConfig,
    prompts: Sequence[str] | None,
    training: Mapping[str, Any] | None,
    thresholds: Mapping[str, float] | None,
) -> Origin:
    """Return what the model remembers of the adapter, with what the caller knows better."""
    origin = origin_of(inner, adapter_name)
    if origin is None:  # it was added by plain PEFT
        origin = Origin({} if changes_base(config) else fingerprint_of(inner))
    return Origin(
        origin.base_fingerprint,
        origin.prompts if prompts is None else tuple(prompts),
        origin.training if training is None else dict(training),
        origin.initial,
        origin.thresholds if thresholds is None else dict(thresholds),
    )


def _record(
    inner: nn.Module, adapter_name: str, origin: Origin, tensors: Mapping[str, Tensor], folder: Path
) -> AdapterRecord:
    strengths = strengths_of(inner, adapter_name)
    return AdapterRecord(
        base=config_of(inner, adapter_name).base_model_name_or_path,
        base_fingerprint=origin.base_fingerprint,
        preset=preset_of(strengths, (name for name, _ in inner.named_modules())) if strengths else None,
        modules=len(modules_with(inner, adapter_name)),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        config_sha256=config_digest(folder / CONFIG_FILE),
        weights_sha256=file_digest(folder / WEIGHTS_FILE),
        prompts=origin.prompts,
        training=origin.training,
        thresholds=origin.thresholds,
    )


def _card(inner: nn.Module, adapter_name: str, config: PeftConfig, record: AdapterRecord) -> str:
    if not isinstance(config, LoraConfig):
        modules = dict.fromkeys(modules_with(inner, adapter_name), None)
        return model_card(record.base, record.preset, modules, record.parameters, method_of(config))
    strengths = strengths_of(inner, adapter_name)
    if start_changes_base(config_of(inner, adapter_name)):  # converted
        strengths = {
            name: plain_strength(strength, config.use_rslora) for name, strength in strengths.items()
        }
    return model_card(record.base, record.preset, strengths, record.parameters)
