"""Fine-tune Segment Anything Model 3 with LoRA, through Hugging Face PEFT and Meta's own trainer.

>>> from sam3_lora import get_peft_sam3, load_base
>>> model = get_peft_sam3(load_base("tiny"), preset="balanced")
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sam3_lora.adapter import active_adapters as active_adapters
    from sam3_lora.adapter import adapted_modules as adapted_modules
    from sam3_lora.adapter import adapter_names as adapter_names
    from sam3_lora.adapter import combine_adapters as combine_adapters
    from sam3_lora.adapter import count_parameters as count_parameters
    from sam3_lora.adapter import delete_adapter as delete_adapter
    from sam3_lora.adapter import disable_adapter as disable_adapter
    from sam3_lora.adapter import get_peft_sam3 as get_peft_sam3
    from sam3_lora.adapter import hotswap_adapter as hotswap_adapter
    from sam3_lora.adapter import load_adapter as load_adapter
    from sam3_lora.adapter import prepare_hotswap as prepare_hotswap
    from sam3_lora.adapter import save_adapter as save_adapter
    from sam3_lora.adapter import scale_adapter as scale_adapter
    from sam3_lora.adapter import set_adapter as set_adapter
    from sam3_lora.adapter import unload as unload
    from sam3_lora.adapter import use_adapter as use_adapter
    from sam3_lora.adapter_plan import AdapterPlan as AdapterPlan
    from sam3_lora.adapter_plan import plan_adapter as plan_adapter
    from sam3_lora.attention import fuse_attention as fuse_attention
    from sam3_lora.attention import split_attention as split_attention
    from sam3_lora.base.loading import load_base as load_base
    from sam3_lora.data.check import check_dataset as check_dataset
    from sam3_lora.data.check import examine_dataset as examine_dataset
    from sam3_lora.data.convert import convert_dataset as convert_dataset
    from sam3_lora.data.repair import repair_dataset as repair_dataset
    from sam3_lora.demo import run_demo as run_demo
    from sam3_lora.errors import Sam3LoraError as Sam3LoraError
    from sam3_lora.estimation.advice import Advice as Advice
    from sam3_lora.estimation.estimate import Estimate as Estimate
    from sam3_lora.estimation.estimate import estimate as estimate
    from sam3_lora.evaluation.compare import Evaluation as Evaluation
    from sam3_lora.evaluation.compare import evaluate as evaluate
    from sam3_lora.evaluation.guarding import guard as guard
    from sam3_lora.evaluation.verdict import GuardReport as GuardReport
    from sam3_lora.finetune import resume as resume
    from sam3_lora.finetune import train as train
    from sam3_lora.inference import Prediction as Prediction
    from sam3_lora.inference import Predictor as Predictor
    from sam3_lora.installation import Finding as Finding
    from sam3_lora.installation import doctor as doctor
    from sam3_lora.presets import PRESETS as PRESETS
    from sam3_lora.presets import Preset as Preset
    from sam3_lora.presets import get_preset as get_preset
    from sam3_lora.suggestion import Suggestion as Suggestion
    from sam3_lora.suggestion import suggest as suggest
    from sam3_lora.training.builder import build_sam3_lora_model as build_sam3_lora_model
    from sam3_lora.training.launch import TrainResult as TrainResult
    from sam3_lora.training.settings import TrainSettings as TrainSettings
    from sam3_lora.training.starts import dataset_losses as dataset_losses
    from sam3_lora.verification import Verification as Verification
    from sam3_lora.verification import verify_adapter as verify_adapter

__version__ = version("sam3-lora")

# torch takes seconds to import: a name brings in its module when it is first used.
_MODULES = {
    "AdapterPlan": "adapter_plan",
    "Advice": "estimation.advice",
    "Estimate": "estimation.estimate",
    "Evaluation": "evaluation.compare",
    "Finding": "installation",
    "GuardReport": "evaluation.verdict",
    "PRESETS": "presets",
    "Prediction": "inference",
    "Predictor": "inference",
    "Preset": "presets",
    "Sam3LoraError": "errors",
    "Suggestion": "suggestion",
    "TrainResult": "training.launch",
    "TrainSettings": "training.settings",
    "Verification": "verification",
    "active_adapters": "adapter",
    "adapted_modules": "adapter",
    "adapter_names": "adapter",
    "build_sam3_lora_model": "training.builder",
    "check_dataset": "data.check",
    "combine_adapters": "adapter",
    "convert_dataset": "data.convert",
    "count_parameters": "adapter",
    "dataset_losses": "training.starts",
    "delete_adapter": "adapter",
    "disable_adapter": "adapter",
    "doctor": "installation",
    "estimate": "estimation.estimate",
    "evaluate": "evaluation.compare",
    "examine_dataset": "data.check",
    "fuse_attention": "attention",
    "get_peft_sam3": "adapter",
    "get_preset": "presets",
    "guard": "evaluation.guarding",
    "hotswap_adapter": "adapter",
    "load_adapter": "adapter",
    "load_base": "base.loading",
    "plan_adapter": "adapter_plan",
    "prepare_hotswap": "adapter",
    "repair_dataset": "data.repair",
    "resume": "finetune",
    "run_demo": "demo",
    "save_adapter": "adapter",
    "scale_adapter": "adapter",
    "set_adapter": "adapter",
    "split_attention": "attention",
    "suggest": "suggestion",
    "train": "finetune",
    "unload": "adapter",
    "use_adapter": "adapter",
    "verify_adapter": "verification",
}

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        _refuse_seed_name(name)
        raise AttributeError(f"module 'sam3_lora' has no attribute {name!r}")
    value = getattr(import_module(f"sam3_lora.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def _refuse_seed_name(name: str) -> None:
    from sam3_lora.renamed import RENAMED_FUNCTIONS

    if name in RENAMED_FUNCTIONS:
        # An AttributeError would lose its text in `from sam3_lora import name`.
        raise ImportError(f"sam3_lora has no {name}; {RENAMED_FUNCTIONS[name]}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
