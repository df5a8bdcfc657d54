"""Two adapters on one base: load, switch, compare, combine and scale them, on the tiny SAM3.

    OMP_NUM_THREADS=1 python examples/two_adapters.py

It writes two adapters into a temporary folder, loads both into one base, and prints what each of them finds in the same
picture, the base among them. The adapters are untrained and change the base at random: with yours, the numbers mean
something. Takes some seconds.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

import sam3_lora
from sam3_lora.data.shapes import Concept, write_coco

ADAPTERS = {"decoder_only": "minimal", "everywhere": "balanced"}  # name -> preset
LORA_ALPHA = 20  # strong enough to show in the scores
PROMPT = "red circle"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: make_adapter(name, Path(scratch) / name) for name in ADAPTERS}
        picture = make_picture(Path(scratch) / "pictures")

        model = sam3_lora.load_base("tiny", device="cpu")
        for name, folder in folders.items():
            sam3_lora.load_adapter(model, folder, name)
        print("adapters:", *sam3_lora.adapter_names(model), "active:", *sam3_lora.active_adapters(model))

        predictor = sam3_lora.Predictor(model, threshold=0.0)
        show(predictor.predict_with(picture, [PROMPT], ["base", *ADAPTERS]))

        sam3_lora.set_adapter(model, "everywhere")
        sam3_lora.scale_adapter(model, {"vision_encoder": 0.5})
        show({"everywhere, half in the vision encoder": predictor.predict(picture, [PROMPT])})
        sam3_lora.scale_adapter(model, 1)

        sam3_lora.combine_adapters(model, {"decoder_only": 0.7, "everywhere": 0.3}, "mixed")
        show(predictor.predict_with(picture, [PROMPT], ["mixed"]))
        saved = sam3_lora.save_adapter(model, Path(scratch) / "mixed", adapter_name="mixed")
        print("the combination is an adapter of its own:", *sorted(file.name for file in saved.iterdir()))

        base = sam3_lora.unload(model)
        print("adapters after unload:", sam3_lora.adapter_names(base) or "none")


def make_adapter(name: str, folder: Path) -> Path:
    """Save an adapter that stands for one of your own."""
    torch.manual_seed(len(name))
    adapted = sam3_lora.get_peft_sam3(
        sam3_lora.load_base("tiny", device="cpu"),
        ADAPTERS[name],
        init_lora_weights=False,
        lora_alpha=LORA_ALPHA,
    )
    return sam3_lora.save_adapter(adapted, folder)


def make_picture(folder: Path) -> Path:
    """Draw a picture with red circles."""
    write_coco(folder, (Concept("red", "circle"),), count=1, seed=0)
    return next(folder.rglob("*.png"))


def show(found: dict[str, list[sam3_lora.Prediction]]) -> None:
    """Print the best score with each adapter."""
    for name, (prediction,) in found.items():
        best = np.max(prediction.scores, initial=0.0)
        print(f"{name}: {PROMPT!r} with a score of {best:.4f}")


if __name__ == "__main__":
    main()
