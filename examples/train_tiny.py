"""Render a small dataset, train the tiny SAM3 on it, and load the adapter again.

    OMP_NUM_THREADS=1 python examples/train_tiny.py

It writes runs/example (run it again and it replaces the run), and prints the prompts, each epoch, the AP of the best
adapter on the validation images, and what was trained: 68 modules, 133,120 of 5,038,310 parameters.
"""

from collections.abc import Mapping
from pathlib import Path

import sam3_lora
from sam3_lora.data.shapes import Concept, write_coco
from sam3_lora.training.progress import Progress

CONCEPTS = (Concept("yellow", "arrow"), Concept("pink", "diamond"))
FOLDER = Path("runs/example")


def main() -> None:
    for seed, split in enumerate(("train", "valid")):
        write_coco(FOLDER / "dataset" / split, CONCEPTS, count=60, seed=seed)
    summary = sam3_lora.check_dataset(FOLDER / "dataset")
    print("prompts:", *summary.splits["train"].prompts, sep="\n  ")

    settings = sam3_lora.TrainSettings(
        data=FOLDER / "dataset", output=FOLDER / "run", base="tiny", overwrite=True
    )
    result = sam3_lora.train(settings, on_progress=EpochPrinter())
    print({name: round(value, 3) for name, value in result.metrics.items()})

    model = sam3_lora.load_adapter(sam3_lora.load_base("tiny"), result.adapter)
    print(f"{len(sam3_lora.adapted_modules(model))} adapted modules in {result.adapter}")
    print(f"{result.trainable_parameters:,} of {result.total_parameters:,} parameters trained")


class EpochPrinter:
    """Prints a line when a validation brings new metrics."""

    def __init__(self) -> None:
        self.shown: Mapping[str, float] = {}

    def __call__(self, progress: Progress) -> None:
        if progress.metrics != self.shown:
            self.shown = progress.metrics
            print(f"epoch {progress.epoch} of {progress.epochs}: segm AP50 {self.shown['segm_AP50']:.3f}")


if __name__ == "__main__":
    main()
