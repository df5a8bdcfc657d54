"""A training run as a Slurm job, through the official launcher: its request, its submission, and how it ended."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sam3_lora.errors import OutputError, Sam3LoraError, as_report
from sam3_lora.output import write_text_atomic

JOB_FILE = "slurm_job"  # in logs/: number of the job that was last submitted
SUBMISSIONS = "submitit_logs"  # the official script's name for the folder of a run's scripts and job output

_ENDED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT".split()
)
_ASK_EVERY = 10.0  # seconds; a controller serves everybody
_TO_ARRIVE = 30.0  # seconds that a file of another machine may need to be seen here


class ClusterError(Sam3LoraError):
    """Slurm is not there, or did not take or finish a job."""


@dataclass(frozen=True)
class Launch:
    """What a run file says about where the official script starts its processes."""

    num_gpus: int = 1
    num_nodes: int = 1
    use_cluster: bool = False
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    cpus_per_task: int = 1

    def options(self) -> list[str]:
        """Return it as options of the official script."""
        words = ["--use-cluster", str(int(self.use_cluster)), "--num-gpus", str(self.num_gpus)]
        if self.use_cluster:
            words += ["--num-nodes", str(self.num_nodes)]
            for name in ("partition", "account", "qos"):
                if (value := getattr(self, name)) is not None:
                    words += [f"--{name}", value]
        return words


def launch_of(run: DictConfig, known: Mapping[str, Any]) -> Launch:
    """Return what a run file says, and where it says nothing what the shipped config does.

    Args:
        run: The file.
        known: The shipped config.
    """

    def value(key: str) -> Any:
        own = OmegaConf.select(run, key)
        return OmegaConf.select(DictConfig(known), key) if own is None else own

    return Launch(
        num_gpus=value("launcher.gpus_per_node"),
        num_nodes=value("launcher.num_nodes"),
        use_cluster=bool(value("submitit.use_cluster")),
        cpus_per_task=value("submitit.cpus_per_task"),
        **{name: value(f"submitit.{name}") for name in ("partition", "account", "qos")},
    )


def check_slurm() -> None:
    """Do nothing if Slurm's commands are here.

    Raises:
        ClusterError: Names the missing ones. The official script would quietly run the job on this machine.
    """
    missing = [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]
    if missing:
        raise ClusterError(
            f"no Slurm here: {', '.join(missing)} not found; submit from a login node of the cluster, "
            "or leave out --use-cluster. --dry-run shows the request without Slurm"
        )


def request_of(run_yaml: str, output: Path, launch: Launch) -> str:
    """Return the script that Slurm would receive. Asks nobody and leaves nothing.

    The official script itself makes it, in a run folder of its own that is deleted, with a ``sbatch`` that only says yes.

    Args:
        run_yaml: Text of the run file.
        output: The run folder that it names.
        launch: What it says about the job.
    """
    with tempfile.TemporaryDirectory(prefix="sam3-lora-") as name:
        folder, commands = Path(name).resolve() / "run", Path(name) / "bin"
        folder.mkdir()
        commands.mkdir()
        for command in ("sbatch", "srun"):
            (commands / command).write_text("#!/bin/sh\necho Submitted batch job 0\n", encoding="utf-8")
            (commands / command).chmod(0o755)
        run = OmegaConf.create(run_yaml)
        OmegaConf.update(run, "paths.experiment_log_dir", str(folder))
        (folder / "run.yaml").write_text(f"# @package _global_\n{OmegaConf.to_yaml(run)}", encoding="utf-8")
        _official_script(folder / "run.yaml", launch, PATH=f"{commands}{os.pathsep}{os.environ['PATH']}")
        script = (folder / SUBMISSIONS / "0_submission.sh").read_text(encoding="utf-8")
        return script.replace(str(folder), str(output.resolve()))


def submit(run_file: Path, launch: Launch) -> str:
    """Submit a run through the official script and return the number of the job."""
    said = _official_script(run_file, launch)
    numbers = [line.split()[-1] for line in said.splitlines() if line.startswith("Submitit Job ID:")]
    logs = run_file.parent / "logs"
    logs.mkdir(exist_ok=True)
    write_text_atomic(logs / JOB_FILE, numbers[-1] + "\n")
    return numbers[-1]


def _official_script(run_file: Path, launch: Launch, **environment: str) -> str:
    command = [sys.executable, "-m", "sam3.train.train", "-c", str(run_file), *launch.options()]
    # Since Slurm 22.05 srun no longer takes --cpus-per-task over from the batch script: each task would get one CPU.
    cpus = {"SRUN_CPUS_PER_TASK": str(launch.cpus_per_task)}
    done = subprocess.run(
        command, env={**os.environ, **cpus, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        # submitit repeats what sbatch said, in a line of its own
        said = [line for line in lines if line.startswith(("sbatch:", "slurm"))] or lines[-1:]
        raise ClusterError(f"the job was not submitted: {as_report(said or ['no output'])}")
    return done.stdout


def live_job(run_folder: Path) -> str | None:
    """Return the number of the job of a run that is waiting or going on; ``None`` if there is none."""
    try:
        number = (run_folder / "logs" / JOB_FILE).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    if shutil.which("squeue") is None:
        return None  # not the cluster: the lock of the run folder still keeps a second trainer out
    return number if job_state(number) else None


def check_no_live_job(run_folder: Path) -> None:
    """Do nothing if no job of a run is waiting or going on.

    Raises:
        OutputError: Names the job.
    """
    if number := live_job(run_folder):
        raise OutputError(
            f"{run_folder} is the run of Slurm job {number}, which is in the queue; watch it with --resume {run_folder}, "
            f"or end it first: scancel {number}"
        )


def job_state(number: str) -> str | None:
    """Return the state of a job that waits or runs, such as ``PENDING``; ``None`` of one that has ended.

    Raises:
        ClusterError: If the controller does not answer.
    """
    command = ["squeue", "--noheader", "--format=%T", "--states=all", f"--jobs={number}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        raise ClusterError(f"squeue does not answer: {done.stderr.strip()}")
    state = done.stdout.strip()
    return None if not state or state in _ENDED else state


def wait_for(number: str, between: Callable[[str], None]) -> None:
    """Return when a job has ended.

    Args:
        number: Of the job.
        between: Called often with its state, ``UNKNOWN`` while the controller does not answer.
    """
    state: str | None = "PENDING"
    asked = float("-inf")
    while state is not None:
        if time.monotonic() - asked >= _ASK_EVERY:
            try:
                state = job_state(number)
            except ClusterError:
                state = "UNKNOWN"
            asked = time.monotonic()
        between(state or "ENDED")
        time.sleep(0.5)


def failure_of(number: str, run_folder: Path) -> str:
    """Return why a job that has ended did not come to the end of its training; ``""`` if it did."""
    from submitit.core.utils import JobPaths, pickle_load

    paths = JobPaths(run_folder / SUBMISSIONS, job_id=number, task_id=0)
    until = time.monotonic() + _TO_ARRIVE
    while not paths.result_pickle.is_file():
        if time.monotonic() > until:
            return (
                f"job {number} left no result: it was cancelled, ran out of time, or lost a process or a node; "
                "Slurm does not queue such a job again"
            )
        time.sleep(0.5)
    outcome, value = pickle_load(paths.result_pickle)
    if outcome == "success":
        return ""
    return f"job {number} failed: {str(value).strip().splitlines()[-1]}"
