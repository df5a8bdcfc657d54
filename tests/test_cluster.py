"""What Slurm is asked for, on a machine without Slurm. tests/test_slurm.py submits to a real one."""

import os
import pickle
import re
import sys
from pathlib import Path

import pytest

from sam3_lora import TrainSettings
from sam3_lora.data.shapes import DEMO_CONCEPTS, write_coco
from sam3_lora.errors import ConfigError, OutputError
from sam3_lora.output import write_text_atomic
from sam3_lora.training import cluster
from sam3_lora.training.cluster import ClusterError, Launch
from sam3_lora.training.launch import planned_start
from sam3_lora.training.settings import check_settings, run_yaml

JOB = {"use_cluster": True, "num_nodes": 2, "num_gpus": 4, "partition": "gpu", "account": "me", "qos": "high"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster") / "data"
    write_coco(folder / "train", DEMO_CONCEPTS, 4, 1)
    write_coco(folder / "valid", DEMO_CONCEPTS, 2, 2)
    return folder


def command(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Return a folder of commands that come before all others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_the_script_that_is_shown_is_the_one_that_slurm_receives(data, tmp_path, commands):
    run = tmp_path / "run"
    settings = TrainSettings(data=data, output=run, base="tiny", **JOB)
    shown = planned_start(settings)
    assert not run.exists()
    flags = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", shown, re.MULTILINE))
    assert {name: flags[name] for name in ("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task")} == {
        "nodes": "2", "ntasks-per-node": "4", "gpus-per-node": "4", "cpus-per-task": "10"
    }  # fmt: skip
    assert (flags["partition"], flags["account"], flags["qos"]) == ("gpu", "me", "high")
    assert (flags["time"], flags["signal"], flags["job-name"]) == ("4320", "USR2@90", "sam3-lora")

    received = tmp_path / "received.sh"
    command(commands, "sbatch", f'cp "$1" {received}; env > {received}.env; echo Submitted batch job 7')
    command(commands, "srun", "exit 1")
    run.mkdir()
    write_text_atomic(run / "run.yaml", run_yaml(settings))
    launch = Launch(4, 2, True, "gpu", "me", "high", 10)
    assert cluster.submit(run / "run.yaml", launch) == "7"
    assert received.read_text() == shown
    assert "SRUN_CPUS_PER_TASK=10\n" in Path(f"{received}.env").read_text()

    command(commands, "sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    with pytest.raises(ClusterError, match=r"the job was not submitted: .*invalid partition specified: gpu"):
        cluster.submit(run / "run.yaml", launch)


def test_a_run_on_this_machine_is_shown_as_the_command_of_the_official_script(data, tmp_path):
    shown = planned_start(TrainSettings(data=data, output=tmp_path / "run", base="tiny", num_gpus=2))
    run = tmp_path / "run" / "run.yaml"
    assert shown == f"{sys.executable} -m sam3.train.train -c {run} --use-cluster 0 --num-gpus 2\n"


def test_options_of_a_job_need_a_cluster(tmp_path):
    with pytest.raises(ConfigError) as caught:
        check_settings(TrainSettings(tmp_path, tmp_path, base="tiny", num_nodes=2, qos="high"))
    assert "num_nodes has no effect without use_cluster; add --use-cluster, or leave it out" in str(
        caught.value
    )
    assert "qos has no effect without use_cluster" in str(caught.value)


def test_a_machine_without_slurm_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ClusterError, match="no Slurm here: sbatch, srun, squeue not found; submit from a login"
    ):
        cluster.check_slurm()


def test_a_run_whose_job_waits_is_left_alone(tmp_path, commands):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / cluster.JOB_FILE).write_text("7\n")
    command(commands, "squeue", "echo PENDING")
    with pytest.raises(OutputError, match=r"is the run of Slurm job 7, .* watch it with --resume"):
        cluster.check_no_live_job(tmp_path)
    for ended in ("echo COMPLETED", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"):
        command(commands, "squeue", ended)
        cluster.check_no_live_job(tmp_path)
    command(commands, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(ClusterError, match="squeue does not answer: Unable to contact slurm controller"):
        cluster.check_no_live_job(tmp_path)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (("success", None), ""),
        (("error", "Traceback\nValueError: no\n"), "job 7 failed: ValueError: no"),
        (None, "job 7 left no result: it was cancelled"),
    ],
)
def test_how_a_job_ended_is_read_from_what_submitit_left(tmp_path, monkeypatch, result, reason):
    monkeypatch.setattr(cluster, "_TO_ARRIVE", 0.0)
    folder = tmp_path / cluster.SUBMISSIONS
    folder.mkdir()
    if result is not None:
        (folder / "7_0_result.pkl").write_bytes(pickle.dumps(result))
    failure = cluster.failure_of("7", tmp_path)
    assert failure.startswith(reason)
    assert bool(failure) == bool(reason)
