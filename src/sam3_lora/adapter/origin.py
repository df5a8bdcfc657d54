"""What an adapted model remembers of where its adapters came from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sam3_lora.adapter.layers import inner_model
from sam3_lora.record import AdapterRecord

_ORIGINS = "_sam3_lora_origins"


@dataclass(frozen=True)
class Origin:
    """What an adapted model remembers of one adapter: the base before it, what it was trained on, its tensors at the start,
    if that changed the base, and the thresholds of its prompts."""

    base_fingerprint: Mapping[str, str]
    prompts: Sequence[str] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    initial: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    thresholds: Mapping[str, float] = field(default_factory=dict)


def recorded_origin(record: AdapterRecord | None, base_fingerprint: Mapping[str, str]) -> Origin:
    """Return the origin of an adapter that was loaded on a base, with what its folder recorded, if it did."""
    if record is None:
        return Origin(base_fingerprint)
    return Origin(base_fingerprint, record.prompts, record.training, thresholds=record.thresholds)


def remember_origin(model: nn.Module, adapter_name: str, origin: Origin) -> None:
    inner = inner_model(model)
    setattr(inner, _ORIGINS, {**getattr(inner, _ORIGINS, {}), adapter_name: origin})


def forget_origins(inner: nn.Module, adapter_names: Collection[str]) -> None:
    kept = {name: o for name, o in getattr(inner, _ORIGINS, {}).items() if name not in adapter_names}
    setattr(inner, _ORIGINS, kept)


def origin_of(inner: nn.Module, adapter_name: str) -> Origin | None:
    origins: Mapping[str, Origin] = getattr(inner, _ORIGINS, {})
    return origins.get(adapter_name)


def thresholds_of(model: nn.Module, adapter_name: str) -> Mapping[str, float]:
    """Return the thresholds of an adapter by prompt, as its folder had them."""
    origin = origin_of(inner_model(model), adapter_name)
    return {} if origin is None else origin.thresholds


def prompts_by_class(model: nn.Module, adapter_name: str) -> Mapping[str, str]:
    """Return the prompts that an adapter was trained with for classes by other names, by class."""
    origin = origin_of(inner_model(model), adapter_name)
    given: Mapping[str, str] | None = None if origin is None else origin.training.get("prompt_of")
    return given or {}
