"""Adapter folders: PEFT's own format with our record and card beside it, written whole and loaded strictly."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sam3_lora.adapter.conversion import as_plain_lora, plain_strength
from sam3_lora.adapter.copies import cloned, copy_model, in_same_memory, without_weights
from sam3_lora.adapter.injection import INIT_FROM_WEIGHTS, garbage_left, try_on, wrap
from sam3_lora.adapter.layers import (
    PREFIX,
    Origin,
    adapter_tensors,
    config_of,
    fingerprint_of,
    inner_model,
    origin_of,
    refuse_adapted,
    remember_origin,
    share_identities,
    strengths_of,
)
from sam3_lora.adapter.wrapper import (
    check_name,
    check_unpadded,
    has_adapters,
    refuse_merged,
    remember_wrapper,
    remove_adapter,
    try_beside,
    wrapper_of,
)
from sam3_lora.attention import split_attention
from sam3_lora.errors import AdapterError, ConfigError, OutputError, as_report
from sam3_lora.fingerprint import changed_components
from sam3_lora.liveness import uncalled_modules
from sam3_lora.model_card import model_card
from sam3_lora.output import replaced_folder
from sam3_lora.plan import preset_of, refuse_outer_model
from sam3_lora.presets import number_problems
from sam3_lora.record import (
    RECORD_FILE,
    AdapterRecord,
    config_digest,
    file_digest,
    read_record,
    version_problems,
)

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
CARD_FILE = "README.md"
ADAPTER_FILES = (WEIGHTS_FILE, CONFIG_FILE, RECORD_FILE, CARD_FILE)

_PICKLES = ("*.pth", "*.pt", "*.bin", "*.ckpt")


@dataclass(frozen=True)
class SavedAdapter:
    """What an adapter folder holds; ``record`` is ``None`` where plain PEFT wrote it."""

    folder: Path
    config: LoraConfig
    tensors: Mapping[str, Tensor]
    record: AdapterRecord | None


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    prompts: Sequence[str] | None = None,
    training: Mapping[str, Any] | None = None,
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
    origin = _origin(inner, adapter_name, config, prompts, training)
    if origin.initial:
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


def load_adapter(
    model: nn.Module, folder: str | Path, adapter_name: str = "default", *, is_trainable: bool = False
) -> PeftModel:
    """Load a saved adapter into a model, in place, and return the ``PeftModel`` around it.

    Into a base it goes as the active adapter, and attention is split first if need be. Into a model that carries
    adapters it goes beside them under a name of its own, and which one is active stays as it was:
    :func:`~sam3_lora.set_adapter` switches.

    Every tensor of the file must have its place in the model and every place its tensor. Where the folder has a record,
    the files must be as they were saved, the base must have the weights that the adapter was trained on, and the
    versions must match. All of this is found out on a copy without weights, so that ``model`` is as it was if anything
    is raised.

    Args:
        model: The base that the adapter was trained on; with adapters, also the ``PeftModel`` around it.
        folder: A folder written by :func:`save_adapter` or by PEFT.
        adapter_name: The name it gets in the model; need not be the name it was saved under.
        is_trainable: Train it further; otherwise it is frozen and the model put in eval mode, as PEFT does.

    Raises:
        AdapterError: If files are missing, damaged or changed, tensors do not fit, base or versions are others, or it
            cannot stand beside the adapters that are there; lists all of it.
        TargetError: If the image model is only a part of ``model``.
    """
    inner = inner_model(model)
    refuse_outer_model([name for name, _ in inner.named_modules()])
    beside = wrapper_of(model) if has_adapters(model) else None
    check_name(inner, adapter_name)
    refuse_merged(inner, "load another")
    saved = read_adapter(folder)
    fingerprint = fingerprint_without_adapters(inner)
    saved.config.inference_mode = not is_trainable
    refuse_misfits(saved, model, adapter_name, fingerprint)

    adapted = _add(inner, beside, saved, adapter_name)
    if is_trainable:
        adapted.set_requires_grad(adapter_name)
    about = (saved.record.prompts, saved.record.training) if saved.record else ()
    remember_origin(adapted, adapter_name, Origin(fingerprint, *about))
    remember_wrapper(adapted)
    return adapted if is_trainable else adapted.eval()


def _add(inner: nn.Module, beside: PeftModel | None, saved: SavedAdapter, adapter_name: str) -> PeftModel:
    """Put an adapter that is known to fit into the model, alone or beside others, with the weights of its file."""
    config, recorded_base = saved.config, saved.config.base_model_name_or_path
    if beside is None:
        adapted = wrap(split_attention(inner), config, adapter_name)
        result: Any = set_peft_model_state_dict(adapted, dict(saved.tensors), adapter_name)
    else:
        adapted = beside
        try:
            with garbage_left():
                adapted.add_adapter(adapter_name, config)
            result = set_peft_model_state_dict(adapted, dict(saved.tensors), adapter_name)
        except BaseException:  # such as Ctrl-C, or memory that ran out
            remove_adapter(adapted, adapter_name)
            raise
    if result.unexpected_keys:
        raise AdapterError(
            f"PEFT left out tensors of {str(saved.folder)!r}: {as_report(result.unexpected_keys)}"
        )
    config.base_model_name_or_path = config.base_model_name_or_path or recorded_base
    share_identities(adapted, adapter_name)
    return adapted


def load_adapter_beside(model: nn.Module, folder: str | Path) -> PeftModel:
    """Load a saved adapter, frozen, into a copy of a base that shares the base's weights, and return the ``PeftModel``.

    ``model`` stays as it is, so that one base in memory serves itself and any number of adapters. Weights that an
    adapter replaces (``modules_to_save``) are its own; one that changes base weights in place (trained biases, PiSSA
    and its like) gets a full copy. Errors as in :func:`load_adapter`.
    """
    refuse_adapted(model)
    config = read_adapter(folder).config
    return load_adapter(copy_model(model, cloned if changes_base(config) else in_same_memory), folder)


def recorded_base(folder: str | Path) -> str:
    """Return the name of the base model that a saved adapter was made for.

    Raises:
        AdapterError: If files are missing or damaged, or the base was not recorded.
    """
    config = read_adapter(folder).config
    if not config.base_model_name_or_path:
        raise AdapterError(f"{str(folder)!r} does not say which base it was made for; name it with base=")
    return str(config.base_model_name_or_path)


def fingerprint_without_adapters(inner: nn.Module) -> Mapping[str, str]:
    """Return the fingerprint of the base inside a model, with or without adapters.

    Raises:
        AdapterError: If an adapter changed the base in place, so that it is not there any more.
    """
    for name, config in getattr(inner, "peft_config", {}).items():
        if reason := changes_base(config):
            raise AdapterError(
                f"adapter {name!r} of this model changes weights of the base in place ({reason}), so that nothing else fits "
                "on it; load each into a base of its own"
            )
    return fingerprint_of(inner)


def changes_base(config: LoraConfig) -> str:
    """Return the setting by which an adapter of this kind changes weights of the base in place, or ``""``."""
    if config.bias != "none":
        return f"bias={config.bias!r}"
    if str(config.init_lora_weights).startswith(INIT_FROM_WEIGHTS):
        return f"init_lora_weights={config.init_lora_weights!r}"
    return ""


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
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"{str(folder)!r} holds a {config.peft_type} adapter; only LoRA can be loaded")
    try:
        tensors: dict[str, Tensor] = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise AdapterError(f"{str(folder / WEIGHTS_FILE)!r} is damaged: {error}") from error
    if tensors and not any(name.startswith(PREFIX) for name in tensors):
        raise AdapterError(
            f"{str(folder / WEIGHTS_FILE)!r} has keys without PEFT's prefix {PREFIX!r}; PEFT would ignore them"
        )
    return SavedAdapter(folder, config, tensors, read_record(folder))


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


def refuse_misfits(
    saved: SavedAdapter, model: nn.Module, adapter_name: str, fingerprint: Mapping[str, str]
) -> nn.Module:
    """Return a copy of the model without weights that has the adapter.

    Raises:
        AdapterError: With everything that speaks against loading.
    """
    problems = [] if saved.record is None else _against_record(saved, saved.record, fingerprint)
    if has_adapters(model) and (reason := changes_base(saved.config)):
        problems.append(
            f"{reason} changes weights of the base in place, which the adapters that are there stand on; load it into a "
            "base of its own"
        )
    trial = inner_model(model)
    try:
        trial = _tried(model, saved.config, adapter_name)
        wanted = adapter_tensors(trial, adapter_name)
    except ConfigError as error:
        problems.append(str(error))
    else:
        strengths = strengths_of(trial, adapter_name)
        problems += [
            f"{name}: {reason}" for name, reason in uncalled_modules(inner_model(model), strengths).items()
        ]
        problems += number_problems({}, {name: s.lora_alpha for name, s in strengths.items()})
        problems += _tensor_problems(saved.tensors, wanted)
    if problems:
        raise AdapterError(f"{str(saved.folder)!r} does not fit this model: {as_report(problems)}")
    return trial


def _tried(model: nn.Module, config: LoraConfig, adapter_name: str) -> nn.Module:
    if has_adapters(model):
        return try_beside(wrapper_of(model), config, adapter_name)
    return inner_model(try_on(split_attention(without_weights(model)), config, adapter_name))


def _against_record(saved: SavedAdapter, record: AdapterRecord, fingerprint: Mapping[str, str]) -> list[str]:
    problems = version_problems(record)
    if record.weights_sha256 != file_digest(saved.folder / WEIGHTS_FILE):
        problems.append(
            f"{WEIGHTS_FILE}: not the file that was saved; copy it again, or delete {RECORD_FILE} if you changed it"
        )
    if record.config_sha256 != config_digest(saved.folder / CONFIG_FILE):
        problems.append(
            f"{CONFIG_FILE}: other settings than the adapter was saved with; copy it again, or delete {RECORD_FILE} if "
            "you changed it"
        )
    if changed := changed_components(record.base_fingerprint, fingerprint):
        problems.append(
            f"base: {', '.join(changed)} of this model is not as in {record.base or 'the base'!r}, which the adapter was "
            "trained on; load it into that one, and only once (PEFT's PeftModel.from_pretrained does not compare)"
        )
    return problems


def _tensor_problems(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    missing = [f"{name}: missing in the file" for name in wanted if name not in found]
    unexpected = [f"{name}: no place in the model" for name in found if name not in wanted]
    misshaped = [
        f"{name}: shape {tuple(tensor.shape)} in the file, {tuple(wanted[name].shape)} in the model"
        for name, tensor in found.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    not_numbers = [
        f"{name}: {'holds NaN or infinity' if tensor.is_floating_point() else f'is {tensor.dtype}'}"
        for name, tensor in found.items()
        if not (tensor.is_floating_point() and torch.isfinite(tensor).all())
    ]
    return missing + unexpected + misshaped + not_numbers


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
    config: LoraConfig,
    prompts: Sequence[str] | None,
    training: Mapping[str, Any] | None,
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
    )


def _record(
    inner: nn.Module, adapter_name: str, origin: Origin, tensors: Mapping[str, Tensor], folder: Path
) -> AdapterRecord:
    modules = strengths_of(inner, adapter_name)
    return AdapterRecord(
        base=config_of(inner, adapter_name).base_model_name_or_path,
        base_fingerprint=origin.base_fingerprint,
        preset=preset_of(modules, (name for name, _ in inner.named_modules())),
        modules=len(modules),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        config_sha256=config_digest(folder / CONFIG_FILE),
        weights_sha256=file_digest(folder / WEIGHTS_FILE),
        prompts=origin.prompts,
        training=origin.training,
    )


def _card(inner: nn.Module, adapter_name: str, config: LoraConfig, record: AdapterRecord) -> str:
    modules = strengths_of(inner, adapter_name)
    if config.r != config_of(inner, adapter_name).r:  # converted
        modules = {name: plain_strength(strength, config.use_rslora) for name, strength in modules.items()}
    return model_card(record.base, record.preset, modules, record.parameters)
