"""A run that is stopped in the middle of an epoch saves, leaves, and goes on with the same bytes."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from interrupted_runs import outcome

from sam3_lora.data.shapes import DEMO_CONCEPTS, write_coco
from sam3_lora.errors import ConfigError, RunStopped
from sam3_lora.training.interruption import InterruptibleTrainer
from sam3_lora.training.lock import LOCK_FILE
from sam3_lora.training.progress import PROGRESS_FILE, ProgressReader, append_event, read_events
from sam3_lora.training.relay import SignalRelay, stopped_run
from sam3_lora.training.resumable_data import SeededItems, StartingSampler, random_state, set_random_state
from sam3_lora.training.settings import TrainSettings, run_yaml
from sam3_lora.training.signals import StopRequests, stop_signals_held, stop_signals_to

IMAGES = 8
STEPS = [[epoch, step] for epoch in (1, 2) for step in (1, 2, 3, 4)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interruption") / "data"
    write_coco(folder / "train", DEMO_CONCEPTS, IMAGES, 1)
    write_coco(folder / "valid", DEMO_CONCEPTS, 2, 2)
    return folder


@pytest.fixture(scope="module")
def trained(dataset):
    script = Path(__file__).with_name("interrupted_runs.py")
    command = [sys.executable, "-W", "ignore", script, dataset.parent]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("stopped", "whole", "code"),
    [
        pytest.param("SIGTERM", "whole", 143, id="SIGTERM"),
        pytest.param(
            "SIGINT, accumulated", "whole, accumulated", 130, id="SIGINT with accumulation and workers"
        ),
        pytest.param("submitit", "whole", 7, id="SIGUSR2 with a handler that exits"),
    ],
)
def test_a_stopped_run_ends_with_the_bytes_and_averages_of_a_whole_one(trained, stopped, whole, code):
    run, reference = trained["runs"][stopped], trained["runs"][whole]
    assert run["code"] == code
    assert run["curves"]  # those of the part that was stopped
    assert run["weights"] == reference["weights"]
    assert len(run["weights"]) == 3  # epoch_1, epoch_2, last
    assert run["stats"] == reference["stats"]
    assert run["steps"] == reference["steps"]


def test_a_stop_comes_after_the_step_that_is_going_on(trained):
    epoch, step = trained["runs"]["SIGTERM"]["place"]
    assert epoch == 1
    assert step in (2, 3)
    assert trained["runs"]["whole"]["steps"] == STEPS


def test_signals_are_handed_to_the_handlers_that_were_there_before(trained):
    assert trained["obeyed"] == [signal.SIGTERM, signal.SIGUSR2]
    assert trained["runs"]["submitit"]["place"][0] == 2  # SIGTERM in the first epoch did not end it


def start_command(dataset, run, *options):
    given = ["--data", dataset, "--output", run, "--base", "tiny", "--batch-size", 2, "--no-report", *options]
    command = [sys.executable, "-m", "sam3_lora", "train", *map(str, given)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_step(run, process, number=1):
    progress = run / "logs" / PROGRESS_FILE
    while sum(event["event"] == "step" for event, _ in read_events(progress)) < number:
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)  # for the command to read it too


def test_ctrl_c_saves_and_says_how_to_go_on(dataset, tmp_path):
    run = tmp_path / "run"
    process = start_command(dataset, run, "--max-epochs", 50)
    wait_for_step(run, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "SIGINT: saving after this step; press Ctrl-C again to stop at once\n" in said
    assert "all of it is saved\n" in said
    assert f"Go on with: sam3-lora train --resume {run}\n" in said
    assert (run / "checkpoints" / "checkpoint.pt").is_file()
    assert (run / "adapters" / "last" / "adapter_model.safetensors").is_file()


def test_a_run_with_one_step_an_epoch_stops_too(dataset, tmp_path):
    run = tmp_path / "run"
    process = start_command(dataset, run, "--max-epochs", 500, "--batch-size", IMAGES)
    wait_for_step(run, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert re.search(r"stopped by SIGTERM after epoch \d+; all of it is saved\n", said)


def test_a_second_ctrl_c_stops_at_once(dataset, tmp_path):
    run = tmp_path / "run"
    process = start_command(dataset, run, "--max-epochs", 50)
    wait_for_step(run, process)
    trainer = int((run / "logs" / LOCK_FILE).read_text())
    os.kill(trainer, signal.SIGSTOP)  # a step that takes for ever
    process.send_signal(signal.SIGINT)
    said = ""
    while "SIGINT" not in said:
        said = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=10)[1]
    assert process.returncode == 130
    assert rest.startswith(
        "stopped at once; what was last saved is there\nGo on with: sam3-lora train --resume"
    )
    with pytest.raises(ProcessLookupError):
        os.kill(trainer, 0)


def test_ctrl_c_before_the_first_step_stops_at_once(dataset, tmp_path):
    process = start_command(dataset, tmp_path / "run")
    while not (tmp_path / "run" / "logs" / "console.log").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert "stopped by SIGINT before the first step\n" in process.communicate(timeout=20)[1]
    assert process.returncode == 130


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_leave_at_the_same_step(dataset, tmp_path):
    number = signal.SIGUSR1
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = [
        "--max-epochs",
        2,
        "--num-gpus",
        2,
        "--set",
        "lora_dropout=0.1",
        "--set",
        "training.num_train_workers=1",
    ]
    assert start_command(dataset, whole, *options).wait() == 0
    process = start_command(dataset, run, *options)
    wait_for_step(run, process)
    process.send_signal(number)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 128 + number, said
    again = [sys.executable, "-m", "sam3_lora", "train", "--no-report", "--resume", run]
    assert subprocess.run(again, capture_output=True, check=False).returncode == 0
    assert outcome(run) == outcome(whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_signal_to_all_processes_of_a_job_does_not_end_its_data_loaders(dataset, tmp_path):
    run = tmp_path / "run"
    process = start_command(dataset, run, "--max-epochs", 50, "--set", "training.num_train_workers=2")
    wait_for_step(run, process)
    trainer = int((run / "logs" / LOCK_FILE).read_text())
    os.killpg(os.getpgid(trainer), signal.SIGUSR2)  # as Slurm does it
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 128 + signal.SIGUSR2, said
    assert re.search(r"stopped by SIGUSR2 after (step|epoch) ", said)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_submitit_queues_again_goes_on_in_the_middle_of_the_epoch(dataset, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert start_command(dataset, whole, "--max-epochs", 2, "--set", "lora_dropout=0.1").wait() == 0
    settings = TrainSettings(
        data=dataset, output=run, base="tiny", max_epochs=2, batch_size=2, overrides={"lora_dropout": 0.1}
    )
    run.mkdir()
    (run / "run.yaml").write_text(run_yaml(settings))
    script = Path(__file__).with_name("submitit_run.py")
    result = subprocess.run([sys.executable, script, run, "5"], capture_output=True, text=True, check=False)
    assert "this job is preempted" in result.stdout
    events = [event["event"] for event, _ in read_events(run / "logs" / PROGRESS_FILE)]
    assert events.count("start") == 2
    assert outcome(run) == outcome(whole)


def test_a_second_interrupt_is_a_keyboard_interrupt():
    requests = StopRequests()
    requests.note(signal.SIGTERM)
    requests.note(signal.SIGTERM)
    requests.note(signal.SIGINT)
    assert requests.flags() == [1, 1, 0, 0]
    with pytest.raises(KeyboardInterrupt):
        requests.note(signal.SIGINT)
    requests.clear()
    assert requests.flags() == [0, 0, 0, 0]


def test_signals_wait_while_they_are_held_and_handlers_come_back():
    came = []
    before = signal.getsignal(signal.SIGUSR1)
    with stop_signals_to(came.append):
        with stop_signals_held():
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            assert came == []
        assert came == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_thread_leaves_the_handlers_alone():
    seen = []

    def run():
        with stop_signals_to(seen.append) as before:
            seen.append(before)

    handler = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [{}]
    assert signal.getsignal(signal.SIGTERM) == handler


def test_random_states_go_through_a_checkpoint(tmp_path):
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn()

    np.random.randn()  # one of the two numbers that a draw makes is kept for the next
    torch.save(random_state(), tmp_path / "state.pt")
    first = draw()
    assert draw() != first
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == first


class Noise:
    """A dataset whose items are random."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return torch.rand(2).tolist(), np.random.rand(), index


def test_the_augmentation_of_an_item_follows_seed_epoch_and_index_alone():
    items = SeededItems(Noise(), seed=1)
    items.set_epoch(3)
    before = torch.get_rng_state()
    first = [items[index] for index in (0, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert [items[index] for index in (2, 0)] == [first[2], first[0]]
    assert len({json.dumps(item) for item in first}) == 3
    items.set_epoch(4)
    assert items[0] != first[0]
    assert SeededItems(Noise(), seed=2)[0] != SeededItems(Noise(), seed=1)[0]


def test_a_sampler_leaves_out_what_is_done_once():
    sampler = StartingSampler([4, 2, 0, 1])
    sampler.skip = 3
    assert len(sampler) == 4
    assert list(sampler) == [1]
    assert list(sampler) == [4, 2, 0, 1]


@pytest.fixture
def progress(tmp_path):
    append_event(tmp_path, "start", epochs=2)
    (tmp_path / LOCK_FILE).write_text(str(os.getpid()))
    reader = ProgressReader(tmp_path, None)
    append_event(tmp_path, "step", epoch=1, step=2, steps=4, loss=0.5)
    reader.read()
    return reader


def test_the_command_passes_a_signal_on_to_the_trainer(tmp_path, progress, capsys):
    came = []
    with stop_signals_to(came.append):
        SignalRelay(tmp_path, progress)(signal.SIGTERM)
    assert came == [signal.SIGTERM]
    assert capsys.readouterr().err == "SIGTERM: saving after this step\n"


@pytest.mark.parametrize(
    ("step", "saved", "text"),
    [
        (2, True, "stopped by SIGTERM after step 2 of 4 of epoch 1; all of it is saved"),
        (None, True, "stopped by SIGTERM after epoch 1; all of it is saved"),
        (
            2,
            False,
            "after step 2 of 4 of epoch 1; the adapter is saved, but no checkpoint, as training.save_checkpoints says",
        ),
    ],
)
def test_a_stop_is_told_with_its_place_and_exit_code(tmp_path, progress, step, saved, text):
    append_event(tmp_path, "stopped", signal="SIGTERM", epoch=1, step=step, saved=saved)
    progress.read()
    stop = stopped_run(progress)
    assert isinstance(stop, RunStopped)
    assert text in str(stop)
    assert stop.exit_code == 143


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "ten"])
def test_steps_to_save_at_that_make_no_sense_are_refused(steps):
    with pytest.raises(ConfigError, match="save_every_steps must be 1 or more"):
        InterruptibleTrainer(save_every_steps=steps)


def test_settings_refuse_to_save_every_zero_steps(tmp_path):
    with pytest.raises(ConfigError, match="save_every_steps must be 1 or more, got 0"):
        TrainSettings(data=tmp_path, output=tmp_path, save_every_steps=0)
