"""Which modules an adapter wraps and how strongly: preset + overrides + names -> keywords of ``LoraConfig``.

Pure names and numbers. PEFT matches lists by suffix, skips unknown names in silence, and lets
``rank_pattern`` change the scaling; here every setting must have an effect, and the result is an anchored
pattern of full names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sam3_lora.components import PATTERNS, Component, component_of, resolve_targets
from sam3_lora.errors import ConfigError, TargetError, as_report
from sam3_lora.presets import (
    ALPHA_PER_R,
    OVERRIDES,
    PRESETS,
    Preset,
    number_problems,
    override_preset,
    override_problems,
)
from sam3_lora.targets import (
    LAST_BLOCKS,
    Targets,
    idle_entries,
    keep_last_vision_blocks,
    narrow_targets,
    saved_modules,
    select_targets,
    setting_problems,
    type_problems,
)
from sam3_lora.train_also import TRAIN_ALSO, layers_of, word_problems

SELECTING_OF_PEFT = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)
#: Settings that choose modules, whatever the method.
SELECTING = ("components", "kinds", LAST_BLOCKS, TRAIN_ALSO, *SELECTING_OF_PEFT)
# Settings that choose modules or strengths: they go into the plan, everything else goes to PEFT as it is.
_RESOLVED = (
    *OVERRIDES,
    *(setting for setting in SELECTING if setting != "modules_to_save"),
    "rank_pattern",
    "alpha_pattern",
)
_TRUNK = "backbone.vision_backbone.trunk"  # in every SAM3 image model, and in no tracker


class Strength(NamedTuple):
    """The numbers of one adapted module; its weight changes by ``lora_alpha / r`` times B A."""

    r: int
    lora_alpha: float


@dataclass(frozen=True)
class Plan:
    """What an adapter must consist of, and the keywords of PEFT's ``LoraConfig`` that lead to it."""

    modules: Mapping[str, Strength]  # by full name, component by component
    lora_config: Mapping[str, Any]
    saved: tuple[str, ...] = ()  # full names of the modules that are trained and saved whole


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
    refuse_outer_model(names)
    given = {key: value for key, value in overrides.items() if value is not None}
    with _patterns_read():
        _raise_problems(names, preset, given, (*lora_fields, LAST_BLOCKS, TRAIN_ALSO))
        preset, targets, given = _choose(names, preset, given)
        plan = _with_strengths(targets, preset, given)
        return dataclasses.replace(plan, saved=tuple(saved_modules(names, given)))


def select_modules(
    module_names: Iterable[str], preset: Preset, settings: Mapping[str, Any]
) -> tuple[list[str], tuple[str, ...]]:
    """Return the full names of the modules to adapt, and of those to train whole, for a method other than LoRA.

    Args:
        module_names: As for :func:`make_plan`.
        preset: Its components and kinds are adapted where the settings name none.
        settings: Some of :data:`SELECTING`; those that are ``None`` count as not given.

    Raises:
        ConfigError: For settings that are none of these, and wrong values.
        TargetError: As in :func:`make_plan`.
    """
    names = list(module_names)
    refuse_outer_model(names)
    given = {key: value for key, value in settings.items() if value is not None}
    if strays := [key for key in given if key not in SELECTING]:
        raise ConfigError(
            f"{', '.join(strays)}: not a setting that chooses modules ({', '.join(SELECTING)}); set it in the PeftConfig"
        )
    with _patterns_read():
        _raise_problems(names, preset, given, SELECTING)
        _, targets, given = _choose(names, preset, given)
        return [name for found in targets.values() for name in found], tuple(saved_modules(names, given))


def preset_of(modules: Mapping[str, Strength], module_names: Iterable[str]) -> str | None:
    """Return the name of the preset that gives exactly these modules and ranks in a model, or ``None``."""
    names = list(module_names)
    ranks = {name: strength.r for name, strength in modules.items()}
    for preset_name, preset in PRESETS.items():
        with contextlib.suppress(TargetError):  # a model without, say, its segmentation head
            targets = _preset_targets(names, preset)
            if ranks == {name: preset.components[c] for c, found in targets.items() for name in found}:
                return preset_name
    return None


def refuse_outer_model(names: Collection[str]) -> None:
    """Do nothing if these are the modules of an image model.

    Raises:
        TargetError: If it is only a part of the model, such as the detector of SAM3's video model.
    """
    inside = [name.removesuffix(f".{_TRUNK}") for name in names if name.endswith(f".{_TRUNK}")]
    if inside and _TRUNK not in names:
        raise TargetError(
            f"adapters go on the image model, which is only a part of this one; pass model.{inside[0]}"
        )


def _raise_problems(names: list[str], preset: Preset, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise one error about every setting that is wrong whatever the others are."""
    untyped = type_problems(given)
    given = {key: value for key, value in given.items() if key not in untyped}
    overrides = dict(given)
    if "target_modules" in given:
        overrides["components"] = list(select_targets(names, given["target_modules"]) or preset.components)
    adaptable = [name for name in names if component_of(name)]
    wrong = [
        *untyped.values(),
        *override_problems(preset, overrides, known),
        *_pattern_number_problems(given),
        *setting_problems(names, given),
        *(word_problems(given[TRAIN_ALSO]) if TRAIN_ALSO in given else ()),
    ]
    idle = idle_entries(names, given) + _idle_patterns(adaptable, given)
    if wrong or idle:
        raise (ConfigError if wrong else TargetError)(as_report(wrong + idle))


@contextlib.contextmanager
def _patterns_read() -> Iterator[None]:
    try:
        yield
    except re.error as error:
        raise ConfigError(f"{error.pattern!r} is not a regular expression: {error}") from error


def _choose(
    names: list[str], preset: Preset, given: dict[str, Any]
) -> tuple[Preset, Targets, dict[str, Any]]:
    """Return the preset with its overrides, its modules or those that ``target_modules`` names, and the settings with
    the layers of ``train_also`` among ``modules_to_save``."""
    ours = {key: value for key, value in given.items() if key in OVERRIDES}
    if "target_modules" in given:
        targets = select_targets(names, given["target_modules"])
        preset = override_preset(preset, {**ours, "components": list(targets)})
    else:
        preset = override_preset(_own_blocks(preset, given), ours)
        targets = _preset_targets(names, preset)
    given = _with_whole_layers(names, targets, given)
    return preset, narrow_targets(targets, names, given), given


def _with_whole_layers(names: list[str], targets: Targets, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the layers of ``train_also`` among ``modules_to_save``."""
    if TRAIN_ALSO not in given:
        return given
    layers = layers_of(given[TRAIN_ALSO], names, targets)
    return {**given, "modules_to_save": [*given.get("modules_to_save", ()), *layers]}


def _own_blocks(preset: Preset, given: Mapping[str, Any]) -> Preset:
    """Return the preset without its ``last_n_vision_blocks`` where a user's setting takes the place of it."""
    components = given.get("components", preset.components)
    if "vision_encoder" in components and not {LAST_BLOCKS, "layers_to_transform"} & given.keys():
        return preset
    return dataclasses.replace(preset, last_n_vision_blocks=None)


def _preset_targets(names: list[str], preset: Preset) -> Targets:
    targets = resolve_targets(names, preset.components, preset.kinds)
    if preset.last_n_vision_blocks is None:
        return targets
    return keep_last_vision_blocks(targets, names, preset.last_n_vision_blocks)


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
    idle = _idle_patterns([name for names in targets.values() for name in names], given)
    if idle:
        raise TargetError(as_report(idle))
    r, alpha = dict(given.get("rank_pattern", {})), dict(given.get("alpha_pattern", {}))
    if "lora_alpha" not in given:
        alpha = {key: ALPHA_PER_R * value for key, value in r.items()} | alpha
    return r, alpha


def _pattern_number_problems(given: Mapping[str, Any]) -> list[str]:
    return number_problems(
        {f"rank_pattern {key!r}": value for key, value in given.get("rank_pattern", {}).items()},
        {f"alpha_pattern {key!r}": value for key, value in given.get("alpha_pattern", {}).items()},
    )


def _idle_patterns(names: list[str], given: Mapping[str, Any]) -> list[str]:
    return [
        f"{setting} {key!r} is the pattern of no adapted module; it must match a name to its end, after a dot"
        for setting in ("rank_pattern", "alpha_pattern")
        for key in given.get(setting, ())
        if not any(_pattern_matches(key, name) for name in names)
    ]


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
