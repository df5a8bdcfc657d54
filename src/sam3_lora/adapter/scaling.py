"""How strongly an adapter acts in each component, at inference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sam3_lora.adapter.layers import adapter_layers, inner_model
from sam3_lora.adapter.several import active_adapters
from sam3_lora.adapter.wrapper import check_known, wrapper_of
from sam3_lora.components import COMPONENTS, Component, component_of
from sam3_lora.errors import AdapterError, ConfigError, as_report, did_you_mean


def scale_adapter(
    model: nn.Module, scales: float | Mapping[Component, float], adapter_name: str | None = None
) -> None:
    """Set how strongly an adapter acts: 1 is as trained, 0 not at all.

    It is always a factor of the trained strength, not of the last one, and 1 gives the same bits as before. It is not
    saved, and modules that were trained whole (``modules_to_save``) have no scale.

    Args:
        model: A ``PeftModel``, or the model inside one.
        scales: A factor for each component, such as ``{"text_encoder": 0.3}``, which leaves the others as they are; or
            one for the whole adapter.
        adapter_name: ``None`` for the active one.

    Raises:
        ConfigError: For components that do not exist or that the adapter is not on, and factors that are not finite
            numbers; all at once.
        AdapterError: If there is no such adapter, or it is merged into the weights.
    """
    wrapper_of(model)
    name = _only_active(model) if adapter_name is None else adapter_name
    check_known(model, name)
    layers: dict[Component, list[Any]] = {}
    for module, layer in adapter_layers(inner_model(model), name).items():
        if place := component_of(module):
            layers.setdefault(place[0], []).append(layer)
    factors = scales if isinstance(scales, Mapping) else dict.fromkeys(layers, scales)
    if problems := _problems(factors, layers, name):
        raise ConfigError(as_report(problems))
    for component, factor in factors.items():
        for layer in layers[component]:
            set_scaling(layer, name, factor)


def set_scaling(layer: Any, adapter_name: str, factor: float) -> None:
    """Set the factor of one layer, in place where hot swapping has made it a tensor."""
    before = layer.scaling[adapter_name]
    layer.set_scale(adapter_name, float(factor))
    if isinstance(before, torch.Tensor):
        before.fill_(layer.scaling[adapter_name])
        layer.scaling[adapter_name] = before


def _only_active(model: nn.Module) -> str:
    names = active_adapters(model)
    if len(names) != 1:
        raise AdapterError(f"name the adapter to scale with adapter_name=; active are {names or 'none'}")
    return names[0]


def _problems(factors: Mapping[Any, Any], present: Iterable[Component], adapter_name: str) -> list[str]:
    problems = []
    for component, factor in factors.items():
        if component not in COMPONENTS:
            hint = did_you_mean(str(component), COMPONENTS) or f"; they are {', '.join(COMPONENTS)}"
            problems.append(f"no component {component!r}{hint}")
        elif component not in present:
            problems.append(f"adapter {adapter_name!r} is not on {component}, only on {', '.join(present)}")
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor):
            problems.append(f"the scale of {component} must be a number, got {factor!r}")
    return problems
