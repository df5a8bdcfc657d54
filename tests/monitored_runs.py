"""Trains the tiny base several times in this one process and prints what came out: accumulation, averaging, stopping.

python tests/monitored_runs.py FOLDER_WITH_A_DATASET_AND_ROOM_FOR_RUNS
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accumulated_step import silence
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from interrupted_runs import outcome, send_at_steps
from safetensors.torch import load_file
from sam3.train.utils.train_utils import register_omegaconf_resolvers

from sam3_lora.output import write_text_atomic
from sam3_lora.training.progress import PROGRESS_FILE, read_events
from sam3_lora.training.settings import TrainSettings, run_yaml


def run(folder, mode="train", quiet=False, **training):
    """Train in ``folder``; return what was seen of the run while it went on."""
    folder.mkdir(exist_ok=True)
    config = {f"training.{name}": value for name, value in {"batch_size": 2, **training}.items()}
    config["prompts.negatives"] = "classes"
    settings = TrainSettings(
        data=folder.parent / "data", output=folder, base="tiny", preset="minimal", config=config
    )
    write_text_atomic(folder / "run.yaml", run_yaml(settings))
    cfg = compose(config_name=str(folder / "run.yaml"))
    cfg.trainer.mode = mode
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    os.environ["MASTER_PORT"] = "0"  # any free one: nobody else joins
    trainer = instantiate(cfg.trainer, _recursive_=False)
    seen = Seen(trainer)
    if quiet:
        silence(trainer.model)
    try:
        trainer.run()
    except SystemExit as stop:
        seen.code = stop.code
    finally:
        torch.distributed.destroy_process_group()
        trainer._lock.close()
    left = outcome(folder) if seen.code is None else {}
    return {**left, **seen.values(), "events": events(folder)}


class Seen:
    """What hooks in a trainer see: images through the vision trunk, norms of the gradients that the optimizer gets."""

    def __init__(self, trainer):
        self.code = None
        self._norms = []
        self._images = {True: 0, False: 0}
        self._prompts = {True: 0, False: 0}
        self._texts = []
        model = trainer.model.module
        trunk = model.backbone.vision_backbone.trunk
        trunk.register_forward_hook(lambda _, args, __: self._count(self._images, model.training, args[0]))
        model.register_forward_pre_hook(self._see_batch)
        trainer.optim.optimizer.register_step_pre_hook(self._see_gradients)

    def _count(self, counts, training, images):
        counts[training] += len(images)

    def _see_batch(self, model, args):
        (batch,) = args
        self._prompts[model.training] += len(batch.find_inputs[0].text_ids)
        if not model.training:
            self._texts.append([batch.find_text_batch, batch.find_inputs[0].text_ids.tolist()])

    def _see_gradients(self, optimizer, *_):
        gradients = [
            p.grad.norm() for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        self._norms.append(float(torch.stack(gradients).norm()))

    def values(self):
        keys = {True: "train", False: "val"}
        return {
            "code": self.code,
            "gradient_norms": self._norms,
            "trunk_images": {keys[key]: count for key, count in self._images.items()},
            "asked_prompts": {keys[key]: count for key, count in self._prompts.items()},
            "validation_prompts": self._texts,
        }


def events(folder):
    return [event for event, _ in read_events(folder / "logs" / PROGRESS_FILE)]


def difference(first, second):
    """Return how far two adapters are apart, relative to the second."""
    a, b = (
        load_file(folder / "adapters" / "last" / "adapter_model.safetensors") for folder in (first, second)
    )
    return float(sum((a[k] - b[k]).norm() ** 2 for k in b) ** 0.5 / sum(b[k].norm() ** 2 for k in b) ** 0.5)


def averages(folder):
    """Return whether the saved adapter is the average in the checkpoint, and whether that is what was trained."""
    checkpoint = torch.load(folder / "checkpoints" / "checkpoint.pt", weights_only=True)
    saved = load_file(folder / "adapters" / "last" / "adapter_model.safetensors").values()
    by_size = lambda tensors: sorted((t.numel(), float(t.double().sum())) for t in tensors)  # noqa: E731
    average, trained = checkpoint["average"]["weights"], checkpoint["model"]
    return {
        "saved_is_average": by_size(saved) == by_size(average.values()),
        "average_is_trained": by_size(average.values()) == by_size(trained.values()),
        "updates": checkpoint["average"]["updates"],
    }


def main():
    root = Path(sys.argv[1])
    initialize_config_module("sam3.train", version_base="1.2")
    register_omegaconf_resolvers()
    twice = {"max_epochs": 2, "quiet": True, "mode": "train_only"}
    runs = {
        "big": run(root / "big", **twice),
        "accumulated": run(root / "accumulated", **twice, batch_size=1, gradient_accumulation_steps=2),
        "unclipped": run(root / "unclipped", **twice, gradient_clip_max_norm=None),
    }
    adapters = difference(root / "accumulated", root / "big")

    averaged = {"max_epochs": 2, "mode": "train_only", "ema_decay": 0.9}
    runs["averaged"] = run(root / "averaged", **averaged)
    send_at_steps(root / "stopped", {1: signal.SIGTERM})
    runs["averaged, stopped"] = run(root / "stopped", **averaged)
    runs["averaged, resumed"] = run(root / "stopped", **averaged)

    still = {"max_epochs": 6, "lr": 0.0, "val_epoch_freq": 2, "early_stopping_patience": 1}
    runs["stopped early"] = run(root / "early", **still, ema_decay=0.9)
    runs["stopped early, again"] = run(root / "early", **still, ema_decay=0.9)
    runs["to the end"] = run(root / "end", max_epochs=2, val_epoch_freq=5, enable_segmentation=False)
    print(json.dumps({"runs": runs, "difference": adapters, "averages": averages(root / "averaged")}))


if __name__ == "__main__":
    main()
