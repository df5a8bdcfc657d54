"""What ``key=value`` words and ``TrainSettings.config`` say about a config, in Hydra's spelling. Imports no torch.

A key is a dotted name (``training.lr``), a group (``schedule``), or with a plus in front a dotted name that our configs
lack (``+trainer.adapter_freq``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from sam3_lora.errors import ConfigError, as_report, did_you_mean
from sam3_lora.renamed import RENAMED_KEYS, RENAMED_SETTINGS, seed_block_problems
from sam3_lora.training.composition import GROUPS, shipped_config

#: Keyword of ``TrainSettings`` -> key of the config. Its option is ``--<keyword>`` with hyphens, and the key is the same
#: word below ``training``, but for the first five and those of a Slurm job.
SETTING_KEYS: Mapping[str, str] = {
    "data": "paths.dataset_root",
    "output": "paths.experiment_log_dir",
    "preset": "adapter.preset",
    "base": "base.name",
    "num_gpus": "launcher.gpus_per_node",
    "num_nodes": "launcher.num_nodes",
    **{name: f"submitit.{name}" for name in ("use_cluster", "partition", "account", "qos")},
    **{name: f"training.{name}" for name in ("max_epochs", "batch_size", "lr", "seed", "save_every_steps")},
}

#: Blocks that only our own code reads: a new name there would have no effect.
OWN_BLOCKS = ("paths", "base", "adapter", "training", "prompts", "memory")

_KEYWORDS = "adapter.overrides."
#: Key -> the least value that it takes.
LEAST: Mapping[str, int] = {
    "training.max_epochs": 1,
    "training.batch_size": 1,
    "training.gradient_accumulation_steps": 1,
    "training.val_epoch_freq": 1,
    "training.save_every_steps": 1,
    "launcher.gpus_per_node": 1,
    "launcher.num_nodes": 1,
    "training.lr_scale": 0,
    "training.lr_transformer": 0,
    "training.lr_vision_backbone": 0,
    "training.lr_language_backbone": 0,
    "training.weight_decay": 0,
    "training.seed": 0,
    "training.checkpoint_freq": 0,
    "training.num_train_workers": 0,
    "training.num_val_workers": 0,
}


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Return ``key=value`` words as :attr:`TrainSettings.config` takes them.

    Raises:
        ConfigError: For words that Hydra cannot read, or that are no setting of one run; all of them.
    """
    parser, found, problems = OverridesParser.create(), {}, []
    for word in words:
        try:
            override = parser.parse_override(word)
        except HydraException as error:
            problems.append(f"{word!r} is no key=value: {str(error).splitlines()[0]}")
            continue
        if override.is_delete():
            problems.append(f"{word!r}: a run cannot leave a key out; give it another value, such as null")
        elif override.is_sweep_override():
            problems.append(f"{word!r} names several runs; give one value, a list as [a,b]")
        else:
            key = override.key_or_group.removeprefix("sam3_lora/")
            found[f"+{key}" if override.is_add() or override.is_force_add() else key] = override.value()
    if problems:
        raise ConfigError(as_report(problems))
    return found


def choices_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys that choose a file of a group."""
    return {key: str(value) for key, value in config.items() if key in GROUPS}


def values_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that are no groups, without their plus; keywords of the adapter are :func:`keywords_of`."""
    keys = {key.removeprefix("+"): value for key, value in config.items() if key not in GROUPS}
    return {key: value for key, value in keys.items() if not key.startswith(_KEYWORDS)}


def keywords_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of :func:`sam3_lora.get_peft_sam3` among the keys, ``adapter.overrides.r`` as ``r``."""
    keys = {key.removeprefix("+"): value for key, value in config.items()}
    return {key.removeprefix(_KEYWORDS): value for key, value in keys.items() if key.startswith(_KEYWORDS)}


def override_problems(config: Mapping[str, Any], preset: str) -> list[str]:
    """Return what is wrong with keys and values: names that do not exist, with the close match, and values of another
    kind or out of range.

    Args:
        config: As :attr:`TrainSettings.config`.
        preset: Name of the config that they change.
    """
    chosen = choices_of(config)
    if problems := [
        problem for group, choice in chosen.items() for problem in _choice_problem(group, choice)
    ]:
        return problems
    known = shipped_config(name=preset, choices=chosen)
    return [
        problem
        for key, value in config.items()
        if key not in chosen and not key.removeprefix("+").startswith(_KEYWORDS)
        for problem in (_new_key_problem if key.startswith("+") else _key_problem)(key, value, known)
    ]


@lru_cache
def choices(group: str) -> tuple[str, ...]:
    """Return the names of the files of a group."""
    folder = files("sam3_lora.configs") / "sam3_lora" / group
    return tuple(sorted(file.name.removesuffix(".yaml") for file in folder.iterdir()))


def _choice_problem(group: str, choice: str) -> list[str]:
    if choice in choices(group):
        return []
    hint = did_you_mean(choice, choices(group))
    return [f"{group}={choice}: there is no such {group}{hint} (known: {', '.join(choices(group))})"]


def _new_key_problem(key: str, value: Any, known: DictConfig) -> list[str]:
    name = key.removeprefix("+")
    if OmegaConf.select(known, name, default=known) is not known:
        return [f"{key}: there is such a key; write {name}={value}"]
    if name.partition(".")[0] in OWN_BLOCKS or "." not in name:
        return [f"{problem}; a new one would have no effect" for problem in _key_problem(name, value, known)]
    return []


def _key_problem(key: str, value: Any, known: DictConfig) -> list[str]:
    """Return a problem if a dotted key is not in the config, or has a value there of another kind."""
    if key.startswith("lora."):
        return seed_block_problems({key.removeprefix("lora."): None})
    if key in RENAMED_KEYS:
        return [f"unknown key {key!r}; {RENAMED_KEYS[key]}"]
    *parents, last = key.split(".")
    node: Any = known
    for depth, name in enumerate([*parents, last]):
        if not isinstance(node, DictConfig) or name not in node:
            where = ".".join(key.split(".")[:depth])
            names = list(node) if isinstance(node, DictConfig) else []
            return [_unknown(key, name, where, names)]
        if depth < len(parents):
            node = node._get_node(name)
    if (
        isinstance(node, DictConfig)
        and isinstance(node._get_node(last), DictConfig)
        and not isinstance(value, Mapping)
    ):
        inner = ", ".join(f"{key}.{name}" for name in list(node[last])[:3])
        return [f"{key} is a block, not a value; its keys are {inner} ..."] if inner else []
    present = None if OmegaConf.is_interpolation(node, last) else node[last]
    return _value_problem(key, value, present)


def _unknown(key: str, name: str, where: str, names: Sequence[str]) -> str:
    if where:
        return f"unknown key {key!r}: {where} has no {name!r}{did_you_mean(name, names)}"
    if "." in key:
        return f"unknown key {key!r}: the config has no {name!r}{did_you_mean(name, names)}"
    keyword = RENAMED_SETTINGS.get(key) or (
        f"a keyword of the adapter is --set {key}=... or adapter.overrides.{key}=..."
    )
    return f"unknown key {key!r}{did_you_mean(key, GROUPS) or '; ' + keyword}"


def _value_problem(key: str, value: Any, present: Any) -> list[str]:
    if value is None or (isinstance(value, str) and "${" in value):
        return []
    if isinstance(present, bool) and not isinstance(value, bool):
        return [f"{key} needs true or false, got {value!r}"]
    if _is_number(present) and not _is_number(value):
        return [f"{key} needs a number, got {value!r}"]
    least = LEAST.get(key)
    if least is not None and not (_is_number(value) and value >= least):
        return [f"{key} must be {least} or more, got {value!r}"]
    return []


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
