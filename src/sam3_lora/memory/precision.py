"""Frozen weights of matrix products and convolutions as bfloat16, which autocast makes of them at every use."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from sam3_lora.adapter.copies import is_quantised

_PRODUCTS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
# sam3 turns CUDA's autocast off in the FFN of the DETR decoder: its weights are used as they are.
_OUTSIDE_AUTOCAST = r"transformer\.decoder\.layers\.\d+\.linear[12](\..+)?"


def hold_frozen_in_bf16(model: nn.Module) -> int:
    """Cast what autocast would cast anyway, in place, and return the bytes that are free now.

    Under bfloat16 autocast the outputs keep every bit. Without autocast these layers can no longer take fp32 inputs.
    Norms, embeddings, position tables, whatever is trained, quantised weights, the weights below DoRA, whose norm is
    taken in fp32, and the FFN of the decoder stay as they are.
    """
    freed = 0
    for module in _casted_by_autocast(model):
        for parameter in (module.weight, module.bias):
            if parameter is not None and not parameter.requires_grad and parameter.dtype == torch.float32:
                parameter.data = parameter.data.to(torch.bfloat16)
                freed += parameter.nbytes
    return freed


def _casted_by_autocast(model: nn.Module) -> Iterator[nn.Linear | nn.Conv2d | nn.ConvTranspose2d]:
    with_dora = {
        name
        for name, module in model.named_modules()
        if len(getattr(module, "lora_magnitude_vector", ()) or ())
    }
    for name, module in model.named_modules():
        if not isinstance(module, _PRODUCTS) or is_quantised(module.weight):
            continue
        if ".lora_" in name or name.removesuffix(".base_layer") in with_dora:
            continue
        if re.fullmatch(_OUTSIDE_AUTOCAST, name) is None:
            yield module
