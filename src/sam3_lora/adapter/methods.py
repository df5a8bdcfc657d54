"""Methods of PEFT other than LoRA: which a SAM3 can have, and their proof on one module of each kind."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor, nn

from sam3_lora.adapter.copies import is_quantised, without_weights
from sam3_lora.adapter.layers import method_of
from sam3_lora.components import component_of
from sam3_lora.errors import ConfigError
from sam3_lora.plan import SELECTING_OF_PEFT

_LANGUAGE_MODEL = "it reads the settings of a transformers language model, which SAM3 has not"
_PROMPTS = "it adds tokens to the input of a language model, and SAM3's input is an image"
#: Methods (PEFT's ``peft_type``) that no SAM3 can have or that its trainer cannot train, with the reason.
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"),
        _PROMPTS,
    ),
    **dict.fromkeys(("ADAPTION_PROMPT", "SHADOW", "XLORA"), _LANGUAGE_MODEL),
    "ADALORA": "it must be told of every optimizer step to move ranks around, which the official trainer does not do",
    "POLY": "each forward must be given task ids, which SAM3 does not hand through",
    "LN_TUNING": "it trains normalisation layers; use train_also=['norms'] beside LoRA",
    "TRAINABLE_TOKENS": "it trains rows of an embedding, and the component map has none; adapt text_encoder",
    "OSF": "it puts a decomposition in the place of the base's weights, so that no base is left to load it on",
}

_SAME = 1e-4  # of outputs before training, relative to the largest: rotations are made by solving equations
_SMALL = 0.05  # the same for methods that start from small random numbers by design
_RANDOM_START = ("VBLORA", "UNILORA")
_NUDGE = 0.05  # a random change of every tensor of the adapter, as training would make one
# More axes than (batch, length, channels): the windows of the ViT, and the outputs of all decoder layers at once.
_FOUR_AXES = ("vision_encoder", "scoring", "segmentation_head")


def refuse_method(config: PeftConfig) -> None:
    """Do nothing if a method can go on a SAM3.

    Raises:
        ConfigError: With the reason why it cannot.
    """
    method = method_of(config)
    if method in REFUSED:
        raise ConfigError(f"{method} is not for SAM3: {REFUSED[method]}")


def lora_settings(config: LoraConfig) -> dict[str, Any]:
    """Return a ``LoraConfig`` as keywords of ``get_peft_sam3``: its ranks, and all else that is not PEFT's default."""
    plain = LoraConfig()
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
    changed = {name: value for name, value in values.items() if value != getattr(plain, name)}
    return {**changed, "r": config.r, "lora_alpha": config.lora_alpha}


def chosen_settings(config: PeftConfig) -> dict[str, Any]:
    """Return those settings of a config that choose modules, as far as they are given."""
    given = {name: getattr(config, name, None) for name in SELECTING_OF_PEFT}
    return {name: value for name, value in given.items() if value}


def config_for(config: PeftConfig, modules: Collection[str], saved: Collection[str]) -> PeftConfig:
    """Return a copy of a config that names exactly these modules."""
    full: Any = copy.deepcopy(config)
    full.target_modules = "|".join(map(re.escape, modules))
    full.modules_to_save = list(saved) or None
    for other in {*SELECTING_OF_PEFT} - {"target_modules", "modules_to_save"}:
        if hasattr(full, other):
            setattr(full, other, None)
    if method_of(full) == "IA3" and not full.feedforward_modules:
        # As in the paper: an MLP is scaled at its inputs, attention at its outputs.
        full.feedforward_modules = [n for n in modules if (component_of(n) or ("", ""))[1] == "mlp"]
    named: PeftConfig = full
    return named


def one_of_each_kind(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """Return the first module of each class, shape and number of axes: PEFT refuses all of a kind or none."""
    kinds: dict[Any, str] = {}
    for name in modules:
        module = model.get_submodule(name)
        shapes = tuple(p.shape for p in module.parameters(recurse=False))
        kinds.setdefault((type(module), shapes, _has_four_axes(name)), name)
    return list(kinds.values())


def trial_model(model: nn.Module, modules: Collection[str]) -> nn.Module:
    """Return a copy without weights, but with those of these modules, in memory of their own.

    Raises:
        ConfigError: If the base is quantised, which no other method than LoRA is known to bear.
    """
    if any(is_quantised(parameter) for parameter in model.parameters()):
        raise ConfigError("only LoRA goes on a quantised base; load it without quantization")
    trial = without_weights(model)
    for name in modules:
        trial.set_submodule(name, copy.deepcopy(model.get_submodule(name)))
    return trial


def sample_outputs(model: nn.Module, modules: Collection[str]) -> dict[str, Tensor]:
    """Return what each of these modules gives for a random input of its own, always the same."""
    return {name: _module(model, name)(_sample_input(name, model)) for name in modules}


def method_problems(adapted: PeftModel, base: nn.Module, modules: Collection[str]) -> list[str]:
    """Return why a fresh adapter of any method is none that a SAM3 can be trained with; nothing in the base changes.

    Each module must give what it gave without the adapter, something else once the adapter's tensors are others, and a
    gradient to each of these; the weights of the base must stay as they are.

    Args:
        adapted: A copy of a model with the adapter on these modules, in eval mode; its adapter is spoilt.
        base: The same without the adapter.
        modules: Official names; a name in ``adapted`` is that of the layer around it.
    """
    inner, problems = adapted.get_base_model(), []
    same = _SMALL if method_of(adapted.active_peft_config) in _RANDOM_START else _SAME
    with torch.no_grad():
        before = sample_outputs(base, modules)
        problems += [
            f"{name}: it changes the outputs before any training; most methods have init_weights=True against that"
            for name, found in sample_outputs(inner, modules).items()
            if _differ(found, before[name], same)
        ]
        problems += [
            f"{name}: it changes the weights of the base"
            for name in modules
            if not torch.equal(_module(inner, name).get_base_layer().weight, _module(base, name).weight)
        ]
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    _nudge(trained.values())
    after = sample_outputs(inner, modules)
    problems += [f"{name}: it has no effect" for name in modules if torch.equal(after[name], before[name])]
    problems += [f"{name}: it gives NaN or infinity" for name in modules if not after[name].isfinite().all()]
    sum(output.float().square().sum() for output in after.values()).backward()  # type: ignore[union-attr]
    return problems + [f"{name}: it gets no gradient" for name, p in trained.items() if p.grad is None]


def _nudge(parameters: Iterable[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator) * _NUDGE
            parameter.add_(noise.to(parameter))


def _sample_input(name: str, model: nn.Module) -> Tensor:
    """Return random numbers of as many axes as the module gets in the forward of SAM3."""
    module = _module(model, name)
    module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    if isinstance(module, nn.Linear):
        shape = (*((2, 3, 2) if _has_four_axes(name) else (3, 2)), module.in_features)
    else:
        shape = (1, module.in_channels, 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(module.weight)


def _has_four_axes(name: str) -> bool:
    component, kind = component_of(name) or ("", "")
    return component in _FOUR_AXES or kind == "heads"


def _module(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def _differ(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    largest = max(1.0, expected.abs().max().item())
    return not (found - expected).abs().max().item() <= tolerance * largest  # also true if not a number
