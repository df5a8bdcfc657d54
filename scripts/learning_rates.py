"""Train the tiny base at several learning rates and print the table of docs/reference/learning-rates.md.

    python scripts/learning_rates.py [FOLDER]

About 10 minutes on one core. FOLDER keeps the runs; one that is finished there is not trained again.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import mean

from sam3_lora.errors import Sam3LoraError
from sam3_lora.training import render_demo_dataset
from sam3_lora.training.launch import train
from sam3_lora.training.progress import PROGRESS_FILE
from sam3_lora.training.settings import TrainSettings

#: The official recipe for full fine-tuning (roboflow_v100_full_ft_100_images.yaml) at its lr_scale of 0.1.
OFFICIAL = {
    "training.lr_transformer": 8e-5,
    "training.lr_vision_backbone": 2.5e-5,
    "training.lr_language_backbone": 5e-6,
}
RATES = (8e-5, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def main() -> None:
    keep = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    render_demo_dataset(keep / "dataset")
    print(
        "| rate | mask AP | box AP | loss, first epoch | last |\n| --- | ---: | ---: | ---: | ---: |",
        flush=True,
    )
    print(row("official: 8e-5, vision 2.5e-5, text 5e-6", keep, "official", OFFICIAL), flush=True)
    for rate in RATES:
        print(row(f"{rate:g}", keep, f"{rate:g}", {"training.lr": rate}), flush=True)


def row(label: str, keep: Path, name: str, rates: dict[str, float]) -> str:
    output = keep / name
    # Only the last epoch is validated: the best of twelve would hide a rate that ends badly.
    config = {**rates, "training.val_epoch_freq": 1000, "training.skip_first_val": True}
    metrics_file = output / "logs" / "best_metrics.json"
    if not metrics_file.is_file():
        try:
            train(TrainSettings(keep / "dataset", output, base="tiny", config=config, overwrite=True))
        except Sam3LoraError as error:
            return f"| {label} | {str(error).splitlines()[0]} | | | |"
    metrics = json.loads(metrics_file.read_text())
    events = [json.loads(line) for line in (output / "logs" / PROGRESS_FILE).read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    first, last = (mean(s["loss"] for s in steps if s["epoch"] == n) for n in (1, steps[-1]["epoch"]))
    return f"| {label} | {metrics['segm_AP']:.3f} | {metrics['bbox_AP']:.3f} | {first:.0f} | {last:.0f} |"


if __name__ == "__main__":
    main()
