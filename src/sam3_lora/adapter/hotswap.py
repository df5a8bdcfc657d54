"""Other weights for an adapter in the tensors that it has, so that compiled code stays valid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import Tensor, nn

from sam3_lora.adapter.files import read_adapter
from sam3_lora.adapter.layers import (
    PREFIX,
    adapter_layers,
    adapter_parameters,
    inner_model,
    lora_config_of,
)
from sam3_lora.adapter.loading import fingerprint_without_adapters, refuse_misfits
from sam3_lora.adapter.origin import recorded_origin, remember_origin
from sam3_lora.adapter.scaling import set_scaling
from sam3_lora.adapter.several import adapter_names
from sam3_lora.adapter.wrapper import check_known, refuse_merged, wrapper_of
from sam3_lora.errors import AdapterError, as_report

# What changes the layers themselves, and so the code that was compiled from them.
_SAME = ("use_dora", "lora_bias", "lora_dropout", "modules_to_save", "bias")


def prepare_hotswap(model: nn.Module, r: int) -> None:
    """Pad all adapters of a model to rank ``r`` and make their scalings tensors, for swaps between ranks and alphas.

    Call it before ``torch.compile``; adapters with the same ranks and scalings do not need it. The padding is zeros: the
    outputs change by rounding only. A padded adapter cannot be saved.

    Args:
        model: A ``PeftModel``, or the model inside one.
        r: The highest rank of all adapters that will be swapped in.

    Raises:
        AdapterError: If the model has no adapter, or one with a higher rank.
    """
    wrapper_of(model)
    inner = inner_model(model)
    refuse_merged(model, "prepare it")
    ranks = {
        name: max(layer.r[name] for layer in adapter_layers(inner, name).values())
        for name in adapter_names(model)
    }
    if higher := {name: found for name, found in ranks.items() if found > r}:
        raise AdapterError(f"r={r!r} is below the rank of adapters that are there: {higher}")
    prepare_model_for_compiled_hotswap(inner, target_rank=r)


def hotswap_adapter(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> None:
    """Replace the weights of an adapter by those of a saved one, in place and under the name that it has.

    Tensors stay where they are, so compiled code stays valid. The checks are those of :func:`~sam3_lora.load_adapter`,
    and if anything is raised, all is as it was. Both adapters must be on the same modules.

    Args:
        model: A ``PeftModel``, or the model inside one.
        folder: A folder written by :func:`~sam3_lora.save_adapter` or by PEFT.
        adapter_name: The adapter whose weights are replaced.

    Raises:
        AdapterError: If the saved adapter does not fit the model, or the place of the other; lists all of it.
    """
    wrapper_of(model)
    inner = inner_model(model)
    check_known(model, adapter_name)
    refuse_merged(model, "swap it")
    there = lora_config_of(inner, adapter_name)
    saved, fingerprint = read_adapter(folder), fingerprint_without_adapters(inner)
    saved.config.inference_mode = True
    trial_name = _free_name(model)
    trial = adapter_layers(refuse_misfits(saved, model, trial_name, fingerprint), trial_name)
    layers = adapter_layers(inner, adapter_name)
    problems = _config_problems(there, saved.config)
    problems += _place_problems(layers, trial, adapter_name, trial_name)
    if problems:
        raise AdapterError(
            f"{str(folder)!r} cannot take the place of {adapter_name!r}; load_adapter adds it beside: {as_report(problems)}"
        )
    for name, layer in layers.items():
        _fill(name, layer, adapter_name, saved.tensors)
        layer.r[adapter_name] = trial[name].r[trial_name]
        layer.lora_alpha[adapter_name] = trial[name].lora_alpha[trial_name]
        layer.use_rslora[adapter_name] = trial[name].use_rslora[trial_name]
        set_scaling(layer, adapter_name, 1.0)
    wrapper_of(model).peft_config[adapter_name] = saved.config
    remember_origin(inner, adapter_name, recorded_origin(saved.record, fingerprint))


def _free_name(model: nn.Module) -> str:
    return "_".join(["swapped_in", *adapter_names(model)])


def _config_problems(there: PeftConfig, new: PeftConfig) -> list[str]:
    return [
        f"{field} is {getattr(there, field)!r} there and {getattr(new, field)!r} in the file"
        for field in _SAME
        if (getattr(there, field) or None) != (getattr(new, field) or None)
    ] + [
        f"{field}={getattr(new, field)!r}: only plain LoRA can be swapped"
        for field in ("use_dora", "lora_bias", "modules_to_save")
        if getattr(new, field)
    ]


def _place_problems(
    layers: Mapping[str, Any], trial: Mapping[str, Any], adapter_name: str, trial_name: str
) -> list[str]:
    problems = [
        f"{len(names)} modules are only in {place}, such as {names[0]}"
        for place, names in (
            ("the file", [name for name in trial if name not in layers]),
            ("the model", [name for name in layers if name not in trial]),
        )
        if names
    ]
    for name in trial.keys() & layers.keys():
        r, room = trial[name].r[trial_name], len(layers[name].lora_A[adapter_name].weight)
        if r > room:
            problems.append(f"{name}: r is {r}, and there is room for {room}; see prepare_hotswap")
    return problems


def _fill(name: str, layer: Any, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    # Not peft.utils.hotswap: it would zero every other adapter whose name contains this one's, and looks for r and alpha of
    # a module under the names of its tensors, where no pattern matches (hotswap.py, peft 0.21.2).
    with torch.no_grad():
        for own, parameter in adapter_parameters(layer, adapter_name).items():
            new = tensors[f"{PREFIX}{name}.{own.replace(f'.{adapter_name}.', '.')}"]
            parameter.zero_()
            parameter[tuple(slice(size) for size in new.shape)] = new.to(parameter)
