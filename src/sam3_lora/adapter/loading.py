"""Adapter folders, loaded strictly: all that speaks against it is found before the model is touched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from torch import Tensor, nn

from sam3_lora.adapter.copies import cloned, copy_model, in_same_memory
from sam3_lora.adapter.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    SavedAdapter,
    changes_base,
    read_adapter,
)
from sam3_lora.adapter.layers import (
    adapter_tensors,
    fingerprint_of,
    inner_model,
    modules_with,
    refuse_adapted,
    remember_wrapper,
    share_identities,
    strengths_of,
)
from sam3_lora.adapter.origin import recorded_origin, remember_origin
from sam3_lora.adapter.wrapper import (
    check_name,
    has_adapters,
    refuse_merged,
    remove_adapter,
    wrapper_of,
)
from sam3_lora.adapter.wrapping import garbage_left, trial_copy, try_beside, try_on, wrap
from sam3_lora.attention import split_attention
from sam3_lora.errors import AdapterError, ConfigError, as_report
from sam3_lora.fingerprint import changed_components
from sam3_lora.liveness import uncalled_modules
from sam3_lora.plan import refuse_outer_model
from sam3_lora.presets import number_problems
from sam3_lora.record import RECORD_FILE, AdapterRecord, config_digest, file_digest, version_problems


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
    remember_origin(adapted, adapter_name, recorded_origin(saved.record, fingerprint))
    remember_wrapper(adapted)
    return adapted if is_trainable else adapted.eval()


def load_adapter_beside(model: nn.Module, folder: str | Path) -> PeftModel:
    """Load a saved adapter, frozen, into a copy of a base that shares the base's weights, and return the ``PeftModel``.

    ``model`` stays as it is, so that one base in memory serves itself and any number of adapters. Weights that an
    adapter replaces (``modules_to_save``) are its own; one that changes base weights in place (trained biases, PiSSA
    and its like) gets a full copy. Errors as in :func:`load_adapter`.
    """
    refuse_adapted(model)
    config = read_adapter(folder).config
    return load_adapter(copy_model(model, cloned if changes_base(config) else in_same_memory), folder)


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
    trial = model
    try:
        trial = _tried(model, saved.config, adapter_name)
        wanted = adapter_tensors(trial, adapter_name)
    except ConfigError as error:
        problems.append(str(error))
    else:
        inner = inner_model(trial)
        uncalled = uncalled_modules(inner_model(model), modules_with(inner, adapter_name))
        problems += [f"{name}: {reason}" for name, reason in uncalled.items()]
        strengths = strengths_of(inner, adapter_name)
        problems += number_problems({}, {name: s.lora_alpha for name, s in strengths.items()})
        problems += _tensor_problems(saved.tensors, wanted)
    if problems:
        raise AdapterError(f"{str(saved.folder)!r} does not fit this model: {as_report(problems)}")
    return inner_model(trial)


def _tried(model: nn.Module, config: PeftConfig, adapter_name: str) -> PeftModel:
    if has_adapters(model):
        return try_beside(wrapper_of(model), config, adapter_name)
    return try_on(split_attention(trial_copy(model, config)), config, adapter_name)


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


def _is_alike(found: Tensor, wanted: Tensor | None) -> bool:
    """Whether a tensor is a float or, as the indices of sparse methods, of the very type that is wanted."""
    return found.is_floating_point() or (wanted is not None and found.dtype == wanted.dtype)


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
        if not (_is_alike(tensor, wanted.get(name)) and torch.isfinite(tensor).all())
    ]
    return missing + unexpected + misshaped + not_numbers
