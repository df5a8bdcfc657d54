"""Jobs on a real Slurm of two nodes: ``make test-slurm``. Shut out where SLURM_CONF names none."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from interrupted_runs import outcome

from sam3_lora.data.shapes import DEMO_CONCEPTS, write_coco
from sam3_lora.training.cluster import JOB_FILE, SUBMISSIONS
from sam3_lora.training.progress import PROGRESS_FILE, read_events

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(900),
    pytest.mark.skipif("SLURM_CONF" not in os.environ, reason="no Slurm: scripts/slurm-sandbox starts one"),
]

EPOCHS = 4  # of four steps
NODES = ["--use-cluster", "--num-nodes", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm") / "data"
    write_coco(folder / "train", DEMO_CONCEPTS, 16, 1)
    write_coco(folder / "valid", DEMO_CONCEPTS, 3, 2)  # of which one process gets two
    return folder


def command(*options):
    words = [sys.executable, "-m", "sam3_lora", "train", "--no-report", *map(str, options)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start(data, run, *options):
    return command(
        *("--data", data, "--output", run, "--base", "tiny", "--preset", "minimal", "--set", "lora_dropout=0.1"),
        *("--max-epochs", EPOCHS, "--batch-size", "2", "submitit.cpus_per_task=1", "training.num_train_workers=1"),
        *options,
    )  # fmt: skip


def finished(process, code=0):
    out, said = process.communicate(timeout=600)
    assert process.returncode == code, said
    return out + said


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """Return the folder of a whole run of two nodes."""
    run = tmp_path_factory.mktemp("whole") / "run"
    said = finished(start(data, run, *NODES))
    assert "#SBATCH --nodes=2\n" in said
    return run


def steps(run):
    return [e for e, _ in read_events(run / "logs" / PROGRESS_FILE) if e["event"] == "step"]


def starts(run):
    return sum(e["event"] == "start" for e, _ in read_events(run / "logs" / PROGRESS_FILE))


def wait_for_step(run, process, number):
    while len(steps(run)) < number:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def job_of(run):
    return (run / "logs" / JOB_FILE).read_text().strip()


def job_output(run):
    return "".join(file.read_text() for file in sorted((run / SUBMISSIONS).glob("*_log.*")))


def restarts(run):
    shown = subprocess.run(
        ["scontrol", "show", "job", job_of(run)], capture_output=True, text=True, check=True
    )
    return int(re.search(r"Restarts=(\d+)", shown.stdout)[1])


def test_two_nodes_give_the_bytes_of_two_processes_on_one(data, undisturbed, tmp_path):
    finished(start(data, tmp_path / "run", "--num-gpus", "2"))
    assert outcome(undisturbed) == outcome(tmp_path / "run")
    assert len(steps(undisturbed)) == 4 * EPOCHS


def test_a_preempted_job_is_queued_again_and_ends_with_the_same_bytes(data, undisturbed, tmp_path):
    run = tmp_path / "run"
    process = start(data, run, *NODES, "--partition", "main")
    wait_for_step(run, process, 5)
    subprocess.run(
        ["sbatch", "--partition=high", "--nodes=2", "--ntasks-per-node=8", "--output=/dev/null", "--wrap=sleep 2"],
        capture_output=True, check=True,
    )  # fmt: skip
    finished(process)
    assert restarts(run) == 1
    assert "this job is preempted" in job_output(run)
    assert starts(run) == 2
    assert outcome(run) == outcome(undisturbed)


def test_a_job_whose_time_is_up_is_queued_again_and_ends_with_the_same_bytes(data, undisturbed, tmp_path):
    run = tmp_path / "run"
    process = start(data, run, *NODES)
    wait_for_step(run, process, 3)
    number = job_of(run)
    # The shortest that the official launcher asks for is an hour. The signal comes 90 seconds before the end: now.
    subprocess.run(["scontrol", "update", f"jobid={number}", "timelimit=1"], check=True)
    while restarts(run) == 0:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    subprocess.run(["scontrol", "update", f"jobid={number}", "timelimit=60"], check=True)
    finished(process)
    assert "Caught signal SIGUSR2" in job_output(run)
    assert starts(run) == 2
    assert outcome(run) == outcome(undisturbed)


def test_a_job_that_crashed_is_not_queued_again_and_the_next_goes_on(data, undisturbed, tmp_path):
    run = tmp_path / "run"
    process = start(data, run, *NODES, "--save-every-steps", "1")
    wait_for_step(run, process, 6)
    first = job_of(run)
    subprocess.run(
        ["scancel", "--signal=KILL", first], check=True
    )  # all of its processes, as the kernel does it
    said = finished(process, code=1)
    assert f"job {first} left no result" in said
    assert f"A new job goes on from where it was last saved: sam3-lora train --resume {run}" in said
    assert restarts(run) == 0
    finished(command("--resume", run, "--partition", "high"))
    assert job_of(run) != first
    assert outcome(run)["weights"] == outcome(undisturbed)["weights"]


def test_an_interrupt_leaves_the_job_which_is_watched_again(data, undisturbed, tmp_path):
    run = tmp_path / "run"
    process = start(data, run, *NODES)
    wait_for_step(run, process, 1)
    process.send_signal(signal.SIGINT)
    said = finished(process, code=130)
    number = job_of(run)
    assert f"stopped watching; job {number} goes on, unless you end it: scancel {number}" in said
    again = finished(command("--data", data, "--output", run, "--base", "tiny", "--overwrite"), code=1)
    assert f"is the run of Slurm job {number}, which is in the queue" in again
    finished(command("--resume", run))
    assert job_of(run) == number
    assert starts(run) == 1
    assert outcome(run) == outcome(undisturbed)
