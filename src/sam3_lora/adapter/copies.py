"""Copies of a module tree that share what need not be copied: without weights, or around the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor


def without_weights(model: nn.Module) -> nn.Module:
    """Return a copy of the module tree with all parameters on the meta device, and plain Linears for quantised ones."""
    twin = copy_model(model, _on_meta)
    for name, module in model.named_modules():
        weight = None if isinstance(module, torch.jit.ScriptModule) else module._parameters.get("weight")
        if weight is not None and is_quantised(weight):
            twin.set_submodule(name, _plain_linear(module))
    return twin


def is_quantised(weight: torch.Tensor) -> bool:
    """Whether a weight is held in a class of its own, as bitsandbytes and torchao do."""
    return type(weight) not in (nn.Parameter, torch.Tensor, FakeTensor)


def _plain_linear(module: Any) -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)


def copy_model(model: nn.Module, parameter: Callable[[nn.Parameter], nn.Parameter]) -> nn.Module:
    """Return a copy of the module tree with each parameter passed through a function; other attributes are shared.

    ``copy.deepcopy`` would copy the buffers, the tokenizer and whatever a forward has cached.
    """
    copies: dict[nn.Module, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            return nn.Module()  # transforms of the tracker's images: no targets, and not copied this way
        if module not in copies:
            twin = copies[module] = module.__new__(type(module))
            # Hooks, buffers and what PEFT notes of its adapters are each module's own.
            twin.__dict__ = {n: _own(v, module, twin) for n, v in module.__dict__.items()}
            twin._parameters = {n: p if p is None else parameter(p) for n, p in module._parameters.items()}
            twin._modules = {n: m if m is None else copied(m) for n, m in module._modules.items()}
        return copies[module]

    return copied(model)


def _own(value: Any, module: nn.Module, twin: nn.Module) -> Any:
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, twin)
    return copy.copy(value) if isinstance(value, (dict, list, set)) else value


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    if is_quantised(parameter):
        return nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)


def cloned(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def in_same_memory(parameter: nn.Parameter) -> nn.Parameter:
    # A parameter of its own, because PEFT freezes what it wraps, and torch has other kernels for frozen attention.
    return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
