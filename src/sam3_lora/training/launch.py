"""A training run from Python: check, write the run file, start the official script on it, report progress."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sam3_lora.base.checkpoint import DEFAULT, absolute_base, base_info, find_checkpoint
from sam3_lora.data.check import check_dataset
from sam3_lora.errors import ConfigError, OutputError, RunStopped, Sam3LoraError, as_report, did_you_mean
from sam3_lora.output import check_output, claim_output, mark_finished, write_text_atomic
from sam3_lora.presets import get_preset
from sam3_lora.renamed import seed_block_problems
from sam3_lora.training.image_settings import image_problems
from sam3_lora.training.lock import check_not_running
from sam3_lora.training.progress import BEST_METRICS_FILE, OnProgress, ProgressReader
from sam3_lora.training.relay import SignalRelay, stopped_run
from sam3_lora.training.signals import stop_signals_held, stop_signals_to

RUN_FILE = "run.yaml"
CONSOLE_LOG = "console.log"

_HEADER = (
    "# @package _global_\n# Start it again with: python -m sam3.train.train -c <absolute path of this file>\n"
)


class TrainingError(Sam3LoraError):
    """The official training script ended with an error."""


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


@dataclass(frozen=True)
class TrainResult:
    """What a run left: its folder, its best adapter with the base it is for and its metrics on ``valid/``, parameter
    counts, and the report if one was made."""

    output: Path
    adapter: Path
    base: str
    metrics: Mapping[str, float]
    trainable_parameters: int
    total_parameters: int
    report: Path | None = None


def train(settings: TrainSettings, on_progress: OnProgress | None = None) -> TrainResult:
    """Do what :func:`sam3_lora.train` does, but for the report."""
    check_settings(settings)
    check_not_running(settings.output)
    check_output(settings.output, made_by="train", overwrite=settings.overwrite)
    check_dataset(settings.data)
    find_checkpoint(settings.base)
    claim_output(settings.output, made_by="train", overwrite=settings.overwrite)
    run_file = settings.output.resolve() / RUN_FILE
    write_text_atomic(run_file, run_yaml(settings))
    return _run_to_the_end(run_file, settings.num_gpus, on_progress)


def resume(
    output: str | Path, expected: Mapping[str, Any] | None = None, on_progress: OnProgress | None = None
) -> TrainResult:
    """Do what :func:`sam3_lora.resume` does, but for the report."""
    output = Path(output)
    run_file = output.resolve() / RUN_FILE
    if not run_file.is_file():
        raise OutputError(f"{output} holds no run to go on with: there is no {RUN_FILE!r} in it")
    check_not_running(output)
    expected = dict(expected or {})
    save_every = expected.pop("training.save_every_steps", None)  # changes when it is saved, not what
    started_with = OmegaConf.load(run_file)
    resolved = output / "config_resolved.yaml"
    known = OmegaConf.load(resolved) if resolved.is_file() else started_with
    changed = [
        f"{key}: the run has {before!r}, asked for {now!r}"
        for key, now in {"paths.experiment_log_dir": str(output.resolve()), **expected}.items()
        if (before := OmegaConf.select(known, key)) != now
    ]
    if changed:
        raise ConfigError(f"{output} was started with other settings: {as_report(changed)}")
    check_dataset(Path(started_with.paths.dataset_root))
    find_checkpoint(started_with.base.name)
    if save_every is not None:
        OmegaConf.update(started_with, "training.save_every_steps", save_every)
        write_text_atomic(run_file, _HEADER + OmegaConf.to_yaml(started_with))
    return _run_to_the_end(run_file, started_with.launcher.gpus_per_node, on_progress)


def _run_to_the_end(run_file: Path, num_gpus: int, on_progress: OnProgress | None) -> TrainResult:
    try:
        result = run_official_script(run_file, run_file.parent, num_gpus, on_progress)
    except RunStopped as stop:
        go_on = f"sam3-lora train --resume {shlex.quote(str(run_file.parent))}"
        raise RunStopped(f"{stop}\nGo on with: {go_on}", stop.exit_code) from None
    mark_finished(run_file.parent)
    return result


def check_settings(settings: TrainSettings) -> None:
    """Do nothing if the preset, its overrides and the config keys of a run exist and go together.

    Raises:
        ConfigError: For an unknown preset, override or key, or a value out of range; with the close match.
        TargetError: If an override names modules that cannot be adapted.
    """
    get_preset(settings.preset)
    problems = [
        problem
        for key, value in settings.config.items()
        for problem in _config_problem(key, value, settings.preset)
    ]
    problems += image_problems(settings.config, settings.base)
    if problems:
        raise ConfigError(as_report(problems))
    if settings.overrides:
        # Only the injection itself knows which modules they would name; shapes are enough for it.
        from sam3_lora.adapter import get_peft_sam3
        from sam3_lora.base.official import build_meta_sam3
        from sam3_lora.base.tiny import build_tiny_sam3

        model = build_tiny_sam3() if settings.base == "tiny" else build_meta_sam3()
        get_peft_sam3(model, settings.preset, **settings.overrides)


def _config_problem(key: str, value: Any, preset: str) -> list[str]:
    """Return a problem if a dotted key is in none of the config files that a run of this preset is made of, or has a
    number there and is to become none."""
    if key.startswith("lora."):
        return seed_block_problems({key.removeprefix("lora."): None})
    folder = files("sam3_lora.configs") / "sam3_lora"
    known = OmegaConf.merge(
        *(OmegaConf.create((folder / f"{name}.yaml").read_text()) for name in ("common", preset, "tiny"))
    )
    *parents, last = key.split(".")
    node: Any = known
    for depth, name in enumerate([*parents, last]):
        if not isinstance(node, DictConfig) or name not in node:
            where = ".".join(key.split(".")[:depth]) or "the config"
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
        OmegaConf.update(run, name, value)
    presets = [f"/sam3_lora/{settings.preset}"]
    return _as_run_file([*presets, "/sam3_lora/tiny"] if settings.base == "tiny" else presets, run)


def demo_yaml(output: Path, seed: int) -> str:
    """Return the text of the demo's run file."""
    run = {"paths": {"experiment_log_dir": str(output.resolve())}, "training": {"seed": seed}}
    return _as_run_file(["/sam3_lora/demo"], OmegaConf.create(run))


def _as_run_file(layers: list[str], run: DictConfig) -> str:
    defaults = OmegaConf.create({"defaults": [*layers, "_self_"]})
    return _HEADER + OmegaConf.to_yaml(defaults) + OmegaConf.to_yaml(run)


def run_official_script(
    config: Path | str, output: Path, num_gpus: int = 1, on_progress: OnProgress | None = None
) -> TrainResult:
    """Run ``python -m sam3.train.train -c config`` to its end and return what it left in ``output``.

    Args:
        config: Absolute path of a YAML file, or a name such as ``sam3_lora/demo``.
        output: The ``experiment_log_dir`` of that config.
        num_gpus: Processes to start.
        on_progress: Called after every step and validation.

    Raises:
        TrainingError: With the last error of the script and where to read the rest.
        RunStopped: When a stop signal came, here or to the script.
    """
    logs = output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "sam3.train.train", "-c", str(config), "--use-cluster", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    progress = ProgressReader(logs, on_progress)
    with (
        open(logs / CONSOLE_LOG, "w", encoding="utf-8") as console,
        stop_signals_to(SignalRelay(logs, progress)),
    ):
        with (
            stop_signals_held()
        ):  # so that the script gets none before it can save, and its launcher none at all
            process = subprocess.Popen(
                [*command, "--num-gpus", str(num_gpus)],
                stdout=console,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                progress.read()
            progress.read()
        finally:
            if process.poll() is None:
                _stop(process)
    if progress.stopped is not None:
        raise stopped_run(progress)
    if process.returncode != 0:
        cause = progress.error or (
            f"the official training script ended with exit code {process.returncode}: {_last_error(logs / CONSOLE_LOG)}"
        )
        raise TrainingError(f"{cause}\nAll output of the script: {logs / CONSOLE_LOG}")
    return _result(output, progress)


def _result(output: Path, progress: ProgressReader) -> TrainResult:
    metrics = json.loads((output / "logs" / BEST_METRICS_FILE).read_text(encoding="utf-8"))
    return TrainResult(
        output=output,
        adapter=output / "adapters" / "best",
        base=OmegaConf.load(output / "config_resolved.yaml").base.name,
        metrics={name: value for name, value in metrics.items() if isinstance(value, float)},
        trainable_parameters=progress.start["trainable_parameters"],
        total_parameters=progress.start["total_parameters"],
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the script and the processes that it started, at once: what it writes is whole or not there."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_error(console: Path) -> str:
    lines = [line.strip() for line in console.read_text(encoding="utf-8", errors="replace").splitlines()]
    errors = [
        line for line in lines if ("Error" in line or "Exception" in line) and not line.startswith("File ")
    ]
    return (errors or [line for line in lines if line] or ["no output"])[-1].rstrip(".")
