"""LoRA adapters on SAM3 through PEFT: add, save, load, and check that what was asked for is what is there.

The only room that calls PEFT.
"""

from sam3_lora.adapter.combination import combine_adapters
from sam3_lora.adapter.files import ADAPTER_FILES, CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, recorded_base
from sam3_lora.adapter.hotswap import hotswap_adapter, prepare_hotswap
from sam3_lora.adapter.injection import get_peft_sam3
from sam3_lora.adapter.layers import ParameterCount, adapted_modules, count_parameters, inner_model
from sam3_lora.adapter.loading import load_adapter, load_adapter_beside
from sam3_lora.adapter.origin import prompts_by_class, thresholds_of
from sam3_lora.adapter.saving import save_adapter
from sam3_lora.adapter.scaling import scale_adapter
from sam3_lora.adapter.several import (
    active_adapters,
    acts_inside,
    adapter_names,
    delete_adapter,
    disable_adapter,
    set_adapter,
    unload,
    use_adapter,
)
from sam3_lora.adapter.wrapper import BASE

__all__ = [
    "ADAPTER_FILES",
    "BASE",
    "CARD_FILE",
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "ParameterCount",
    "active_adapters",
    "acts_inside",
    "adapted_modules",
    "adapter_names",
    "combine_adapters",
    "count_parameters",
    "delete_adapter",
    "disable_adapter",
    "get_peft_sam3",
    "hotswap_adapter",
    "inner_model",
    "load_adapter",
    "load_adapter_beside",
    "prepare_hotswap",
    "prompts_by_class",
    "recorded_base",
    "save_adapter",
    "scale_adapter",
    "set_adapter",
    "thresholds_of",
    "unload",
    "use_adapter",
]
