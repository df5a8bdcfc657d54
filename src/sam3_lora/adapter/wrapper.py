"""From the image model back to the ``PeftModel`` around it, and through both to the layers that hold adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from sam3_lora.adapter.layers import (
    NO_WRAPPER,
    inner_model,
    known_wrapper,
    remember_wrapper,
)
from sam3_lora.adapter.origin import forget_origins
from sam3_lora.errors import AdapterError, did_you_mean

BASE = "base"  # stands for the model without adapters wherever an adapter is named


def has_adapters(model: nn.Module) -> bool:
    """Whether a model, or the one inside a ``PeftModel``, carries adapters."""
    return next(switchable_layers(inner_model(model)), None) is not None


def wrapper_of(model: nn.Module) -> PeftModel:
    """Return the ``PeftModel`` around a model that carries adapters, or the model itself if it is one.

    Raises:
        AdapterError: If the model has no adapter, or plain PEFT wrapped it and only the model inside was given.
    """
    if not has_adapters(model):
        raise AdapterError("this model has no adapter; add one with load_adapter or get_peft_sam3")
    wrapper = known_wrapper(model)
    if wrapper is None:
        raise AdapterError(NO_WRAPPER)
    remember_wrapper(wrapper)
    return wrapper


def switchable_layers(model: nn.Module) -> Iterator[Any]:
    """Yield every layer that holds adapters or whole modules of adapters.

    PEFT goes through ``modules()``, which also visits each adapter in each layer: with 50 adapters 67,000 modules
    instead of 3,000.
    """
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield module
        else:
            waiting.extend(child for child in module._modules.values() if child is not None)


def check_name(inner: nn.Module, adapter_name: str) -> None:
    """Do nothing if an adapter of this name can be added.

    Raises:
        AdapterError: If the name is taken, or no name for an adapter.
    """
    known = sorted(getattr(inner, "peft_config", {}))
    if adapter_name in known and has_adapters(inner):
        raise AdapterError(
            f"this model has an adapter {adapter_name!r} already; its adapters are {known}. Give the new one another name with "
            "adapter_name=, or put it in the place of that one with hotswap_adapter"
        )
    # PEFT takes every key with the name of another adapter between dots for one of its tensors (save_and_load.py:143).
    parts = {part for name, _ in inner.named_modules() for part in name.split(".")}
    if not adapter_name or adapter_name == BASE or "." in adapter_name or adapter_name in parts:
        raise AdapterError(
            f"{adapter_name!r} is no name for an adapter: it must not be {BASE!r}, which is the model without adapters, have "
            "a dot, or be a part of a module's name, such as 'decoder'"
        )


def check_known(model: nn.Module, *adapter_names: str) -> None:
    """Do nothing if the model has adapters of all these names.

    Raises:
        AdapterError: With the names that it has, and the closest one.
    """
    known = list(getattr(inner_model(model), "peft_config", {}))
    for name in adapter_names:
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise AdapterError(
                f"this model has no adapter {name!r}{hint or f'; it has {sorted(known) or None}'}"
            )


def refuse_merged(model: nn.Module, to_do: str) -> None:
    """Do nothing if no adapter is merged into the weights.

    Raises:
        AdapterError: If one is; says that it must be taken out before ``to_do``.
    """
    merged = sorted(
        {name for layer in switchable_layers(inner_model(model)) for name in layer.merged_adapters}
    )
    if merged:
        raise AdapterError(
            f"adapter {', '.join(map(repr, merged))} is merged into the weights; call unmerge_adapter() of the PeftModel "
            f"before you {to_do}"
        )


def check_unpadded(inner: nn.Module, adapter_name: str) -> None:
    """Do nothing if the tensors of an adapter have the ranks that its settings say.

    Raises:
        AdapterError: If they were padded for hot swapping, so that a file of them would not load.
    """
    for layer in switchable_layers(inner):
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
            continue
        padded: Any = layer.lora_A[adapter_name]
        if len(padded.weight) != layer.r[adapter_name]:
            raise AdapterError(
                f"adapter {adapter_name!r} was padded to a higher rank for hot swapping; copy the folder that it came from"
            )


def remove_adapter(wrapper: PeftModel, adapter_name: str) -> None:
    """Take out an inactive adapter, also one that came in half; layers that held no other go with it."""
    if adapter_name in wrapper.peft_config:
        wrapper.delete_adapter(adapter_name)
    inner = inner_model(wrapper)
    _take_out_empty_layers(inner)
    forget_origins(inner, [adapter_name])


def _take_out_empty_layers(inner: nn.Module) -> None:
    """Put the modules of the base back where no adapter is left around them."""
    for parent in list(inner.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, BaseTunerLayer) and not layer._get_available_adapters():
                setattr(parent, name, layer.get_base_layer())
            elif isinstance(layer, AuxiliaryTrainingWrapper) and not layer._adapters:
                setattr(parent, name, layer.original_module)
