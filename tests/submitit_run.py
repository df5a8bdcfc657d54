"""Runs a run file as the official script does with --use-cluster 1, but on submitit's local executor, and pre-empts it.

python tests/submitit_run.py RUN_FOLDER_WITH_A_RUN_YAML STEPS_BEFORE_THE_SIGNAL
"""

import os
import signal
import sys
import time
from pathlib import Path

import submitit
from hydra import compose, initialize_config_module
from sam3.train.train import SubmititRunner
from sam3.train.utils.train_utils import register_omegaconf_resolvers

from sam3_lora.training.lock import LOCK_FILE
from sam3_lora.training.progress import PROGRESS_FILE, read_events


def main():
    folder, before = Path(sys.argv[1]), int(sys.argv[2])
    initialize_config_module("sam3.train", version_base="1.2")
    register_omegaconf_resolvers()
    executor = submitit.LocalExecutor(folder=folder / "submitit")
    executor.update_parameters(timeout_min=60)
    job = executor.submit(SubmititRunner(29_517, compose(config_name=str(folder / "run.yaml"))))
    progress = folder / "logs" / PROGRESS_FILE
    while sum(event["event"] == "step" for event, _ in read_events(progress)) < before:
        time.sleep(0.02)
    os.kill(int((folder / "logs" / LOCK_FILE).read_text()), signal.SIGUSR2)
    job.result()
    print(job.stderr(), job.stdout())


if __name__ == "__main__":
    main()
