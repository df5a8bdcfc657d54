"""Put each preset on the full-size SAM3 and count, without its weights and in about 1 GB of memory.

    OMP_NUM_THREADS=1 python examples/adapt_full_size.py

The model is built on the meta device: names and shapes only. It prints a row for each preset: adapted modules,
trainable parameters, their share, and the size of the adapter file in fp32, which it writes to a temporary folder.
"""

import tempfile

import sam3_lora
from sam3_lora.adapter import WEIGHTS_FILE
from sam3_lora.base.official import build_meta_sam3


def main() -> None:
    print(f"{'preset':<18}{'modules':>8}{'trainable':>13}{'of':>14}{'share':>8}{'file':>10}")
    for preset in sam3_lora.PRESETS:
        model = sam3_lora.get_peft_sam3(build_meta_sam3(), preset=preset)
        trainable, total = sam3_lora.count_parameters(model)
        modules = len(sam3_lora.adapted_modules(model))
        print(
            f"{preset:<18}{modules:>8}{trainable:>13,}{total:>14,}{trainable / total:>8.2%}"
            f"{file_size(model) / 1e6:>7.2f} MB"
        )


def file_size(model) -> int:  # type: ignore[no-untyped-def]
    """Save the adapter with whatever numbers its memory holds, and return the bytes of its weights file."""
    with tempfile.TemporaryDirectory() as folder:
        saved = sam3_lora.save_adapter(model.to_empty(device="cpu"), f"{folder}/adapter")
        return (saved / WEIGHTS_FILE).stat().st_size


if __name__ == "__main__":
    main()
