"""The settings that choose modules by name: PEFT's own, and ``last_n_vision_blocks``. Pure names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sam3_lora.components import Component, component_of, why_excluded
from sam3_lora.errors import TargetError, as_report, did_you_mean

Targets = dict[Component, list[str]]  # component -> full names of modules

LAST_BLOCKS = "last_n_vision_blocks"

_VISION_BLOCK = re.compile(r"backbone\.vision_backbone\.trunk\.blocks\.(\d+)\.")
# sam3 calls these through activation_ckpt_wrapper, which cannot read the signature of PEFT's wrapper around
# them (act_ckpt_utils.py:72).
_NEVER_SAVED = r"segmentation_head|transformer\.decoder\.boxRPB_embed_[xy]|.*\.(layers|encode)\.\d+"


def select_targets(names: Iterable[str], target_modules: str | Iterable[str]) -> Targets:
    """Return the modules of the component map that PEFT's ``target_modules`` names.

    Modules outside the map, such as those of the video tracker, never count.
    """
    entries = _entries(target_modules)
    targets: Targets = {}
    for name in names:
        place = component_of(name)
        if place and any(_entry_matches(entry, name, target_modules) for entry in entries):
            targets.setdefault(place[0], []).append(name)
    return targets


def narrow_targets(targets: Targets, names: list[str], given: Mapping[str, Any]) -> Targets:
    """Apply ``exclude_modules``, ``layers_to_transform``, ``last_n_vision_blocks`` and ``modules_to_save``.

    Raises:
        TargetError: If one of them has no effect, or leaves nothing.
    """
    if "exclude_modules" in given:
        targets = _exclude(targets, given["exclude_modules"])
    if "layers_to_transform" in given:
        targets = _keep_layers(targets, given["layers_to_transform"], given.get("layers_pattern"))
    if LAST_BLOCKS in given:
        targets = keep_last_vision_blocks(targets, names, given[LAST_BLOCKS])
    if "modules_to_save" in given:
        inside = tuple(f"{name}." for name in saved_modules(names, given))
        targets = _keep(targets, "modules_to_save", lambda name: not f"{name}.".startswith(inside))
    return targets


def keep_last_vision_blocks(targets: Targets, names: list[str], number: int) -> Targets:
    """Leave out all blocks of the vision encoder but so many of the last; other targets stay.

    Raises:
        TargetError: If no block is among the targets.
    """
    first = len(_vision_blocks(names)) - number
    vision = targets.get("vision_encoder", ())
    blocks = {name: int(found[1]) for name in vision if (found := _VISION_BLOCK.match(name))}
    if not blocks:
        raise TargetError(f"{LAST_BLOCKS} has no effect: no block of vision_encoder is adapted")
    return _keep(targets, LAST_BLOCKS, lambda name: blocks.get(name, first) >= first)


def saved_modules(names: list[str], given: Mapping[str, Any]) -> list[str]:
    """Return the full names of the modules that ``modules_to_save`` names, each once."""
    matched = _saved(names, given.get("modules_to_save", ())).values()
    return list(dict.fromkeys(name for found in matched for name in found))


def type_problems(given: Mapping[str, Any]) -> dict[str, str]:
    """Return a text for each of these settings whose value is of a type that says nothing, by its name."""
    return {
        name: f"{name} must be {what}, got {given[name]!r}"
        for name, (fits, what) in _TYPES.items()
        if name in given and not fits(given[name])
    }


def setting_problems(names: list[str], given: Mapping[str, Any]) -> list[str]:
    """Return a text for each of these settings that is wrong, or stands beside one that it contradicts."""
    problems = []
    if both := [key for key in ("components", "kinds") if "target_modules" in given and key in given]:
        problems.append(f"target_modules and {' and '.join(both)} both choose modules; give only one of them")
    if "layers_pattern" in given and "layers_to_transform" not in given:
        problems.append("layers_pattern has no effect without layers_to_transform")
    if LAST_BLOCKS in given:
        problems += _last_blocks_problems(names, given)
    return problems


def idle_entries(names: list[str], given: Mapping[str, Any]) -> list[str]:
    """Return a text for each entry of these settings that names no module, or one that LoRA cannot act on."""
    adaptable = [name for name in names if component_of(name)]
    problems = _target_problems(names, given["target_modules"]) if "target_modules" in given else []
    if "exclude_modules" in given:
        problems += _idle_exclusions(adaptable, given["exclude_modules"])
    if "modules_to_save" in given:
        problems += _saved_problems(names, given["modules_to_save"])
    return problems


def _target_problems(names: list[str], target_modules: str | Iterable[str]) -> list[str]:
    adaptable = [name for name in names if component_of(name)]
    endings = sorted({name.rpartition(".")[2] for name in adaptable})
    problems = []
    for entry in _entries(target_modules):
        matched = [name for name in names if _entry_matches(entry, name, target_modules)]
        excluded = [f"{name} ({reason})" for name in matched if (reason := why_excluded(name))]
        if excluded:
            problems.append(f"target_modules {entry!r} would have no effect on {', '.join(excluded)}")
        elif not set(adaptable) & set(matched):
            close = did_you_mean(entry, [*endings, *adaptable])
            problems.append(f"target_modules {entry!r} names no module that LoRA can adapt{close}")
    return problems


def _idle_exclusions(names: list[str], exclude_modules: str | Iterable[str]) -> list[str]:
    return [
        f"exclude_modules {entry!r} excludes nothing"
        for entry in _entries(exclude_modules)
        if not any(_entry_matches(entry, name, exclude_modules) for name in names)
    ]


def _last_blocks_problems(names: list[str], given: Mapping[str, Any]) -> list[str]:
    value, blocks = given[LAST_BLOCKS], len(_vision_blocks(names))
    problems = []
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= blocks:
        problems.append(
            f"{LAST_BLOCKS} must be a whole number from 1 to {blocks}, the blocks there are, got {value!r}"
        )
    if "layers_to_transform" in given:
        problems.append(f"{LAST_BLOCKS} and layers_to_transform both choose blocks; give only one of them")
    return problems


def _saved_problems(names: list[str], modules_to_save: str | Iterable[str]) -> list[str]:
    saved = _saved(names, modules_to_save)
    endings = {name.rpartition(".")[2] for name in names}
    problems = [
        f"modules_to_save {entry!r} names no module{did_you_mean(entry, endings)}"
        for entry, matched in saved.items()
        if not matched
    ]
    return problems + [
        f"modules_to_save {entry!r} would wrap {name!r}, which sam3's activation checkpointing cannot call; "
        "name its children, or use train_also"
        for entry, matched in saved.items()
        for name in matched
        if re.fullmatch(_NEVER_SAVED, name)
    ]


def _exclude(targets: Targets, exclude_modules: str | Iterable[str]) -> Targets:
    entries = _entries(exclude_modules)
    idle = _idle_exclusions([name for part in targets.values() for name in part], exclude_modules)
    if idle:
        raise TargetError(as_report(idle))
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


def _vision_blocks(names: Iterable[str]) -> set[str]:
    return {found[1] for name in names if (found := _VISION_BLOCK.match(name))}


def _saved(names: list[str], modules_to_save: str | Iterable[str]) -> dict[str, list[str]]:
    """Return the modules to save that each entry names, by PEFT's rule: a name or the end of one."""
    return {entry: [n for n in names if f".{n}".endswith(f".{entry}")] for entry in _entries(modules_to_save)}


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


def _is_names(value: Any) -> bool:
    entries = [value] if isinstance(value, str) else value
    return (
        isinstance(entries, Iterable) and all(isinstance(entry, str) for entry in entries) and bool(entries)
    )


def _is_layers(value: Any) -> bool:
    entries = [value] if isinstance(value, int) else value
    return isinstance(entries, Iterable) and all(isinstance(entry, int) for entry in entries)


def _is_patterns(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


_TYPES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "layers_pattern"),
        (_is_names, "a pattern, or a list of names"),
    ),
    "modules_to_save": (_is_names, "a list of names"),
    "layers_to_transform": (_is_layers, "a number, or a list of them"),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (_is_patterns, "a mapping from patterns to numbers")),
}
