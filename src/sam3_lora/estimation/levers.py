"""Which levers were counted together, and the formula of each such set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sam3_lora.components import unknown_names
from sam3_lora.estimation.coefficients import Formula, counted_formulas

SAMPLED_POINTS = 12544  #: The one set beside the shipped levers that is worth an advice.


def counted_presets() -> list[str]:
    """Return the presets that can be estimated."""
    return [
        preset for preset, by_setting in counted_formulas()["formulas"].items() if "shipped" in by_setting
    ]


def lever_problems(preset: str, changed: Mapping[str, Any], levers: Mapping[str, Any]) -> list[str]:
    if problems := unknown_names("key of memory", changed, shipped_levers()):
        return problems
    if not counted_formulas()["formulas"].get(preset):
        return [
            f"preset {preset!r} was not counted; counted are {', '.join(counted_presets())} (benchmarks/count.py)"
        ]
    if formula_of(preset, levers) is None:
        return [
            f"these memory levers were not counted together for preset {preset!r}; counted are: "
            + "; ".join(_described(preset))
        ]
    return []


def _described(preset: str) -> list[str]:
    """Return each counted set of levers by what differs from the shipped one."""
    shipped = shipped_levers()
    texts = []
    for setting in counted_formulas()["formulas"][preset]:
        levers = counted_formulas()["levers"][setting]
        changes = [
            f"memory.{k}={v!r}".replace("None", "null")
            for k, v in levers.items()
            if not same_value(v, shipped[k])
        ]
        texts.append(", ".join(changes) or "as shipped")
    return texts


def formula_of(preset: str, levers: Mapping[str, Any]) -> Formula | None:
    counted = counted_formulas()
    by_setting: Mapping[str, Formula] = counted["formulas"].get(preset, {})
    return next((f for name, f in by_setting.items() if same_levers(counted["levers"][name], levers)), None)


def shipped_levers() -> dict[str, Any]:
    return dict(counted_formulas()["levers"]["shipped"])


def same_levers(some: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    return all(same_value(value, others[key]) for key, value in some.items())


def same_value(value: Any, other: Any) -> bool:
    """Whether two values of a lever are one; ``auto`` means yes on CUDA, which is what was counted."""
    value, other = (True if v == "auto" else v for v in (value, other))
    return type(value) is type(other) and bool(value == other)
