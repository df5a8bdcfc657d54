"""Which modules an adapter wraps and how strongly: preset + overrides + names -> keywords of ``LoraConfig``.

Pure names and numbers. PEFT matches lists by suffix, skips unknown names in silence, and lets
``rank_pattern`` change the scaling; here every setting must have an effect, and the result is an anchored
pattern of full names.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sam3_lora.components import PATTERNS, Component, component_of, resolve_targets, why_excluded
from sam3_lora.errors import ConfigError, TargetError, as_report, did_you_mean
from sam3_lora.presets import ALPHA_PER_R, OVERRIDES, PRESETS, Preset, number_problems, override_preset

Targets = dict[Component, list[str]]  # component -> full names of modules

# Settings that choose modules or strengths: they go into the plan, everything else goes to PEFT as it is.
_RESOLVED = (
    *OVERRIDES,
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)
_TRUNK = "backbone.vision_backbone.trunk"  # in every SAM3 image model, and in no tracker
# sam3 calls these through activation_ckpt_wrapper, which cannot read the signature of PEFT's wrapper around
# them (act_ckpt_utils.py:72).
_NEVER_SAVED = r"segmentation_head|transformer\.decoder\.boxRPB_embed_[xy]|.*\.(layers|encode)\.\d+"


class Strength(NamedTuple):
    """The numbers of one adapted module; its weight changes by ``lora_alpha / r`` times B A."""

    r: int
    lora_alpha: float


@dataclass(frozen=True)
class Plan:
    """What an adapter must consist of, and the keywords of PEFT's ``LoraConfig`` that lead to it."""

    modules: Mapping[str, Strength]  # by full name, component by component
    lora_config: Mapping[str, Any]


def make_plan(
    module_names: Iterable[str], preset: Preset, overrides: Mapping[str, Any], lora_fields: Iterable[str]
) -> Plan:
    """Return the plan for a model with these modules.

    Args:
        module_names: Names of all modules of a model with split attention, as from ``named_modules()``.
        preset: Where to start.
        overrides: A user's keywords; those that are ``None`` count as not given.
        lora_fields: The fields of PEFT's ``LoraConfig``, all of which may be overridden.

    Raises:
        ConfigError: For unknown keywords and wrong values.
        TargetError: For settings that name nothing in this model, or modules that LoRA cannot act on.
    """
    names = list(module_names)
    _refuse_outer_model(names)
    given = {key: value for key, value in overrides.items() if value is not None}
    try:
        preset, targets = _choose(names, preset, given, lora_fields)
        return _with_strengths(_narrow(targets, names, given), preset, given)
    except re.error as error:
        raise ConfigError(f"{error.pattern!r} is not a regular expression: {error}") from error


def preset_of(modules: Mapping[str, Strength], module_names: Iterable[str]) -> str | None:
    """Return the name of the preset that gives exactly these modules and ranks in a model, or ``None``."""
    names = list(module_names)
    ranks = {name: strength.r for name, strength in modules.items()}
    for preset_name, preset in PRESETS.items():
        with contextlib.suppress(TargetError):  # a model without, say, its segmentation head
            targets = resolve_targets(names, preset.components, preset.kinds)
            if ranks == {name: preset.components[c] for c, found in targets.items() for name in found}:
                return preset_name
    return None


def _refuse_outer_model(names: list[str]) -> None:
    """Raise if the image model is only a part of the model, such as the detector of SAM3's video model."""
    inside = [name.removesuffix(f".{_TRUNK}") for name in names if name.endswith(f".{_TRUNK}")]
    if inside and _TRUNK not in names:
        raise TargetError(
            f"adapters go on the image model, which is only a part of this one; pass model.{inside[0]}"
        )


def _choose(
    names: list[str], preset: Preset, given: Mapping[str, Any], lora_fields: Iterable[str]
) -> tuple[Preset, Targets]:
    """Return the preset with its overrides, and its modules or those that ``target_modules`` names."""
    if "target_modules" not in given:
        preset = override_preset(preset, given, lora_fields)
        return preset, resolve_targets(names, preset.components, preset.kinds)
    if both := [key for key in ("components", "kinds") if key in given]:
        raise ConfigError(
            f"target_modules and {' and '.join(both)} both choose modules; give only one of them"
        )
    targets = _select(names, given["target_modules"])
    return override_preset(preset, {**given, "components": list(targets)}, lora_fields), targets


def _with_strengths(targets: Targets, preset: Preset, given: Mapping[str, Any]) -> Plan:
    """Complete the plan: r and alpha of a module come from a user's pattern or from its component."""
    user_r, user_alpha = _user_patterns(targets, given)
    r = {_component_pattern(c, names): preset.components[c] for c, names in targets.items()}
    alpha = {_component_pattern(c, names): preset.alpha_of(c) for c, names in targets.items()}
    modules = {
        name: Strength(_first_match(user_r | r, name), _first_match(user_alpha | alpha, name))
        for names in targets.values()
        for name in names
    }
    default_r, default_alpha = (
        _commonest(s.r for s in modules.values()),
        _commonest(s.lora_alpha for s in modules.values()),
    )
    lora_config = {key: value for key, value in given.items() if key not in _RESOLVED} | {
        "r": default_r,
        "lora_alpha": default_alpha,
        "target_modules": "|".join(re.escape(name) for name in modules),
        "rank_pattern": user_r | {p: v for p, v in r.items() if v != default_r},
        "alpha_pattern": user_alpha | {p: v for p, v in alpha.items() if v != default_alpha},
    }
    return Plan(modules, lora_config)


def _user_patterns(targets: Targets, given: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, float]]:
    """Return the user's ``rank_pattern`` and ``alpha_pattern``; an r without any alpha brings its own."""
    r, alpha = dict(given.get("rank_pattern", {})), dict(given.get("alpha_pattern", {}))
    problems = number_problems(
        {f"rank_pattern {key!r}": value for key, value in r.items()},
        {f"alpha_pattern {key!r}": value for key, value in alpha.items()},
    )
    if problems:
        raise ConfigError(as_report(problems))
    names = [name for component in targets.values() for name in component]
    idle = [
        f"{setting} {key!r} is the pattern of no adapted module; it must match a name to its end, after a dot"
        for setting, patterns in (("rank_pattern", r), ("alpha_pattern", alpha))
        for key in patterns
        if not any(_pattern_matches(key, name) for name in names)
    ]
    if idle:
        raise TargetError(as_report(idle))
    if "lora_alpha" not in given:
        alpha = {key: ALPHA_PER_R * value for key, value in r.items()} | alpha
    return r, alpha


def _narrow(targets: Targets, names: list[str], given: Mapping[str, Any]) -> Targets:
    """Apply ``exclude_modules``, ``layers_to_transform`` and ``modules_to_save``."""
    if "exclude_modules" in given:
        targets = _exclude(targets, given["exclude_modules"])
    if "layers_to_transform" in given:
        targets = _keep_layers(targets, given["layers_to_transform"], given.get("layers_pattern"))
    elif "layers_pattern" in given:
        raise ConfigError("layers_pattern has no effect without layers_to_transform")
    if "modules_to_save" in given:
        targets = _outside_saved(targets, names, list(given["modules_to_save"]))
    return targets


def _select(names: list[str], target_modules: str | Iterable[str]) -> Targets:
    """Return the modules of the component map that PEFT's ``target_modules`` names.

    Modules outside the map, such as those of the video tracker, never count.
    """
    places = {name: place for name in names if (place := component_of(name))}
    endings = sorted({name.rpartition(".")[2] for name in places})
    problems = []
    targets: Targets = {}
    for entry in _entries(target_modules):
        matched = [name for name in names if _entry_matches(entry, name, target_modules)]
        excluded = [f"{name} ({reason})" for name in matched if (reason := why_excluded(name))]
        if excluded:
            problems.append(f"target_modules {entry!r} would have no effect on {', '.join(excluded)}")
        elif not places.keys() & matched:
            close = did_you_mean(entry, [*endings, *places])
            problems.append(f"target_modules {entry!r} names no module that LoRA can adapt{close}")
    if problems:
        raise TargetError(as_report(problems))
    entries = _entries(target_modules)
    for name, (component, _) in places.items():
        if any(_entry_matches(entry, name, target_modules) for entry in entries):
            targets.setdefault(component, []).append(name)
    return targets


def _exclude(targets: Targets, exclude_modules: str | Iterable[str]) -> Targets:
    entries = _entries(exclude_modules)
    names = [name for component in targets.values() for name in component]
    idle = [e for e in entries if not any(_entry_matches(e, name, exclude_modules) for name in names)]
    if idle:
        raise TargetError(as_report([f"exclude_modules {entry!r} excludes nothing" for entry in idle]))
    return _keep(
        targets,
        "exclude_modules",
        lambda name: not any(_entry_matches(entry, name, exclude_modules) for entry in entries),
    )


def _keep_layers(
    targets: Targets, layers_to_transform: int | Iterable[int], layers_pattern: str | Iterable[str] | None
) -> Targets:
    """Keep the targets in the given layers, by PEFT's rule: the first number in a name is its layer."""
    layers = {layers_to_transform} if isinstance(layers_to_transform, int) else set(layers_to_transform)
    lists = "|".join(_entries(layers_pattern)) if layers_pattern else r"[^.]*"

    def in_layers(name: str) -> bool:
        found = re.match(rf"(?:^|.*?\.)(?:{lists})\.(\d+)\.", name)
        return found is not None and int(found[1]) in layers

    return _keep(targets, "layers_to_transform", in_layers)


def _outside_saved(targets: Targets, names: list[str], modules_to_save: list[str]) -> Targets:
    """Leave out the targets inside modules that are trained and saved whole."""
    saved = {entry: [name for name in names if f".{name}".endswith(f".{entry}")] for entry in modules_to_save}
    endings = {name.rpartition(".")[2] for name in names}
    problems = [
        f"modules_to_save {entry!r} names no module{did_you_mean(entry, endings)}"
        for entry, matched in saved.items()
        if not matched
    ]
    problems += [
        f"modules_to_save {entry!r} would wrap {name!r}, which sam3's activation checkpointing cannot call; "
        "name its children"
        for entry, matched in saved.items()
        for name in matched
        if re.fullmatch(_NEVER_SAVED, name)
    ]
    if problems:
        raise TargetError(as_report(problems))
    whole = [name for matched in saved.values() for name in matched]
    inside = tuple(f"{name}." for name in whole)
    return _keep(targets, "modules_to_save", lambda name: not f"{name}.".startswith(inside))


def _keep(targets: Targets, setting: str, wanted: Callable[[str], bool]) -> Targets:
    kept = {component: [name for name in names if wanted(name)] for component, names in targets.items()}
    if not any(kept.values()):
        raise TargetError(f"{setting} leaves no module to adapt")
    return {component: names for component, names in kept.items() if names}


def _entries(selection: str | Iterable[str]) -> list[str]:
    return [selection] if isinstance(selection, str) else list(selection)


def _entry_matches(entry: str, name: str, selection: str | Iterable[str]) -> bool:
    """Apply PEFT's rule: a lone string is a full-match pattern, one of a list a name or the end of it."""
    if isinstance(selection, str):
        return re.fullmatch(entry, name) is not None
    return name == entry or name.endswith(f".{entry}")


def _pattern_matches(key: str, name: str) -> bool:
    """Apply PEFT's rule for ``rank_pattern`` and ``alpha_pattern``."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _first_match(patterns: Mapping[str, Any], name: str) -> Any:
    return next(value for key, value in patterns.items() if _pattern_matches(key, name))


def _component_pattern(component: Component, names: list[str]) -> str:
    places = [place for name in names if (place := component_of(name))]
    kinds = dict.fromkeys(kind for _, kind in places)
    return "|".join(PATTERNS[component][kind] for kind in kinds)


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
