"""A frozen base in 8 or 4 bits: the Linears of the two encoders, which hold nine tenths of SAM3, by torchao or bitsandbytes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import nn

from sam3_lora.adapter.layers import refuse_adapted, remember_fingerprint
from sam3_lora.attention import split_attention
from sam3_lora.components import COMPONENTS, Component, resolve_targets, unknown_names
from sam3_lora.errors import ConfigError, as_report
from sam3_lora.fingerprint import base_fingerprint

Model = TypeVar("Model", bound=nn.Module)

ENCODERS: tuple[Component, ...] = ("vision_encoder", "text_encoder")

_PACKAGES = MappingProxyType({"int8": "torchao", "bnb-8bit": "bitsandbytes", "bnb-4bit": "bitsandbytes"})
QUANTIZATIONS = tuple(_PACKAGES)


def quantize_base(model: Model, quantization: str, components: Iterable[Component] = ENCODERS) -> Model:
    """Replace the weights of a base's attention and MLP Linears by quantised ones, in place, and return ``model``.

    Attention is split first. The base must stay frozen then: put LoRA on it. The outputs change by the error of the
    quantisation. Adapters that were trained on the base in full precision load, and the other way round; to merge one,
    load it into a base that is not quantised.

    Args:
        model: A base with its weights loaded, on the device where it will stay, without adapters.
        quantization: ``int8``: weights as int8 with one scale a row (torchao). ``bnb-8bit``: LLM.int8(), ``bnb-4bit``:
            NF4 (bitsandbytes).
        components: Where; the others are small, and the decoder is the most sensitive.

    Raises:
        ConfigError: For an unknown method or component, or a missing package.
        AdapterError: If the model has an adapter.
    """
    components = list(components)
    problems = unknown_names("quantization", [quantization], QUANTIZATIONS)
    problems += unknown_names("component", components, COMPONENTS)
    if problems:
        raise ConfigError(as_report(problems))
    if quantization == "bnb-4bit" and not next(model.parameters()).is_cuda:
        raise ConfigError(
            "bnb-4bit needs CUDA: bitsandbytes' kernel for the CPU repacks the weights at the first inference, and cannot "
            "be trained through after it. Take int8 or bnb-8bit, or put the model on a GPU first"
        )
    package = _imported(quantization)
    refuse_adapted(model)
    remember_fingerprint(model, base_fingerprint(model.named_parameters()))
    split_attention(model)
    names = (name for name, _ in model.named_modules())
    targets = resolve_targets(names, components, ["attention", "mlp"])
    _METHODS[quantization](package, model, [name for found in targets.values() for name in found])
    return model


def _imported(quantization: str) -> Any:
    package = _PACKAGES[quantization]
    try:
        return importlib.import_module(f"{package}.quantization" if package == "torchao" else package)
    except ImportError as error:
        raise ConfigError(
            f"quantization {quantization!r} needs {package}: pip install 'sam3-lora[quantization]' ({error})"
        ) from error


def _to_int8(torchao: Any, model: nn.Module, names: list[str]) -> None:
    chosen = set(names)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in chosen)


def _to_bnb_8bit(bnb: Any, model: nn.Module, names: list[str]) -> None:
    class Linear8bitOfRows(bnb.nn.Linear8bitLt):
        """The ViT's windows have four axes, for which bitsandbytes' CPU kernel looks up outliers on the wrong one."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows: torch.Tensor = super().forward(x.flatten(0, -2))
            return rows.unflatten(0, x.shape[:-1])

    for name in names:
        linear: Any = model.get_submodule(name)
        new = Linear8bitOfRows(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            has_fp16_weights=False,
            threshold=6.0,
        )
        weight = bnb.nn.Int8Params(_copied(linear.weight), requires_grad=False, has_fp16_weights=False)
        _exchange(model, name, new, weight)
    setattr(model, "is_loaded_in_8bit", True)  # noqa: B010  (PEFT asks for it; mypy takes it for a module)


def _to_bnb_4bit(bnb: Any, model: nn.Module, names: list[str]) -> None:
    for name in names:
        linear: Any = model.get_submodule(name)
        compute_dtype = torch.bfloat16 if linear.weight.is_cuda else torch.float32
        new = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, compute_dtype, quant_type="nf4"
        )
        weight = bnb.nn.Params4bit(_copied(linear.weight), requires_grad=False, quant_type="nf4")
        _exchange(model, name, new, weight)
    setattr(model, "is_loaded_in_4bit", True)  # noqa: B010


def _copied(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().cpu().clone()


def _exchange(model: nn.Module, name: str, new: Any, weight: Any) -> None:
    """Put a quantised layer in the place of a Linear; bitsandbytes quantises when it moves it to the device."""
    linear: Any = model.get_submodule(name)
    new.weight, new.bias = weight, linear.bias
    model.set_submodule(name, new.to(linear.weight.device).train(linear.training))


_METHODS: Mapping[str, Callable[[Any, nn.Module, list[str]], None]] = MappingProxyType(
    {"int8": _to_int8, "bnb-8bit": _to_bnb_8bit, "bnb-4bit": _to_bnb_4bit}
)
