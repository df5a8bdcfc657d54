"""Trains the tiny base several times in this one process, whole and stopped by real signals, and prints what came out.

python tests/interrupted_runs.py FOLDER_WITH_A_DATASET_AND_ROOM_FOR_RUNS
"""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from sam3.train.utils.train_utils import register_omegaconf_resolvers

from sam3_lora.output import write_text_atomic
from sam3_lora.training.interruption import MIDDLE
from sam3_lora.training.progress import PROGRESS_FILE, read_events
from sam3_lora.training.settings import TrainSettings, run_yaml

FLIP = {"_target_": "sam3.train.transforms.basic_for_api.RandomHorizontalFlip", "consistent_transform": True}


def start(folder, **config):
    """Train in ``folder`` until the end or a signal; return the exit code, or None for the end."""
    data = folder.parent / "data"
    settings = TrainSettings(
        data=data,
        output=folder,
        base="tiny",
        preset="minimal",
        max_epochs=2,
        batch_size=2,
        overrides={"lora_dropout": 0.1},
        config={f"training.{name}": value for name, value in config.items()},
    )
    write_text_atomic(folder / "run.yaml", run_yaml(settings))
    cfg = compose(config_name=str(folder / "run.yaml"))
    cfg.trainer.mode = "train_only"
    cfg.transforms.train[0].transforms.insert(2, FLIP)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    os.environ["MASTER_PORT"] = "0"  # any free one: nobody else joins
    trainer = instantiate(cfg.trainer, _recursive_=False)
    try:
        trainer.run()
    except SystemExit as stop:
        return stop.code
    finally:
        torch.distributed.destroy_process_group()
        trainer._lock.close()


def send_at_steps(folder, signals):
    """Send this process a signal as soon as it reports so many steps; ``signals`` is step -> signal."""

    def wait():
        for step, number in signals.items():
            while steps_of(folder) < step:
                time.sleep(0.005)
            os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


def steps_of(folder):
    return sum(event["event"] == "step" for event, _ in read_events(folder / "logs" / PROGRESS_FILE))


def outcome(folder):
    weights = {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted((folder / "adapters").rglob("*.safetensors"))
    }
    steps = [
        (event["epoch"], event["step"])
        for event, _ in read_events(folder / "logs" / PROGRESS_FILE)
        if event["event"] == "step"
    ]
    stats = [json.loads(line) for line in (folder / "logs" / "train_stats.json").read_text().splitlines()]
    return {"weights": weights, "steps": steps, "stats": stats}


def whole(root, name, **config):
    """Return what a run leaves that nothing stops."""
    folder = root / name
    folder.mkdir()
    assert start(folder, **config) is None
    return outcome(folder)


def stopped(root, name, signals, **config):
    """Return what a run leaves that is stopped and started again, and where it stopped."""
    folder = root / name
    folder.mkdir()
    send_at_steps(folder, signals)
    code = start(folder, **config)
    curves = (folder / "curves.png").is_file()
    checkpoint = torch.load(folder / "checkpoints" / "checkpoint.pt", weights_only=True)
    assert start(folder, **config, save_every_steps=1) is None  # which may change
    place = [checkpoint["epoch"] + 1, checkpoint[MIDDLE]["steps"]]
    return {"code": code, "place": place, "curves": curves, **outcome(folder)}


def main():
    root = Path(sys.argv[1])
    initialize_config_module("sam3.train", version_base="1.2")
    register_omegaconf_resolvers()
    two = {"gradient_accumulation_steps": 2}
    runs = {
        "whole": whole(root, "whole"),
        "whole, accumulated": whole(root, "accumulated", **two),
        "SIGTERM": stopped(root, "term", {2: signal.SIGTERM}),
        "SIGINT, accumulated": stopped(root, "int", {3: signal.SIGINT}, num_train_workers=2, **two),
    }
    # Handlers as submitit's: SIGTERM is only logged, SIGUSR2 asks for the job to be queued again and exits.
    obeyed = []
    signal.signal(signal.SIGTERM, lambda number, frame: obeyed.append(number))
    signal.signal(signal.SIGUSR2, lambda number, frame: sys.exit(obeyed.append(number) or 7))
    runs["submitit"] = stopped(root, "slurm", {2: signal.SIGTERM, 5: signal.SIGUSR2})
    print(json.dumps({"obeyed": obeyed, "runs": runs}))


if __name__ == "__main__":
    main()
