"""Runs that cannot go on, each really broken in one way, on the tiny base in this one process; prints what they say.

python tests/broken_runs.py FOLDER [loader | full-size]
"""

import json
import os
import resource
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from PIL import Image
from sam3.train.utils.train_utils import register_omegaconf_resolvers

from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.shapes import DEMO_CONCEPTS, write_coco
from sam3_lora.errors import Sam3LoraError
from sam3_lora.output import write_text_atomic
from sam3_lora.training.progress import PROGRESS_FILE, read_events
from sam3_lora.training.settings import TrainSettings, run_yaml

MANY = 60  # images in a batch that takes some GB
SIDE = 2400  # of images that take longer to read than the tiny model to train on them


def trainer(root, name, data="data", preset="minimal", base="tiny", **config):
    """Return a trainer for ``root/name``, set up."""
    folder = root / name
    folder.mkdir()
    settings = TrainSettings(
        data=root / data,
        output=folder,
        base=base,
        preset=preset,
        config={
            f"training.{key}": value for key, value in {"max_epochs": 1, "batch_size": 2, **config}.items()
        },
    )
    write_text_atomic(folder / "run.yaml", run_yaml(settings))
    cfg = compose(config_name=str(folder / "run.yaml"))
    cfg.trainer.mode = "train_only"
    return instantiate(cfg.trainer, _recursive_=False)


def outcome(root, name, run, **config):
    """Return the error of a run, its warnings, and what it left."""
    made = None
    try:
        made = trainer(root, name, **config)
        run(made)
    except (Sam3LoraError, InstantiationException):  # its text is among the events
        pass
    finally:
        torch.distributed.destroy_process_group()
        if made is not None:
            made._lock.close()
    folder = root / name
    events = [event for event, _ in read_events(folder / "logs" / PROGRESS_FILE)]
    return {
        "error": "".join(event["message"] for event in events if event["event"] == "error"),
        "warnings": [event["message"] for event in events if event["event"] == "warning"],
        "adapters": {
            file.parent.name: json.loads(file.read_text())["training"]["epoch"]
            for file in sorted(folder.rglob("sam3_lora.json"))
        },
        "files": sorted(file.name for file in folder.iterdir()),
        "halves": [str(file) for file in folder.rglob("*.tmp")]
        + [str(file) for file in folder.rglob(".*.new")],
    }


def plain(made):
    made.run()


def diverging_at_the_end(made):
    """Train the last step of the second epoch at a rate that breaks the adapter: no further loss would show it."""
    steps = made._after_train_step

    def before_the_last(done):
        steps(done)
        if (made.epoch, done) == (1, 2):
            made.optim.schedulers[0]["lr"] = lambda where: float("inf")

    made._after_train_step = before_the_last
    made.run()


def without_memory(made):
    """Train with hardly more address space than there is in use: oneDNN needs some, and would end in words of its own."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + 200_000_000
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        made.run()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def with_large_files(folder):
    """Write the images again as photographs of a large camera; the masks stay those of small objects at a corner."""
    document = json.loads((folder / ANNOTATION_FILE).read_text())
    for image in document["images"]:
        file = folder / image["file_name"]
        with Image.open(file) as small:
            large = small.convert("RGB").resize((SIDE, SIDE))
        large.save(file)
        image["width"] = image["height"] = SIDE
    (folder / ANNOTATION_FILE).write_text(json.dumps(document))


def without_some_masks(folder):
    document = json.loads((folder / ANNOTATION_FILE).read_text())
    for annotation in document["annotations"][:2]:
        del annotation["segmentation"]
    (folder / ANNOTATION_FILE).write_text(json.dumps(document))


def main():
    root = Path(sys.argv[1])
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    os.environ["MASTER_PORT"] = "0"  # any free one: nobody else joins
    for name, images in (("data", 6), ("bare", 6), ("large", 12), ("many", MANY)):
        write_coco(root / name / "train", DEMO_CONCEPTS, images, 1)
        write_coco(root / name / "valid", DEMO_CONCEPTS, 2, 2)
    without_some_masks(root / "bare" / "train")
    initialize_config_module("sam3.train", version_base="1.2")
    register_omegaconf_resolvers()
    if "loader" in sys.argv:
        with_large_files(root / "large" / "train")
        runs = {"loader": outcome(root, "loader", plain, data="large", batch_size=1)}
    elif "full-size" in sys.argv:
        cramped = {"preset": "balanced", "base": "random", "batch_size": 2, "gradient_accumulation_steps": 1}
        runs = {"full-size": outcome(root, "full-size", without_memory, **cramped)}
    else:
        runs = {
            "predictions": outcome(root, "predictions", plain, lr=1e20),
            "loss": outcome(root, "loss", plain, preset="segmentation_head", lr=1e20),
            "adapter": outcome(root, "adapter", diverging_at_the_end, max_epochs=2),
            "memory": outcome(root, "memory", without_memory, data="many", batch_size=MANY),
            "masks": outcome(root, "masks", plain, data="bare"),
        }
    print(json.dumps(runs))


if __name__ == "__main__":
    main()
