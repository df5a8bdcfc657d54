"""A run that is killed goes on, and ends with the same bytes as one that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from omegaconf import OmegaConf

from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.shapes import DEMO_CONCEPTS, write_coco
from sam3_lora.errors import ConfigError, OutputError, Sam3LoraError
from sam3_lora.training.fingerprint import differences, fingerprint_of_run
from sam3_lora.training.launch import resume, train
from sam3_lora.training.lock import LOCK_FILE, check_not_running
from sam3_lora.training.progress import PROGRESS_FILE
from sam3_lora.training.settings import TrainSettings

EPOCHS = 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    for split, seed in (("train", 1), ("valid", 2)):
        write_coco(folder / split, DEMO_CONCEPTS, 6, seed)
    return folder


def settings(dataset, output):
    dropout = {"lora_dropout": 0.1}  # so that a random state that is not restored shows
    return TrainSettings(
        data=dataset, output=output, base="tiny", max_epochs=EPOCHS, batch_size=3, overrides=dropout
    )


@pytest.fixture(scope="module")
def uninterrupted(dataset, tmp_path_factory):
    return train(settings(dataset, tmp_path_factory.mktemp("runs") / "whole"))


def adapters(run):
    return {file.relative_to(run): file.read_bytes() for file in (run / "adapters").rglob("*.safetensors")}


def start_and_kill(arguments, when):
    """Start ``sam3-lora train`` and kill it with all its processes, as soon as ``when()`` is true."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sam3_lora", "train", *map(str, arguments)],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None and not when():
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)  # so that it starts nothing between the two kills
    # The official script has a session of its own, which a SIGKILL to its parent does not reach.
    subprocess.run(["pkill", "-KILL", "-P", str(process.pid)], check=False)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_run_killed_after_an_epoch_ends_with_the_same_bytes(dataset, uninterrupted, tmp_path):
    run = tmp_path / "run"
    given = settings(dataset, run)
    checkpoint = run / "checkpoints" / "checkpoint.pt"
    options = [
        "--data",
        dataset,
        "--output",
        run,
        "--base",
        "tiny",
        "--max-epochs",
        EPOCHS,
        "--batch-size",
        3,
    ]
    start_and_kill([*options, "--set", "lora_dropout=0.1"], when=checkpoint.exists)
    with pytest.raises(OutputError, match="holds an unfinished run: go on with --resume"):
        train(given)
    result = resume(run)
    assert adapters(run) == adapters(uninterrupted.output)
    assert result.metrics == uninterrupted.metrics


def test_a_run_killed_in_the_middle_of_an_epoch_goes_on_from_there(dataset, uninterrupted, tmp_path):
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "checkpoint.pt"
    first = ["--data", dataset, "--output", run, "--base", "tiny", "--max-epochs", EPOCHS, "--batch-size", 3]
    start_and_kill([*first, "--save-every-steps", 1, "--set", "lora_dropout=0.1"], when=checkpoint.exists)
    result = resume(run, {"training.save_every_steps": 2})  # how often it is saved may change
    assert OmegaConf.load(run / "run.yaml").training.save_every_steps == 2
    assert adapters(run) == adapters(uninterrupted.output)
    assert result.metrics == uninterrupted.metrics


def test_a_run_that_goes_on_without_its_command_is_not_started_twice(dataset, tmp_path):
    run = tmp_path / "run"
    settings = ["--data", dataset, "--output", run, "--base", "tiny", "--max-epochs", 50]
    command = [sys.executable, "-m", "sam3_lora", "train", *map(str, settings)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    lock, steps = run / "logs" / LOCK_FILE, run / "logs" / PROGRESS_FILE
    while process.poll() is None and not steps.exists():
        time.sleep(0.1)
    process.kill()
    process.wait()
    trainer = int(lock.read_text())
    try:
        with pytest.raises(
            OutputError, match=rf"a training is going on in .*run \(process {trainer}\); wait"
        ):
            resume(run)
        with pytest.raises(OutputError, match="a training is going on"):
            train(TrainSettings(data=dataset, output=run, base="tiny", overwrite=True))
    finally:
        os.kill(trainer, signal.SIGKILL)
    check_not_running(run)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("seed", "save_every"),
    [
        pytest.param(0, None, id="after epochs"),
        pytest.param(1, None, id="after epochs, other moments"),
        pytest.param(2, 1, id="every step"),
    ],
)
def test_four_kills_at_random_moments_do_not_show(seed, save_every, dataset, uninterrupted, tmp_path):
    run = tmp_path / "run"
    rng = random.Random(seed)
    first = ["--data", dataset, "--output", run, "--base", "tiny", "--max-epochs", EPOCHS, "--batch-size", 3]
    arguments = [*first, "--set", "lora_dropout=0.1"]
    arguments += [] if save_every is None else ["--save-every-steps", save_every]
    for _ in range(4):
        deadline = time.monotonic() + rng.uniform(2, 25)
        start_and_kill(arguments, when=lambda end=deadline: time.monotonic() > end)
        if (run / "run.yaml").exists():
            arguments = ["--resume", run]
    resume(run)
    assert adapters(run) == adapters(uninterrupted.output)


def test_the_official_script_started_again_on_a_finished_run_changes_no_adapter(uninterrupted):
    before = adapters(uninterrupted.output)
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "sam3.train.train",
        "-c",
        str(uninterrupted.output / "run.yaml"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert adapters(uninterrupted.output) == before


def test_a_changed_dataset_is_refused_with_what_changed(dataset, tmp_path):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    run = train(settings(data, tmp_path / "run")).output
    write_coco(data / "train", DEMO_CONCEPTS, 6, seed=77)
    with pytest.raises(Sam3LoraError) as caught:
        resume(run)
    assert "checkpoint.pt is of another run" in str(caught.value)
    assert "data.train.dataset.annotations was sha256" in str(caught.value)


def test_other_settings_are_refused_with_all_that_differ(uninterrupted):
    with pytest.raises(ConfigError) as caught:
        resume(
            uninterrupted.output, {"adapter.preset": "full", "training.max_epochs": 9, "base.name": "tiny"}
        )
    assert "adapter.preset: the run has 'balanced', asked for 'full'" in str(caught.value)
    assert "training.max_epochs: the run has 3, asked for 9" in str(caught.value)
    assert "base.name" not in str(caught.value)


def test_a_checkpoint_cut_in_half_is_one_error_and_stays_as_it_is(dataset, tmp_path):
    run = train(settings(dataset, tmp_path / "run")).output
    checkpoint = run / "checkpoints" / "checkpoint.pt"
    half = checkpoint.read_bytes()[: checkpoint.stat().st_size // 2]
    checkpoint.write_bytes(half)
    with pytest.raises(
        Sam3LoraError, match=r"checkpoint.pt is damaged; copy a whole one there, or delete it"
    ):
        resume(run)
    assert checkpoint.read_bytes() == half
    checkpoint.write_bytes(b"")
    with pytest.raises(Sam3LoraError, match=r"to train from the start \(it ends too early\)\n"):
        resume(run)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"holds no run to go on with: there is no 'run.yaml' in it"):
        resume(tmp_path)


def test_the_checkpoint_says_what_it_was_made_with(uninterrupted):
    saved = torch.load(uninterrupted.output / "checkpoints" / "checkpoint.pt", weights_only=True)["run"]
    assert saved["seed"] == "0"
    assert saved["model.preset"] == "'balanced'"
    assert saved["data.train.dataset.images"].startswith("6 files, sha256 ")


def test_a_fingerprint_follows_the_contents_of_a_dataset_and_not_its_place(dataset, tmp_path):
    def of(folder):
        return fingerprint_of_run(
            {"data": {"img_folder": str(folder), "ann_file": str(folder / ANNOTATION_FILE)}}
        )

    write_coco(tmp_path / "moved", DEMO_CONCEPTS, 6, seed=1)
    write_coco(tmp_path / "other", DEMO_CONCEPTS, 6, seed=3)
    assert differences(of(dataset / "train"), of(tmp_path / "moved")) == []
    assert [
        line.split(" was ")[0] for line in differences(of(dataset / "train"), of(tmp_path / "other"))
    ] == [
        "data.annotations",
        "data.images",
    ]
