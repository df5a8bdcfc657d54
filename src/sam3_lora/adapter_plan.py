"""What an adapter would consist of, and the size of its file, counted on a model without weights."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from sam3_lora.adapter import count_parameters, get_peft_sam3, inner_model
from sam3_lora.adapter.layers import adapter_tensors, strengths_of
from sam3_lora.adapter.starting import without_data_start
from sam3_lora.base.checkpoint import DEFAULT, check_base
from sam3_lora.base.official import build_meta_sam3
from sam3_lora.base.tiny import build_tiny_sam3
from sam3_lora.components import (
    PATTERNS,
    SOMETIMES_IDLE,
    UNUSED_PARAMETERS,
    UNUSED_WITHOUT_MASKS,
    Component,
    Kind,
    component_of,
    why_excluded,
)
from sam3_lora.plan import Strength
from sam3_lora.presets import Preset

_SAFETENSORS_DTYPES = {8: "F64", 4: "F32", 2: "F16", 1: "U8"}  # only the length of the name counts here


class AdapterPart(NamedTuple):
    """Modules of one component and kind that are adapted with the same strength."""

    component: Component
    kind: Kind
    modules: int
    r: int
    lora_alpha: float
    trainable_parameters: int
    example: str  # full name of the first module


@dataclass(frozen=True)
class AdapterPlan:
    """What :func:`plan_adapter` counted.

    ``trainable_parameters`` is that of all parts, and of what is trained besides: whole modules
    (``modules_to_save``) and biases. ``total_parameters`` is base and adapter together.
    """

    base: str
    preset: str | None  # None for a preset of your own
    parts: tuple[AdapterPart, ...]
    modules: int
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int  # of adapter_model.safetensors
    dead_modules: Mapping[str, str]  # full name -> why it cannot be adapted
    find_unused_parameters: bool  # what DistributedDataParallel needs
    ddp_reason: str
    notes: tuple[str, ...]  # parts that have no gradient in some steps

    @property
    def share(self) -> float:
        """Return the trainable part of all parameters, 0 to 1."""
        return self.trainable_parameters / self.total_parameters

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, as ``sam3-lora plan --json`` prints it."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        ddp = {
            "find_unused_parameters": values.pop("find_unused_parameters"),
            "reason": values.pop("ddp_reason"),
        }
        return {
            **values,
            "share": self.share,
            "parts": [part._asdict() for part in self.parts],
            "components": _totals(self.parts),
            "dead_modules": dict(self.dead_modules),
            "notes": list(self.notes),
            "ddp": ddp,
        }


def plan_adapter(preset: str | Preset = "balanced", base: str = DEFAULT, **overrides: Any) -> AdapterPlan:
    """Return what :func:`sam3_lora.get_peft_sam3` would put on a base, without its weights and in a few seconds.

    The adapter is really made, on a model that has names and shapes only, so that the numbers are exact and
    what would be refused is refused here.

    Args:
        preset: As for :func:`sam3_lora.get_peft_sam3`.
        base: As for :func:`sam3_lora.load_base`. Nothing is downloaded, and a file is not read.
        **overrides: As for :func:`sam3_lora.get_peft_sam3`.

    Raises:
        ConfigError: For unknown presets and overrides, and values out of range; all at once.
        TargetError: If a requested module does not exist or is dead.
        CheckpointError: If there is no such base.
    """
    check_base(base)
    model = build_tiny_sam3() if base == "tiny" else build_meta_sam3()
    names = [name for name, _ in model.named_modules()]
    # Starts from data need the weights, and change no number here.
    overrides = without_data_start(overrides)
    adapted = get_peft_sam3(model, preset, **{**overrides, "adapter_name": "default"})
    inner = inner_model(adapted)
    trained = {name: p for name, p in inner.named_parameters() if p.requires_grad}
    unused = unused_parameters(inner)
    count = count_parameters(adapted)
    strengths = strengths_of(inner, "default")
    return AdapterPlan(
        base=base,
        preset=preset if isinstance(preset, str) else None,
        parts=_parts(strengths, trained),
        modules=len(strengths),
        trainable_parameters=count.trainable,
        total_parameters=count.total,
        adapter_bytes=safetensors_bytes(adapter_tensors(inner, "default")),
        dead_modules=MappingProxyType({name: reason for name in names if (reason := why_excluded(name))}),
        find_unused_parameters=bool(unused),
        ddp_reason=ddp_reason(unused),
        notes=tuple(text for pattern, text in SOMETIMES_IDLE.items() if _matches([pattern], *strengths)),
    )


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the size of the file that :func:`sam3_lora.save_adapter` would write of these tensors.

    A file is 8 bytes, a JSON header padded to a multiple of 8, and the numbers: larger dtypes first, then by
    name (https://github.com/huggingface/safetensors#format).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.element_size()],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + end


def _parts(strengths: Mapping[str, Strength], trained: Mapping[str, nn.Parameter]) -> tuple[AdapterPart, ...]:
    """Return the parts in the order of the component map."""
    sizes: Counter[str] = Counter()
    for name, parameter in trained.items():
        sizes[name.partition(".lora_")[0]] += parameter.numel()
    groups: dict[tuple[Component, Kind, Strength], list[str]] = {}
    for name, strength in strengths.items():
        if place := component_of(name):
            groups.setdefault((*place, strength), []).append(name)
    order = [(component, kind) for component, kinds in PATTERNS.items() for kind in kinds]
    return tuple(
        AdapterPart(component, kind, len(names), *strength, sum(sizes[name] for name in names), names[0])
        for (component, kind, strength), names in sorted(
            groups.items(), key=lambda item: order.index(item[0][:2])
        )
    )


def _totals(parts: Iterable[AdapterPart]) -> dict[str, dict[str, int]]:
    totals: dict[str, dict[str, int]] = {}
    for part in parts:
        total = totals.setdefault(part.component, {"modules": 0, "trainable_parameters": 0})
        total["modules"] += part.modules
        total["trainable_parameters"] += part.trainable_parameters
    return totals


def unused_parameters(model: nn.Module) -> list[str]:
    """Return the trained parameters of an adapted model that no step uses, by their official names."""
    patterns = list(UNUSED_PARAMETERS)
    if getattr(model, "segmentation_head", None) is None:
        patterns += UNUSED_WITHOUT_MASKS
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return [name for name in map(_official_name, trained) if _matches(patterns, name)]


def ddp_reason(unused: list[str]) -> str:
    """Return why DistributedDataParallel has to look for unused parameters, or need not."""
    if not unused:
        return "every trained tensor takes part in every step"
    more = f" and {len(unused) - 1} more" if unused[1:] else ""
    return f"no step uses {unused[0]}{more}"


def _official_name(parameter_name: str) -> str:
    """Return the name that a parameter of the base has without PEFT's wrappers."""
    return re.sub(r"\.(modules_to_save\.[^.]+|base_layer)(?=\.)", "", parameter_name)


def _matches(patterns: Iterable[str], *names: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns for name in names)
