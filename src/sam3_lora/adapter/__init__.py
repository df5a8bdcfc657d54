"""LoRA adapters on SAM3 through PEFT: add, save, load, and check that what was asked for is what is there.

The only room that calls PEFT.
"""

from sam3_lora.adapter.files import (
    ADAPTER_FILES,
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_adapter,
    load_adapter_beside,
    recorded_base,
    save_adapter,
)
from sam3_lora.adapter.injection import get_peft_sam3
from sam3_lora.adapter.layers import ParameterCount, adapted_modules, count_parameters, inner_model

__all__ = [
    "ADAPTER_FILES",
    "CARD_FILE",
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "ParameterCount",
    "adapted_modules",
    "count_parameters",
    "get_peft_sam3",
    "inner_model",
    "load_adapter",
    "load_adapter_beside",
    "recorded_base",
    "save_adapter",
]
