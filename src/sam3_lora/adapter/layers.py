"""What is in an adapted model: its base, its adapted modules, their strengths and tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from sam3_lora.errors import AdapterError
from sam3_lora.fingerprint import base_fingerprint
from sam3_lora.plan import Strength

PEFT_PREFIX = "base_model."  # of every key in PEFT's file format
PREFIX = PEFT_PREFIX + "model."  # of those that belong to a module

NO_WRAPPER = "PEFT wrapped this model without sam3-lora; pass the PeftModel instead of the model inside"

_BASE_CHILDREN = ("base_layer.", "original_module.")
_FINGERPRINT = "_sam3_lora_fingerprint"
_WRAPPER = "_sam3_lora_wrapper"


class ParameterCount(NamedTuple):
    """How many numbers a model holds. ``total`` counts the base and its adapters, as PEFT does."""

    trainable: int
    total: int


def inner_model(model: nn.Module) -> nn.Module:
    """Return the ``Sam3Image`` of a ``PeftModel``, or the model itself.

    Attributes set on a ``PeftModel``, and its ``.to()``, do not reach what the inner model remembers.
    """
    if not isinstance(model, PeftModel):
        return model
    inner: nn.Module = model.get_base_model()
    return inner


def remember_wrapper(wrapper: PeftModel) -> None:
    """Let the model inside know the ``PeftModel`` around it, so that either stands for both."""
    # In a tuple, or torch would take it for a child.
    setattr(inner_model(wrapper), _WRAPPER, (wrapper,))


def forget_wrapper(inner: nn.Module) -> None:
    """Undo :func:`remember_wrapper`."""
    inner.__dict__.pop(_WRAPPER, None)


def known_wrapper(model: nn.Module) -> PeftModel | None:
    """Return the ``PeftModel`` around a model, or the model itself if it is one; ``None`` where it is not known."""
    if isinstance(model, PeftModel):
        return model
    (wrapper,) = getattr(model, _WRAPPER, (None,))
    return wrapper if isinstance(wrapper, PeftModel) and wrapper.get_base_model() is model else None


def adapted_modules(model: nn.Module) -> list[str]:
    """Return the official names of the modules that carry an adapter, in the order of the model.

    Args:
        model: A ``PeftModel``, or the model inside one; a model without adapters gives an empty list.
    """
    return [name for name, module in inner_model(model).named_modules() if isinstance(module, BaseTunerLayer)]


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the trainable and all parameters of a model, each shared parameter once."""
    parameters = list(model.parameters())
    return ParameterCount(
        sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
    )


def modules_with(inner: nn.Module, adapter_name: str) -> list[str]:
    """Return the official names of the modules that an adapter of any method wraps."""
    return [
        name
        for name, module in inner.named_modules()
        if isinstance(module, BaseTunerLayer) and adapter_name in module._get_available_adapters()
    ]


def strengths_of(inner: nn.Module, adapter_name: str) -> dict[str, Strength]:
    """Return r and alpha of every module that a LoRA adapter wraps, by official name; of another method, nothing."""
    return {
        name: Strength(module.r[adapter_name], module.lora_alpha[adapter_name])
        for name, module in inner.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }


def note_strengths(config: LoraConfig, strengths: Mapping[str, Strength]) -> None:
    """Let the settings of an adapter say of each module what it has, in names that match no other."""
    ((common, _),) = Counter(strengths.values()).most_common(1)
    config.r, config.lora_alpha = common.r, common.lora_alpha  # type: ignore[assignment]  # PEFT takes floats
    config.rank_pattern = {re.escape(n): s.r for n, s in strengths.items() if s.r != common.r}
    config.alpha_pattern = {
        re.escape(n): s.lora_alpha for n, s in strengths.items() if s.lora_alpha != common.lora_alpha
    }
    config.target_modules = "|".join(map(re.escape, strengths))


def adapter_layers(inner: nn.Module, adapter_name: str) -> dict[str, Any]:
    """Return the LoRA layers that hold an adapter, by the official name of the module that they wrap.

    Raises:
        AdapterError: If there is no such adapter, it is not LoRA, or it is merged into the base.
    """
    lora_config_of(inner, adapter_name)
    layers: dict[str, Any] = {
        n: m for n, m in inner.named_modules() if isinstance(m, LoraLayer) and adapter_name in m.r
    }
    _refuse_none_or_merged(layers, adapter_name)
    return layers


def trained_layers(inner: nn.Module, adapter_name: str) -> dict[str, Any]:
    """Return the layers that an adapter of any method wraps or trains whole, by the official name of the module.

    Raises:
        AdapterError: If there is no such adapter, or it is merged into the base.
    """
    config_of(inner, adapter_name)
    layers: dict[str, Any] = {
        name: module
        for name, module in inner.named_modules()
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper))
        and adapter_name in module._get_available_adapters()
    }
    _refuse_none_or_merged(layers, adapter_name)
    return layers


def _refuse_none_or_merged(layers: Mapping[str, Any], adapter_name: str) -> None:
    if not layers:
        raise AdapterError(f"adapter {adapter_name!r} has no layer")
    if merged := [name for name, layer in layers.items() if layer.merged_adapters]:
        raise AdapterError(
            f"adapter {adapter_name!r} is merged into the base, in {len(merged)} of {len(layers)} modules; "
            "call unmerge_adapter() of its PeftModel first"
        )


def share_identities(model: nn.Module, adapter_name: str) -> None:
    """Let all layers use one module for "no dropout": one each would be a thirtieth of a large adapter's memory."""
    shared: nn.Module | None = None
    for layer in inner_model(model).modules():
        dropout: Any = getattr(layer, "lora_dropout", None)
        if (
            isinstance(layer, LoraLayer)
            and adapter_name in dropout
            and type(dropout[adapter_name]) is nn.Identity
        ):
            shared = shared or dropout[adapter_name]
            dropout[adapter_name] = shared


def adapter_parameters(layer: Any, adapter_name: str) -> dict[str, nn.Parameter]:
    """Return the tensors of an adapter in one layer by their names in it, such as ``lora_A.default.weight``."""
    whole = isinstance(layer, ModulesToSaveWrapper)
    containers = ("modules_to_save",) if whole else layer.adapter_layer_names
    inside = tuple(f"{container}.{adapter_name}." for container in containers)
    return {n: p for n, p in layer.named_parameters() if f"{n}.".startswith(inside)}


def set_weight_change(layer: Any, adapter_name: str, size: float, generator: torch.Generator) -> None:
    """Give ``lora_B`` random values, so that the weight changes by ``size`` times its own norm (1, if it is zero).

    Where the method is not LoRA, or the layer is trained whole, each tensor of the adapter changes by ``size`` times its
    own size.
    """
    is_lora: bool = isinstance(layer, LoraLayer)
    if not is_lora:
        _change_tensors(adapter_parameters(layer, adapter_name).values(), size, generator)
        return
    b: nn.Parameter = layer.lora_B[adapter_name].weight
    with torch.no_grad():
        b.copy_(torch.randn(b.shape, generator=generator))
        weight: Tensor = layer.get_base_layer().weight
        norm = weight.detach().float().norm() if weight.is_floating_point() else torch.ones(())
        change = layer.get_delta_weight(adapter_name).float().norm()
        b.mul_((size * (norm if norm > 0 else torch.ones_like(norm)) / change).to(b.dtype))


def _change_tensors(tensors: Iterable[nn.Parameter], size: float, generator: torch.Generator) -> None:
    with torch.no_grad():
        for tensor in tensors:
            unit = tensor.float().square().mean().sqrt().item() or 1.0
            tensor.add_((size * unit * torch.randn(tensor.shape, generator=generator)).to(tensor))


def base_parameters(inner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of the base inside an adapted model under the names that they have without adapters."""
    wrapped = {
        n: m for n, m in inner.named_modules() if isinstance(m, (BaseTunerLayer, ModulesToSaveWrapper))
    }
    for name, parameter in inner.named_parameters():
        owner = next((w for w in wrapped if name.startswith(f"{w}.")), None)
        if owner is None:
            yield name, parameter
        elif (own := name.removeprefix(f"{owner}.")).startswith(_BASE_CHILDREN):
            yield f"{owner}.{own.partition('.')[2]}", parameter


def remember_fingerprint(model: nn.Module, fingerprint: Mapping[str, str]) -> None:
    """Keep the fingerprint of a base whose weights are about to change their form."""
    setattr(inner_model(model), _FINGERPRINT, dict(fingerprint))


def fingerprint_of(model: nn.Module) -> Mapping[str, str]:
    """Return the fingerprint of a base, with or without adapters: the one that it remembers, or that of its weights."""
    inner = inner_model(model)
    remembered: Mapping[str, str] | None = getattr(inner, _FINGERPRINT, None)
    return base_fingerprint(base_parameters(inner)) if remembered is None else remembered


def saved_modules(inner: nn.Module) -> list[str]:
    """Return the official names of the modules that are trained and saved whole."""
    return [name for name, module in inner.named_modules() if isinstance(module, ModulesToSaveWrapper)]


def config_of(inner: nn.Module, adapter_name: str) -> PeftConfig:
    configs: Mapping[str, PeftConfig] = getattr(inner, "peft_config", {})
    if adapter_name not in configs:
        raise AdapterError(f"this model has no adapter {adapter_name!r}; it has {sorted(configs) or 'none'}")
    return configs[adapter_name]


def lora_config_of(inner: nn.Module, adapter_name: str) -> LoraConfig:
    """Return the settings of a LoRA adapter.

    Raises:
        AdapterError: If there is no such adapter, or it is of another method, whose arithmetic is another.
    """
    config = config_of(inner, adapter_name)
    if not isinstance(config, LoraConfig):
        raise AdapterError(
            f"adapter {adapter_name!r} is {method_of(config)}; only LoRA can be scaled, combined or swapped in place"
        )
    return config


def method_of(config: PeftConfig) -> str:
    """Return PEFT's name of a method, such as ``LORA``, from its settings."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return the adapter's tensors under the keys of PEFT's file format.

    Raises:
        AdapterError: If the method keeps tensors beside the model, and only the model inside is known.
    """
    config = config_of(inner_model(model), adapter_name)
    # Tensors that all layers of a VeRA or VB-LoRA share belong to the PeftModel.
    outer = inner_model(model) if isinstance(config, LoraConfig) else known_wrapper(model)
    if outer is None:
        raise AdapterError(NO_WRAPPER)
    # "auto" would ask the Hub whether the base model's embeddings have been resized.
    tensors = get_peft_model_state_dict(outer, adapter_name=adapter_name, save_embedding_layers=False)
    return {(name if isinstance(outer, PeftModel) else PREFIX + name): t for name, t in tensors.items()}


def refuse_adapted(model: nn.Module) -> None:
    """Do nothing if the model carries no adapter.

    Raises:
        AdapterError: If it does; says how to take it out, which for a merged one needs one step more.
    """
    layers = [m for m in inner_model(model).modules() if isinstance(m, BaseTunerLayer)]
    if not layers and not isinstance(model, PeftModel):
        return
    merged = any(layer.merged for layer in layers)
    first = "unmerge_adapter() and then " if merged else ""
    raise AdapterError(
        f"this model has an adapter already, on {len(layers)} modules{', merged into their weights' if merged else ''}; "
        f"start from a fresh base, or take it out with {first}unload() of its PeftModel"
    )
