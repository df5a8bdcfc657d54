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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from sam3_lora.base.checkpoint import find_checkpoint
from sam3_lora.data.check import log_warnings
from sam3_lora.errors import ConfigError, OutputError, RunStopped, Sam3LoraError, as_report
from sam3_lora.output import check_output, claim_output, mark_finished, write_text_atomic
from sam3_lora.training.cluster import (
    SUBMISSIONS,
    Launch,
    check_no_live_job,
    check_slurm,
    failure_of,
    launch_of,
    live_job,
    request_of,
    submit,
    wait_for,
)
from sam3_lora.training.composition import shipped_config
from sam3_lora.training.lock import check_not_running
from sam3_lora.training.progress import BEST_METRICS_FILE, OnProgress, ProgressReader
from sam3_lora.training.relay import SignalRelay, stopped_run
from sam3_lora.training.settings import (
    RUN_FILE_HEADER,
    TrainSettings,
    absolute_value,
    check_settings,
    run_choices,
    run_yaml,
)
from sam3_lora.training.signals import stop_signals_held, stop_signals_to
from sam3_lora.training.splits import check_prompts, check_run_data

RUN_FILE = "run.yaml"
CONSOLE_LOG = "console.log"

_MAY_CHANGE = ("training.save_every_steps", "submitit.")  # when a run goes on


class TrainingError(Sam3LoraError):
    """The official training script ended with an error."""


@dataclass(frozen=True)
class TrainResult:
    """What a run left.

    Attributes:
        output: Its folder.
        adapter: Folder of the best adapter; of the last one if the run had no ``best_metric``.
        base: What it is for.
        metrics: Of the best adapter on ``valid/``.
        trainable_parameters: Number of them.
        total_parameters: Number of all.
        report: The page, if one was made.
        stopped_early: The epoch after which the run ended because its metric had not risen for long.
        job: Number of the Slurm job that came to the end of it, if one did.
    """

    output: Path
    adapter: Path
    base: str
    metrics: Mapping[str, float]
    trainable_parameters: int
    total_parameters: int
    report: Path | None = None
    stopped_early: int | None = None
    job: str | None = None


def train(settings: TrainSettings, on_progress: OnProgress | None = None) -> TrainResult:
    """Do what :func:`sam3_lora.train` does, but for the report."""
    run = _checked_run(settings)
    check_no_live_job(settings.output)
    check_not_running(settings.output)
    check_output(settings.output, made_by="train", overwrite=settings.overwrite)
    if _launch(run).use_cluster:
        check_slurm()
    find_checkpoint(settings.base)
    claim_output(settings.output, made_by="train", overwrite=settings.overwrite)
    run_file = settings.output.resolve() / RUN_FILE
    write_text_atomic(run_file, run)
    return _run_to_the_end(run_file, on_progress)


def planned_start(settings: TrainSettings) -> str:
    """Return what :func:`train` would start, without starting or writing anything: the request of a Slurm job, or the
    command of the official script."""
    run = _checked_run(settings)
    launch = _launch(run)
    if launch.use_cluster:
        return request_of(run, settings.output, launch)
    return f"{shlex.join(_command(settings.output.resolve() / RUN_FILE, launch))}\n"


def _checked_run(settings: TrainSettings) -> str:
    check_settings(settings)
    run = run_yaml(settings)
    given = OmegaConf.create(run)
    log_warnings(check_run_data(settings.data, given.training))
    check_prompts(settings.data, given.training, OmegaConf.select(given, "prompts") or {})
    return run


def _launch(run: str) -> Launch:
    return launch_of(cast(DictConfig, OmegaConf.create(run)), shipped_config())


def _command(config: Path | str, launch: Launch) -> list[str]:
    return [sys.executable, "-m", "sam3.train.train", "-c", str(config), *launch.options()]


def resume(
    output: str | Path, expected: Mapping[str, Any] | None = None, on_progress: OnProgress | None = None
) -> TrainResult:
    """Do what :func:`sam3_lora.resume` does, but for the report."""
    output = Path(output)
    run_file = output.resolve() / RUN_FILE
    if not run_file.is_file():
        raise OutputError(f"{output} holds no run to go on with: there is no {RUN_FILE!r} in it")
    expected = dict(expected or {})
    # When it is saved and where it runs, not what comes out.
    changes = {key: expected.pop(key) for key in list(expected) if key.startswith(_MAY_CHANGE)}
    started_with = OmegaConf.load(run_file)
    resolved = output / "config_resolved.yaml"
    known = OmegaConf.load(resolved) if resolved.is_file() else started_with
    chosen = run_choices(cast(DictConfig, started_with))
    expected = {"paths.experiment_log_dir": str(output.resolve()), **expected}
    changed = [
        f"{key}: the run has {before!r}, asked for {now!r}"
        for key, now in ((key, absolute_value(key, value)) for key, value in expected.items())
        if (before := chosen[key] if key in chosen else OmegaConf.select(known, key.removeprefix("+"))) != now
    ]
    if changed:
        raise ConfigError(f"{output} was started with other settings: {as_report(changed)}")
    check_run_data(Path(started_with.paths.dataset_root), started_with.training)
    if job := live_job(output):
        if changes:
            raise ConfigError(
                f"{', '.join(changes)} cannot change while job {job} is in the queue: scancel {job} first"
            )
        return _finished(_watch(job, run_file.parent, on_progress))
    check_not_running(output)
    find_checkpoint(started_with.base.name)
    if changes:
        for key, value in changes.items():
            OmegaConf.update(started_with, key, value, force_add=True)
        write_text_atomic(run_file, RUN_FILE_HEADER + OmegaConf.to_yaml(started_with))
    return _run_to_the_end(run_file, on_progress)


def _run_to_the_end(run_file: Path, on_progress: OnProgress | None) -> TrainResult:
    run = run_file.read_text(encoding="utf-8")
    launch = _launch(run)
    if launch.use_cluster:
        check_slurm()
        print(request_of(run, run_file.parent, launch), file=sys.stderr, flush=True)
        return _finished(_watch(submit(run_file, launch), run_file.parent, on_progress))
    try:
        result = run_official_script(run_file, run_file.parent, launch.num_gpus, on_progress)
    except RunStopped as stop:
        go_on = f"sam3-lora train --resume {shlex.quote(str(run_file.parent))}"
        raise RunStopped(f"{stop}\nGo on with: {go_on}", stop.exit_code) from None
    return _finished(result)


def _finished(result: TrainResult) -> TrainResult:
    mark_finished(result.output)
    return result


def _watch(job: str, folder: Path, on_progress: OnProgress | None) -> TrainResult:
    """Wait for a Slurm job and return what it left. An interrupt ends the waiting, not the job."""
    again = f"sam3-lora train --resume {shlex.quote(str(folder))}"
    print(
        f"Job {job} is submitted; Ctrl-C leaves it there. Its output: {folder / SUBMISSIONS}", file=sys.stderr
    )
    progress = ProgressReader(folder / "logs", on_progress, from_start=True)
    states: list[str] = []

    def look(state: str) -> None:
        if states[-1:] != [state]:
            states.append(state)
            print(f"Job {job}: {state}", file=sys.stderr, flush=True)
        progress.read()

    try:
        wait_for(job, look)
        failure = failure_of(job, folder)
    except KeyboardInterrupt:
        raise RunStopped(
            f"stopped watching; job {job} goes on, unless you end it: scancel {job}\nWatch it again with: {again}",
            128 + signal.SIGINT,
        ) from None
    if failure:
        raise TrainingError(
            f"{progress.error or failure}\nAll output of job {job}: {folder / SUBMISSIONS}\n"
            f"A new job goes on from where it was last saved: {again}"
        )
    progress.read()
    return replace(_result(folder, progress), job=job)


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
                _command(config, Launch(num_gpus)),
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
    best = output / "logs" / BEST_METRICS_FILE  # not there with training.best_metric=null
    metrics = json.loads(best.read_text(encoding="utf-8")) if best.is_file() else {}
    return TrainResult(
        output=output,
        adapter=output / "adapters" / ("best" if best.is_file() else "last"),
        base=OmegaConf.load(output / "config_resolved.yaml").base.name,
        metrics={name: value for name, value in metrics.items() if isinstance(value, float)},
        trainable_parameters=progress.start["trainable_parameters"],
        total_parameters=progress.start["total_parameters"],
        stopped_early=progress.stopped_early,
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
