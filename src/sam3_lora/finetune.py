"""From a dataset to an adapter and the report on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sam3_lora.errors import Sam3LoraError
from sam3_lora.training import launch
from sam3_lora.training.launch import TrainResult
from sam3_lora.training.progress import OnProgress
from sam3_lora.training.settings import TrainSettings

OnReport = Callable[[int, int], None]


def train(
    settings: TrainSettings, on_progress: OnProgress | None = None, on_report: OnReport | None = None
) -> TrainResult:
    """Train an adapter with the official script, in a process of its own, wait for it, and report on it.

    Leaves in ``settings.output``: ``run.yaml`` (what was started), the official ``config.yaml`` and
    ``config_resolved.yaml``, ``checkpoints/``, ``adapters/{epoch_N,last,best}/``, ``logs/``, ``tensorboard/``,
    ``dumps/`` and, unless ``settings.report`` is off, ``report.html``. An interrupt, or another stop signal, saves after the
    step that is going on and stops the script; a second interrupt stops it at once. A report that cannot be written is
    a warning, because the adapter is there. After a Slurm job there is none: the machine that waits for it need not have
    a GPU. An interrupt then ends the waiting, and the job goes on.

    Args:
        settings: What to train.
        on_progress: Called after every step and validation.
        on_report: Called with the number of images done and of all while the base is measured for the report, which
            takes as long as one validation.

    Raises:
        Sam3LoraError: For a bad dataset, setting, base or output folder, before anything is written; or with the
            script's own error when it fails; :class:`sam3_lora.errors.RunStopped` after a stop signal.
    """
    result = launch.train(settings, on_progress)
    return _with_report(result, on_report) if settings.report and result.job is None else result


def resume(
    output: str | Path,
    expected: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
    report: bool = True,
    on_report: OnReport | None = None,
) -> TrainResult:
    """Go on with a run of :func:`train` that was stopped, however that happened, wait for its end, and report on it.

    The run goes on from where it was last saved, and ends with the same bytes as if it had not been stopped. One that
    is finished is only validated again. If its Slurm job is in the queue, that one is waited for; else a new one is
    submitted.

    Args:
        output: The run folder.
        expected: Config keys by dotted name that the run must have been started with; ``training.save_every_steps``
            and what stands below ``submitit`` are changed instead.
        on_progress: As for :func:`train`.
        report: Whether to write ``report.html``.
        on_report: As for :func:`train`.

    Raises:
        OutputError: If there is no run in ``output``.
        ConfigError: If the run was started with other values than ``expected``; lists all of them.
        TrainingError: If the official script fails, also if data or settings are not what the checkpoint was made
            with; lists what differs.
        RunStopped: After a stop signal.
    """
    result = launch.resume(output, expected, on_progress)
    return _with_report(result, on_report) if report and result.job is None else result


def _with_report(result: TrainResult, on_report: OnReport | None) -> TrainResult:
    from sam3_lora.report import report_of_run  # torch loads here, not before the data are checked

    try:
        return replace(result, report=report_of_run(result.output, on_progress=on_report))
    except (Sam3LoraError, OSError, RuntimeError) as error:  # RuntimeError: torch, when memory runs out
        warnings.warn(f"the adapter is complete, but there is no report: {error}", stacklevel=3)
        return result
