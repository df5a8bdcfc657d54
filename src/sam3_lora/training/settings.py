"""Settings of a run, and the file for the official trainer that they become. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sam3_lora.base.checkpoint import DEFAULT, absolute_base, base_info
from sam3_lora.data.prompt_settings import prompt_problems
from sam3_lora.errors import ConfigError, TargetError, as_report
from sam3_lora.presets import get_preset
from sam3_lora.training.composition import common_defaults
from sam3_lora.training.image_settings import image_problems
from sam3_lora.training.monitor import NO_HEAD, monitor_problems
from sam3_lora.training.overrides import (
    LEAST,
    SETTING_KEYS,
    choices_of,
    keywords_of,
    override_problems,
    values_of,
)
from sam3_lora.training.splits import SPLIT_KEYS
from sam3_lora.training.wandb_settings import wandb_problems

RUN_FILE_HEADER = (
    "# @package _global_\n# Start it again with: python -m sam3.train.train -c <absolute path of this file>\n"
)


_PATHS = frozenset(
    {
        "paths.dataset_root",
        "paths.experiment_log_dir",
        *(f"training.{key}" for key in SPLIT_KEYS),
        "prompts.phrases",
        "prompts.cache",
    }
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
        seed: Of everything random in the run; the config's is 0.
        save_every_steps: Also save after every so many steps, in the middle of an epoch.
        num_gpus: Processes on each machine; without CUDA they run on the CPU.
        num_nodes: Machines, for a Slurm job.
        use_cluster: Submit a Slurm job through the official launcher, and wait for it.
        partition: Where Slurm looks for machines.
        account: That Slurm charges.
        qos: Quality of service that Slurm grants.
        overwrite: Replace what is in ``output``.
        report: Whether :func:`sam3_lora.train` ends with ``report.html``, for which the base is evaluated on ``valid/``.
        overrides: Keywords of :func:`sam3_lora.get_peft_sam3` that replace parts of the preset.
        config: Any other keys of the config, as behind ``sam3-lora train``: by dotted name, such as
            ``{"training.weight_decay": 0.01}``, a group, such as ``{"schedule": "constant"}``, or a new key with a plus,
            such as ``{"+trainer.adapter_freq": 2}``.
    """

    data: Path  # a str is turned into one
    output: Path
    preset: str = "balanced"
    base: str = DEFAULT
    max_epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    seed: int | None = None
    save_every_steps: int | None = None
    num_gpus: int = 1
    num_nodes: int | None = None
    use_cluster: bool | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    overwrite: bool = False
    report: bool = True
    overrides: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("data", "output"):
            object.__setattr__(self, name, Path(getattr(self, name)))
        problems = [
            f"{name} must be {least} or more, got {value!r}"
            for name, key in SETTING_KEYS.items()
            if (least := LEAST.get(key)) is not None
            and (value := getattr(self, name)) is not None
            and value < least
        ]
        if self.lr is not None and not 0 < self.lr < 1:
            problems.append(f"lr must lie between 0 and 1, got {self.lr!r}; 1e-4 to 1e-3 is usual")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def keywords(self) -> dict[str, Any]:
        """The keywords of :func:`sam3_lora.get_peft_sam3`: ``overrides``, and those that ``config`` names."""
        return {**self.overrides, **keywords_of(self.config)}


def check_settings(settings: TrainSettings) -> None:
    """Do nothing if the preset, its overrides and the config keys of a run exist and go together.

    Raises:
        ConfigError: For an unknown preset, override or key, or a value out of range; with the close match.
        TargetError: If an override names modules that cannot be adapted.
    """
    get_preset(settings.preset)
    problems = override_problems(settings.config, settings.preset) if settings.config else []
    problems += _disagreements(settings) + _needs_cluster(settings)
    problems += image_problems(settings.config, settings.base) + monitor_problems(settings.config)
    problems += wandb_problems(settings.config.get("training.wandb"))
    if not problems:  # else one mistake would be told twice
        problems = prompt_problems(settings.config)
    if problems:
        raise ConfigError(as_report(problems))
    masks = settings.config.get("training.enable_segmentation", True)
    keywords = settings.keywords
    if keywords or not masks:
        # Only the injection itself knows which modules they would name; shapes are enough for it.
        from sam3_lora.adapter import get_peft_sam3
        from sam3_lora.adapter.starting import start_problems, without_data_start
        from sam3_lora.base.official import build_meta_sam3
        from sam3_lora.base.tiny import build_tiny_sam3

        model = build_tiny_sam3() if settings.base == "tiny" else build_meta_sam3()
        init, data = keywords.get("init_lora_weights"), settings.config.get("adapter.init_data")
        if problems := start_problems(init, from_data=data is not None):
            raise ConfigError(as_report(problems))
        if not masks:
            model.segmentation_head = None
        try:
            get_peft_sam3(model, settings.preset, **without_data_start(keywords))
        except TargetError as error:
            raise error if masks else TargetError(f"{error}. {NO_HEAD}") from error


def _disagreements(settings: TrainSettings) -> list[str]:
    """Return the things that are set twice, to two values."""
    problems = []
    for name, key in SETTING_KEYS.items():
        setting = getattr(settings, name)
        other = absolute_value(key, settings.config[key]) if key in settings.config else None
        known = str(setting.resolve()) if isinstance(setting, Path) else setting
        if key in settings.config and known is not None and other != known:
            problems.append(
                f"{key} is {settings.config[key]!r}, but {name} is {known!r}: give one of them, --{name.replace('_', '-')}"
            )
    doubled = [
        name
        for name, value in keywords_of(settings.config).items()
        if settings.overrides.get(name, value) != value
    ]
    return problems + [f"{name} is set twice, to different values" for name in doubled]


def _needs_cluster(settings: TrainSettings) -> list[str]:
    """Return the settings of a Slurm job that would be submitted nowhere."""
    if settings.use_cluster or settings.config.get("submitit.use_cluster"):
        return []
    given = [name for name in ("partition", "account", "qos") if getattr(settings, name) is not None]
    if (settings.num_nodes or settings.config.get("launcher.num_nodes", 1)) > 1:
        given.insert(0, "num_nodes")
    return [f"{name} has no effect without use_cluster; add --use-cluster, or leave it out" for name in given]


def run_yaml(settings: TrainSettings) -> str:
    """Return the text of the run file: the preset's config with the settings on top of it."""
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
            "training": {},
            "adapter": {"preset": settings.preset, "overrides": settings.keywords},
        }
    )
    for name, key in SETTING_KEYS.items():
        value = getattr(settings, name)
        if value is not None and OmegaConf.select(run, key) is None:
            OmegaConf.update(run, key, value, force_add=True)
    for name, value in values_of(settings.config).items():
        OmegaConf.update(run, name, absolute_value(name, value), force_add=True)
    layers: list[Any] = [f"/sam3_lora/{settings.preset}"]
    if settings.base == "tiny":
        layers.append("/sam3_lora/tiny")
    chosen = choices_of(settings.config)
    layers += [{f"override /sam3_lora/{group}": choice} for group, choice in chosen.items()]
    return _as_run_file(layers, run)


def absolute_value(key: str, value: Any) -> Any:
    """Return the value of a config key, made independent of the working folder if it is a path."""
    is_path = key in _PATHS and value is not None and not str(value).startswith("${")
    return str(Path(value).expanduser().resolve()) if is_path else value


def run_choices(run: DictConfig) -> dict[str, str]:
    """Return the file of each group that a run file chooses, its own or the one of ``common``."""
    chosen = [entry for entry in (*common_defaults(), *run.get("defaults", [])) if isinstance(entry, Mapping)]
    return {str(key).rpartition("/")[2]: str(choice) for entry in chosen for key, choice in entry.items()}


def demo_yaml(output: Path, seed: int) -> str:
    """Return the text of the demo's run file."""
    run = {"paths": {"experiment_log_dir": str(output.resolve())}, "training": {"seed": seed}}
    return _as_run_file(["/sam3_lora/demo"], OmegaConf.create(run))


def _as_run_file(layers: list[Any], run: DictConfig) -> str:
    defaults = OmegaConf.create({"defaults": [*layers, "_self_"]})
    return RUN_FILE_HEADER + OmegaConf.to_yaml(defaults) + OmegaConf.to_yaml(run)
