"""Names of the seed document (docs/how-to/from-the-seed.md) and of earlier versions, and what each is called now. Plain
data.

The texts follow the statement that the name is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

#: Functions and classes of its ``sam3_lora_wrapper.py`` and of its examples.
RENAMED_FUNCTIONS: Mapping[str, str] = MappingProxyType(
    {
        "apply_lora_to_sam3": "it is get_peft_sam3(model, preset, r=..., lora_alpha=..., components=[...]) here",
        "load_lora_weights": "it is load_adapter(model, folder) here; a .pth of LoRA weights cannot be loaded",
        "save_lora_weights": "it is save_adapter(model, folder) here",
        "yolo_seg_to_coco": "it is convert_dataset(folder, my_dataset) here; class names come from data.yaml or classes.txt",
        "Sam3ImageInference": "it is Predictor(model).predict(image, prompts) here",
    }
)

#: Keys of its ``lora:`` block, which are the keywords of ``apply_lora_to_sam3`` too.
RENAMED_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "rank": "it is r here",
        "alpha": "it is lora_alpha here",
        "dropout": "it is lora_dropout here",
        **{
            f"apply_to_{component}": f"name the parts to adapt instead: components=[...], with {component!r} "
            "among them or not"
            for component in ("vision_encoder", "text_encoder", "detr_encoder", "detr_decoder")
        },
    }
)

#: Config keys of earlier versions.
RENAMED_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "training.amp": "it is training.amp_enabled now",
        "training.num_workers": "it is training.num_train_workers now, and training.num_val_workers",
        "training.final_lr": "it is training.final_lr_ratio now, a share of the highest rate",
    }
)


def seed_block_problems(block: Mapping[str, object]) -> list[str]:
    """Return a text for each key of a ``lora:`` block, which no config has here."""
    called = {**RENAMED_SETTINGS, "target_modules": "a preset chooses them, or components and kinds"}
    return [f"unknown key 'lora.{key}'; {called.get(key, 'there is no such setting')}" for key in block] or [
        "unknown key 'lora'; the settings of the adapter are below 'adapter'"
    ]
