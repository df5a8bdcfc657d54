"""Starts from data: EVA from what enters each module, LoRA-GA from the gradients of its weight."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from peft import LoraConfig, LoraGAConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import preprocess_loraga
from peft.tuners.lora.eva import _Hook
from torch import Tensor, nn

from sam3_lora.adapter.layers import inner_model, lora_config_of, note_strengths, strengths_of
from sam3_lora.errors import ConfigError

#: Runs a model on one batch and returns the loss of its training, a scalar.
Step = Callable[[Any], Tensor]

FROM_DATA = ("eva", "lora_ga")  # values of init_lora_weights

_MOST_PASSES = 20  # over all batches until EVA's directions no longer move; 3 to 5 are usual


def start_problems(init: Any, steps: Sequence[Step] | None) -> list[str]:
    """Return what is wrong with a choice of ``init_lora_weights`` beside data to start from."""
    if init in FROM_DATA and not steps:
        return [
            f"init_lora_weights={init!r} starts from data; pass init_data=sam3_lora.dataset_losses('my_dataset'), or name "
            "the folder as adapter.init_data in a config"
        ]
    if steps and init not in FROM_DATA:
        return [f"init_data has no effect without init_lora_weights='eva' or 'lora_ga', got {init!r}"]
    if str(init).startswith("corda"):
        return ["init_lora_weights='corda' has no helper for SAM3; take 'eva', which starts from data too"]
    return []


def start_from_inputs(adapted: PeftModel, adapter_name: str, steps: Sequence[Step]) -> None:
    """Give ``lora_A`` the main directions of what enters each module (EVA), and ranks where they explain most.

    Args:
        adapted: A fresh adapter with ``init_lora_weights="eva"``; the sum of its ranks stays the same.
        adapter_name: PEFT's name for it.
        steps: Its batches.

    Raises:
        ConfigError: If the directions do not settle, as with too few batches for the rank.
    """
    inner = inner_model(adapted)
    try:
        with _modes_kept(inner), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn's words on PCA of few rows
            initialize_lora_eva_weights(
                adapted,
                list(steps),
                forward_fn=_within_passes(inner, len(steps)),
                prepare_model_inputs_fn=lambda step, config: None,
                prepare_layer_inputs_fn=_rows,
                adapter_name=adapter_name,
                show_progress_bar=False,
            )
    finally:
        _remove_hooks(inner)
    config = lora_config_of(inner, adapter_name)
    config.init_lora_weights = True  # from here on it is plain LoRA, also where it is loaded
    note_strengths(config, strengths_of(inner, adapter_name))


@contextlib.contextmanager
def start_from_gradients(model: nn.Module, config: LoraConfig, steps: Sequence[Step]) -> Iterator[None]:
    """Keep the gradients that LoRA-GA starts from beside the weights of a base for the time of a ``with``.

    PEFT then takes the main directions of a gradient for A and B, and takes their product out of the weight.

    Args:
        model: The base, with split attention. Its modes and what it trains are as before afterwards.
        config: Of the adapter, which gets PEFT's ``LoraGAConfig()`` if it has none.
        steps: Each adds the gradient of its loss.
    """
    config.lora_ga_config = config.lora_ga_config or LoraGAConfig()
    try:
        with _modes_kept(model):
            preprocess_loraga(model, config, lambda: _add_gradients(model, steps))
        yield
    finally:
        for module in model.modules():
            module.__dict__.pop("_peft_loraga_grad", None)


def smallest_side(init: Any, r: int) -> int:
    """Return how long the smaller side of a weight must be for such a start."""
    return 2 * r if init == "lora_ga" else r


@contextlib.contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Let PEFT's helpers switch a model to training and back, which they do for the whole of it alike."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _add_gradients(model: nn.Module, steps: Sequence[Step]) -> None:
    for step in steps:
        step(model).backward()


def _rows(layer_input: Any, model_input: None, layer_name: str) -> Tensor:
    """Return what enters a module as rows of its features, whatever axes SAM3 has before them."""
    tensor: Tensor = layer_input[0] if isinstance(layer_input, tuple) else layer_input
    return tensor.detach().float().reshape(-1, tensor.shape[-1])


def _within_passes(inner: nn.Module, number: int) -> Callable[[nn.Module, Step], Tensor]:
    """Return a function that runs a batch, but not for ever: PEFT goes on until all directions have settled."""
    left = iter(range(_MOST_PASSES * number))

    def forward(_: nn.Module, step: Step) -> Tensor:
        if next(left, None) is None:
            raise ConfigError(
                f"EVA found no lasting directions in {number} batches within {_MOST_PASSES} passes; give more images, a lower "
                "r, or leave out modules that few rows enter, such as geometry_encoder where only words are asked"
            )
        return step(inner)

    return forward


def _remove_hooks(inner: nn.Module) -> None:
    for module in inner.modules():
        hooks: Mapping[int, Any] = module._forward_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
            del module._forward_hooks[key]
