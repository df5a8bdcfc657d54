"""A weighted combination of adapters as a new adapter, over PEFT's ``add_weighted_adapter``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from torch import nn

from sam3_lora.adapter.files import changes_base
from sam3_lora.adapter.layers import (
    adapter_layers,
    inner_model,
    lora_config_of,
    note_strengths,
    strengths_of,
)
from sam3_lora.adapter.origin import Origin, origin_of, remember_origin
from sam3_lora.adapter.wrapper import (
    check_known,
    check_name,
    check_unpadded,
    refuse_merged,
    remove_adapter,
    wrapper_of,
)
from sam3_lora.errors import AdapterError, ConfigError, as_report, did_you_mean
from sam3_lora.plan import Strength

CombinationType = Literal["linear", "cat", "svd"]

# PEFT takes these from the first adapter as they are, and its arithmetic knows nothing of them.
_PLAIN = {"use_dora": False, "lora_bias": False, "use_rslora": False, "modules_to_save": None}


def combine_adapters(
    model: nn.Module,
    weights: Mapping[str, float],
    adapter_name: str,
    combination_type: CombinationType = "cat",
    *,
    svd_rank: int | None = None,
) -> None:
    """Add the weighted sum of adapters of a model as a new adapter, frozen and not active.

    With ``dW`` the change of a weight by an adapter, ``alpha / r * B @ A``:

    - ``"cat"`` is exactly ``sum(weight * dW)``. Its rank is the sum of theirs.
    - ``"svd"`` is the best approximation of it of rank ``svd_rank``, by default the highest of theirs; slow.
    - ``"linear"`` adds A and B each on their own, so that ``dW`` also gets products of one's B and the other's A. Rank
      and time as of one; all ranks must be the same.

    Args:
        model: A ``PeftModel``, or the model inside one.
        weights: Name of an adapter -> weight, of any size and sign.
        adapter_name: Name of the new one, which can be saved, scaled and switched to as any.
        combination_type: See above.
        svd_rank: Rank of the new adapter, for ``"svd"``.

    Raises:
        ConfigError: For an unknown combination type, weights that are not numbers, or a rank without ``"svd"``.
        AdapterError: If adapters do not exist or cannot be combined, or the name is taken; lists all reasons.
    """
    wrapper: Any = wrapper_of(model)
    inner = inner_model(model)
    _check_numbers(weights, combination_type, svd_rank)
    check_known(model, *weights)
    check_name(inner, adapter_name)
    refuse_merged(model, "combine")
    if problems := _problems(inner, weights, combination_type):
        raise AdapterError(f"{', '.join(map(repr, weights))} cannot be combined: {as_report(problems)}")

    names, factors = list(weights), [float(weight) for weight in weights.values()]
    try:
        wrapper.add_weighted_adapter(names, factors, adapter_name, combination_type, svd_rank=svd_rank)
        _settle(inner, adapter_name, names)
    except (ValueError, TypeError) as error:
        remove_adapter(wrapper, adapter_name)
        raise AdapterError(f"PEFT refuses to combine {', '.join(map(repr, weights))}: {error}") from error
    remember_origin(inner, adapter_name, _origin(inner, weights, combination_type))


def _check_numbers(weights: Mapping[str, float], combination_type: str, svd_rank: int | None) -> None:
    known = get_args(CombinationType)
    problems = [] if weights else ["no adapter; name at least one, such as {'cracks': 0.7, 'rust': 0.3}"]
    if combination_type not in known:
        hint = did_you_mean(str(combination_type), known)
        problems.append(f"combination_type {combination_type!r} is none of {', '.join(known)}{hint}")
    problems += [
        f"the weight of {name!r} must be a number, got {weight!r}"
        for name, weight in weights.items()
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight)
    ]
    if svd_rank is not None and (combination_type != "svd" or svd_rank < 1):
        problems.append(f"svd_rank is for 'svd', and 1 or more, got {svd_rank!r} with {combination_type!r}")
    if problems:
        raise ConfigError(as_report(problems))


def _problems(inner: nn.Module, names: Iterable[str], combination_type: str) -> list[str]:
    """Return why PEFT would combine these adapters wrongly, or not at all."""
    problems = []
    for name in names:
        config = lora_config_of(inner, name)
        check_unpadded(inner, name)
        problems += [
            f"{name!r} has {field}={getattr(config, field)!r}, which PEFT's arithmetic leaves out"
            for field, plain in _PLAIN.items()
            if (getattr(config, field) or plain) != plain
        ]
        if reason := changes_base(config):
            problems.append(f"{name!r} changes weights of the base in place ({reason})")
    if combination_type == "linear":
        problems += _rank_problems({name: strengths_of(inner, name) for name in names})
    return problems


def _rank_problems(strengths: Mapping[str, Mapping[str, Strength]]) -> list[str]:
    """Return the modules where ranks differ; PEFT only compares the highest of each adapter."""
    modules = dict.fromkeys(module for own in strengths.values() for module in own)
    ranks = {
        module: {name: own[module].r for name, own in strengths.items() if module in own}
        for module in modules
    }
    different = {module: found for module, found in ranks.items() if len(set(found.values())) > 1}
    if not different:
        return []
    module, found = next(iter(different.items()))
    shown = ", ".join(f"{r} in {name!r}" for name, r in found.items())
    return [
        f"'linear' needs the same r everywhere, and {len(different)} of {len(ranks)} modules differ, such as {module}: r is "
        f"{shown}; take 'cat' or 'svd'"
    ]


def _settle(inner: nn.Module, adapter_name: str, names: list[str]) -> None:
    """Check that the new adapter is on every module of the old, and give each the rank that it needs.

    PEFT notes one rank for all, the highest. Where others are needed, ``"cat"`` fills up with zeros, and what ``"linear"``
    makes would not load again once saved.
    """
    old = [strengths_of(inner, name) for name in names]
    layers = adapter_layers(inner, adapter_name)
    if layers.keys() != {module for own in old for module in own}:
        raise ValueError(f"the result is on {len(layers)} other modules than they are")
    strengths = {}
    for name, layer in layers.items():
        a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        r = min(len(a), sum(own[name].r for own in old if name in own))
        strengths[name] = Strength(r, r)
        a.data, b.data = a.data[:r].clone(), b.data[:, :r].clone()
        layer.r[adapter_name] = layer.lora_alpha[adapter_name] = r
        layer.set_scale(adapter_name, 1.0)
    config = lora_config_of(inner, adapter_name)
    note_strengths(config, strengths)
    config.inference_mode = True


def _origin(inner: nn.Module, weights: Mapping[str, float], combination_type: str) -> Origin:
    origins = [origin for name in weights if (origin := origin_of(inner, name)) is not None]
    prompts = dict.fromkeys(prompt for origin in origins for prompt in origin.prompts)
    made_of = {"combination_type": combination_type, "weights": dict(weights)}
    fingerprint = origins[0].base_fingerprint if origins else {}
    return Origin(fingerprint, tuple(prompts), {"combined": made_of})
