"""PEFT's wrapping of a model, and a trial of it on a copy, so that the real one is only touched if it works."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from sam3_lora.adapter.copies import copy_model, in_same_memory, without_weights
from sam3_lora.adapter.layers import adapter_tensors
from sam3_lora.errors import ConfigError

# These need the weights to start from; the trial on the meta device has only shapes.
INIT_FROM_WEIGHTS = ("pissa", "olora", "orthogonal", "eva", "corda", "loftq", "lora_ga")


def trial_copy(model: nn.Module, config: PeftConfig) -> nn.Module:
    """Return a copy to try an adapter on: without weights for LoRA; other methods may read the weights they change."""
    return without_weights(model) if isinstance(config, LoraConfig) else copy_model(model, in_same_memory)


def try_on(trial: nn.Module, config: PeftConfig, adapter_name: str) -> PeftModel:
    """Wrap a copy of a model, so that whatever PEFT refuses is known before the real one is touched.

    Args:
        trial: Without weights for LoRA; other methods may read those of the modules that they wrap.
        config: Stays as it is.
        adapter_name: PEFT's name for the adapter.
    """
    config = copy.deepcopy(config)
    if isinstance(config, LoraConfig) and str(config.init_lora_weights).startswith(INIT_FROM_WEIGHTS):
        config.init_lora_weights = True
    try:
        adapted = wrap(trial, config, adapter_name, low_cpu_mem_usage=isinstance(config, LoraConfig))
        adapter_tensors(adapted, adapter_name)  # which reads further settings
    except Exception as error:  # PEFT checks little: a wrong type may surface as anything
        raise ConfigError(f"PEFT refuses these settings ({type(error).__name__}): {error}") from error
    return adapted


def try_beside(wrapper: PeftModel, config: PeftConfig, adapter_name: str) -> PeftModel:
    """Add an adapter to a :func:`trial_copy` of an adapted model.

    Raises:
        ConfigError: If PEFT refuses it there.
    """
    trial = trial_copy(wrapper, config)
    assert isinstance(trial, PeftModel)
    inner: Any = trial.get_base_model()
    inner.peft_config = (
        trial.base_model.peft_config
    )  # one dict, as in the original; they were copied one by one
    try:
        trial.add_adapter(
            adapter_name, copy.deepcopy(config), low_cpu_mem_usage=isinstance(config, LoraConfig)
        )
        adapter_tensors(trial, adapter_name)
    except Exception as error:  # PEFT checks little: a wrong type may surface as anything
        raise ConfigError(f"PEFT refuses these settings ({type(error).__name__}): {error}") from error
    return trial


def wrap(
    model: nn.Module, config: PeftConfig, adapter_name: str, low_cpu_mem_usage: bool = False
) -> PeftModel:
    config.base_model_name_or_path = None  # PEFT takes it from the model, and warns about any other
    with garbage_left():
        adapted = get_peft_model(model, config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    assert isinstance(adapted, PeftModel)  # a PeftMixedModel only comes with mixed=True
    return adapted


@contextlib.contextmanager
def garbage_left() -> Iterator[None]:
    """Keep the garbage collector from running: it would go through all of torch's objects, for a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
