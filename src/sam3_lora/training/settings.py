"""Settings of a run, and the file for the official trainer that they become. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sam3_lora.base.checkpoint import DEFAULT, absolute_base, base_info
from sam3_lora.errors import ConfigError, as_report, did_you_mean
from sam3_lora.presets import get_preset
from sam3_lora.renamed import RENAMED_KEYS, seed_block_problems
from sam3_lora.training.composition import shipped_config
from sam3_lora.training.image_settings import image_problems
from sam3_lora.training.splits import SPLIT_KEYS
from sam3_lora.training.wandb_settings import wandb_problems

RUN_FILE_HEADER = (
    "# @package _global_\n# Start it again with: python -m sam3.train.train -c <absolute path of this file>\n"
)


@dataclass(frozen=True)
class TrainSettings:
    """One run of ``sam3-lora train``. ``None`` takes the value of the config.

    Attributes:
        data: Folder with ``train/`` and ``valid/``, each with ``_annotations.coco.json``.
        output: Run folder.
        preset: Name of a preset, which is also the config: ``sam3_lora/<preset>``.
        base: As for :func:`sam3_lora.load_base`.
        max_epochs: Passes over the training images.
        batch_size: Images a process and step.
        lr: Peak learning rate.
        seed: Of everything random in the run.
        save_every_steps: Also save after every so many steps, in the middle of an epoch.
        num_gpus: Processes on this machine; without CUDA they run on the CPU.
        overwrite: Replace what is in ``output``.
        report: Whether :func:`sam3_lora.train` ends with ``report.html``, for which the base is evaluated on ``valid/``.
        overrides: Keywords of :func:`sam3_lora.get_peft_sam3` that replace parts of the preset.
        config: Any other keys of the config by dotted name, such as ``{"training.weight_decay": 0.01}``.
    """

    data: Path  # a str is turned into one
    output: Path
    preset: str = "balanced"
    base: str = DEFAULT
    max_epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    seed: int = 0
    save_every_steps: int | None = None
    num_gpus: int = 1
    overwrite: bool = False
    report: bool = True
    overrides: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("data", "output"):
            object.__setattr__(self, name, Path(getattr(self, name)))
        problems = [
            f"{name} must be {least} or more, got {value!r}"
            for name, value, least in (
                ("max_epochs", self.max_epochs, 1),
                ("batch_size", self.batch_size, 1),
                ("save_every_steps", self.save_every_steps, 1),
                ("num_gpus", self.num_gpus, 1),
                ("seed", self.seed, 0),
            )
            if value is not None and value < least
        ]
        if self.lr is not None and not 0 < self.lr < 1:
            problems.append(f"lr must lie between 0 and 1, got {self.lr!r}; 1e-4 to 1e-3 is usual")
        if problems:
            raise ConfigError("; ".join(problems))


def check_settings(settings: TrainSettings) -> None:
    """Do nothing if the preset, its overrides and the config keys of a run exist and go together.

    Raises:
        ConfigError: For an unknown preset, override or key, or a value out of range; with the close match.
        TargetError: If an override names modules that cannot be adapted.
    """
    get_preset(settings.preset)
    known = _known_config(settings.preset) if settings.config else OmegaConf.create()
    problems = [
        problem for key, value in settings.config.items() for problem in _config_problem(key, value, known)
    ]
    problems += image_problems(settings.config, settings.base)
    problems += wandb_problems(settings.config.get("training.wandb"))
    if problems:
        raise ConfigError(as_report(problems))
    if settings.overrides:
        # Only the injection itself knows which modules they would name; shapes are enough for it.
        from sam3_lora.adapter import get_peft_sam3
        from sam3_lora.adapter.starting import start_problems, without_data_start
        from sam3_lora.base.official import build_meta_sam3
        from sam3_lora.base.tiny import build_tiny_sam3

        model = build_tiny_sam3() if settings.base == "tiny" else build_meta_sam3()
        init, data = settings.overrides.get("init_lora_weights"), settings.config.get("adapter.init_data")
        if problems := start_problems(init, from_data=data is not None):
            raise ConfigError(as_report(problems))
        get_peft_sam3(model, settings.preset, **without_data_start(settings.overrides))


def _known_config(preset: str) -> Any:
    """Return the config files that a run of this preset is made of, as one."""
    return shipped_config(name=preset)


def _config_problem(key: str, value: Any, known: Any) -> list[str]:
    """Return a problem if a dotted key is not in the config, or has a number there and is to become none."""
    if key.startswith("lora."):
        return seed_block_problems({key.removeprefix("lora."): None})
    *parents, last = key.split(".")
    node: Any = known
    for depth, name in enumerate([*parents, last]):
        if not isinstance(node, DictConfig) or name not in node:
            where = ".".join(key.split(".")[:depth]) or "the config"
            if key in RENAMED_KEYS:
                return [f"unknown key {key!r}; {RENAMED_KEYS[key]}"]
            names = list(node) if isinstance(node, DictConfig) else []
            return [f"unknown key {key!r}: {where} has no {name!r}{did_you_mean(name, names)}"]
        if depth < len(parents):
            node = node._get_node(name)
    present = None if OmegaConf.is_interpolation(node, last) else node[last]
    free = value is None or (isinstance(value, str) and value.startswith("${"))
    if _is_number(present) and not _is_number(value) and not free:
        return [f"{key} needs a number, got {value!r}"]
    return []


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def run_yaml(settings: TrainSettings) -> str:
    """Return the text of the run file: the preset's config with the settings on top of it."""
    training = {
        "max_epochs": settings.max_epochs,
        "batch_size": settings.batch_size,
        "lr": settings.lr,
        "seed": settings.seed,
        "save_every_steps": settings.save_every_steps,
    }
    info = base_info(settings.base)
    run = OmegaConf.create(
        {
            "paths": {
                "dataset_root": str(settings.data.resolve()),
                "experiment_log_dir": str(settings.output.resolve()),
            },
            "base": {
                "name": absolute_base(settings.base),
                "resolution": info.resolution,
                "num_queries": info.num_queries,
            },
            "training": {name: value for name, value in training.items() if value is not None},
            "adapter": {"preset": settings.preset, "overrides": dict(settings.overrides)},
            "launcher": {"gpus_per_node": settings.num_gpus},
        }
    )
    for name, value in settings.config.items():
        OmegaConf.update(run, name, _absolute(name, value))
    presets = [f"/sam3_lora/{settings.preset}"]
    return _as_run_file([*presets, "/sam3_lora/tiny"] if settings.base == "tiny" else presets, run)


def _absolute(key: str, value: Any) -> Any:
    """Return the value of a config key; a path to images independent of the working folder."""
    is_path = key.removeprefix("training.") in SPLIT_KEYS and not str(value).startswith("${")
    return str(Path(value).resolve()) if is_path else value


def demo_yaml(output: Path, seed: int) -> str:
    """Return the text of the demo's run file."""
    run = {"paths": {"experiment_log_dir": str(output.resolve())}, "training": {"seed": seed}}
    return _as_run_file(["/sam3_lora/demo"], OmegaConf.create(run))


def _as_run_file(layers: list[str], run: DictConfig) -> str:
    defaults = OmegaConf.create({"defaults": [*layers, "_self_"]})
    return RUN_FILE_HEADER + OmegaConf.to_yaml(defaults) + OmegaConf.to_yaml(run)
