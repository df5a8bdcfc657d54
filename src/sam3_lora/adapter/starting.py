"""Starts from data: EVA from what enters each module, LoRA-GA from the gradients of its weight."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from peft import LoraConfig, LoraGAConfig, PeftModel, get_eva_state_dict, initialize_lora_eva_weights
from peft.tuners.lora import preprocess_loraga
from peft.tuners.lora.loraga import get_target_modules
from torch import Tensor, nn

from sam3_lora.adapter.layers import PREFIX, inner_model, lora_config_of, note_strengths, strengths_of
from sam3_lora.errors import ConfigError

#: Runs a model on one batch and returns the loss of its training, a scalar.
Step = Callable[[Any], Tensor]

FROM_DATA = ("eva", "lora_ga")  # values of init_lora_weights

_GRADIENT = "_peft_loraga_grad"  # where PEFT's LoRA-GA puts and looks for the gradient of a module
_MOST_PASSES = 20  # over all batches until EVA's directions no longer move; 3 to 5 are usual


def start_problems(init: Any, *, from_data: bool) -> list[str]:
    """Return what is wrong with a choice of ``init_lora_weights`` with data to start from, or without."""
    if init in FROM_DATA and not from_data:
        return [
            f"init_lora_weights={init!r} starts from data; pass init_data=sam3_lora.dataset_losses('my_dataset'), or name "
            "the folder as adapter.init_data in a config"
        ]
    if from_data and init not in FROM_DATA:
        return [f"init_data has no effect without init_lora_weights='eva' or 'lora_ga', got {init!r}"]
    if str(init).startswith("corda"):
        return ["init_lora_weights='corda' has no helper for SAM3; take 'eva', which starts from data too"]
    return []


def without_data_start(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of ``get_peft_sam3`` without a start from data, for a model that has only shapes to run."""
    return {
        key: value for key, value in overrides.items() if key != "init_lora_weights" or value not in FROM_DATA
    }


def gather(init: Any, model: nn.Module, config: LoraConfig, steps: Sequence[Step]) -> dict[str, Tensor]:
    """Run the batches, and return by module what such a start needs of them; nothing for one that needs no data.

    For ``"eva"`` these are the main directions of what enters each module ``(rank, in_features)``, with more ranks where
    they explain most and the sum of all as planned; for ``"lora_ga"`` the gradients of its weight.

    Args:
        init: ``init_lora_weights``.
        model: A copy of the base, with split attention; its modes, gradients and hooks are not put back.
        config: Of the adapter, which gets PEFT's settings for LoRA-GA if it has none.
        steps: The batches.

    Raises:
        ConfigError: If directions do not settle, as with too few batches for the rank, or no gradient comes.
    """
    if init == "eva":
        return _directions(model, config, steps)
    if init == "lora_ga":
        config.lora_ga_config = config.lora_ga_config or LoraGAConfig()
        return _gradients(model, config, steps)
    return {}


@contextlib.contextmanager
def gradients_beside(model: nn.Module, gradients: Mapping[str, Tensor]) -> Iterator[None]:
    """Keep gradients where PEFT looks for them while it wraps a model: it takes A and B from them, and their product out
    of the weight."""
    for name, gradient in gradients.items():
        setattr(model.get_submodule(name), _GRADIENT, gradient)
    bases = [model.get_submodule(name) for name in gradients]
    try:
        yield
    finally:
        for base in bases:
            base.__dict__.pop(_GRADIENT, None)


def start_from_directions(adapted: PeftModel, adapter_name: str, directions: Mapping[str, Tensor]) -> None:
    """Give ``lora_A`` of a fresh adapter these directions, and each module as many ranks as it has (EVA)."""
    inner = inner_model(adapted)
    by_key = {PREFIX + name: rows for name, rows in directions.items()}
    initialize_lora_eva_weights(adapted, eva_state_dict=by_key, adapter_name=adapter_name)
    config = lora_config_of(inner, adapter_name)
    config.init_lora_weights = True  # from here on it is plain LoRA, also where it is loaded
    note_strengths(config, strengths_of(inner, adapter_name))


def smallest_side(init: Any, r: int) -> int:
    """Return how long the smaller side of a weight must be for such a start."""
    return 2 * r if init == "lora_ga" else r


def _directions(model: nn.Module, config: LoraConfig, steps: Sequence[Step]) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's words on PCA of few rows
        found: dict[str, Tensor] = get_eva_state_dict(
            model,
            list(steps),
            peft_config=config,
            forward_fn=_within_passes(len(steps)),
            prepare_model_inputs_fn=lambda step, config: None,
            prepare_layer_inputs_fn=_rows,
            show_progress_bar=False,
        )
    return found


def _gradients(model: nn.Module, config: LoraConfig, steps: Sequence[Step]) -> dict[str, Tensor]:
    def add() -> None:
        for step in steps:
            step(model).backward()

    preprocess_loraga(model, config, add)
    targets = dict(get_target_modules(model, config))
    if missing := [name for name, module in targets.items() if not hasattr(module, _GRADIENT)]:
        raise ConfigError(
            f"LoRA-GA got no gradient for {', '.join(missing)}; leave them out with exclude_modules"
        )
    return {name: getattr(module, _GRADIENT) for name, module in targets.items()}


def _rows(layer_input: Any, model_input: None, layer_name: str) -> Tensor:
    """Return what enters a module as rows of its features, whatever axes SAM3 has before them."""
    tensor: Tensor = layer_input[0] if isinstance(layer_input, tuple) else layer_input
    return tensor.detach().float().reshape(-1, tensor.shape[-1])


def _within_passes(number: int) -> Callable[[nn.Module, Step], Tensor]:
    """Return a function that runs a batch, but not for ever: PEFT goes on until all directions have settled."""
    left = iter(range(_MOST_PASSES * number))

    def forward(model: nn.Module, step: Step) -> Tensor:
        if next(left, None) is None:
            raise ConfigError(
                f"EVA found no lasting directions in {number} batches within {_MOST_PASSES} passes; give more images, a lower "
                "r, or leave out modules that few rows enter, such as geometry_encoder where only words are asked"
            )
        return step(model)

    return forward
