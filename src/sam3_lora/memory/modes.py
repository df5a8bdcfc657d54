"""Parts that are not trained stay in eval mode: no noise in them, and no activation checkpoints that keep nothing."""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType

from torch import nn

from sam3_lora.attention import SplitAttention

# Their input is the batch. No gradient passes through them, so that the whole module can be in eval mode.
_SOURCES = ("backbone.vision_backbone.trunk", "backbone.language_backbone")
# A gradient may pass through these, which need the checkpoints of training mode; the DETR does other things in it too.
_PASSED_THROUGH = (
    "geometry_encoder",
    "transformer.encoder",
    "transformer.decoder",
    "segmentation_head",
    "dot_prod_scoring",
)
_NOISE = (nn.modules.dropout._DropoutNd, SplitAttention, nn.MultiheadAttention)


def keep_frozen_in_eval(model: nn.Module) -> list[str]:
    """Keep every part without trainable parameters in eval mode, in place, and return the names of these parts.

    ``train()`` of the model and of any module around them leaves them there. Of parts that a gradient may pass through
    only what makes noise is held: dropout, DropPath and the dropout of attention.
    """
    frozen = []
    for name in (*_SOURCES, *_PASSED_THROUGH):
        part = dict(model.named_modules()).get(name)
        if part is None or any(parameter.requires_grad for parameter in part.parameters()):
            continue
        frozen.append(name)
        for module in [part] if name in _SOURCES else _noise_of(part):
            _hold(module)
    return frozen


def makes_noise(module: nn.Module) -> bool:
    """Return whether a module draws random numbers in training mode: dropout, DropPath, attention with dropout."""
    return isinstance(module, _NOISE) or type(module).__name__ == "DropPath"


def _noise_of(part: nn.Module) -> Iterator[nn.Module]:
    return (module for module in part.modules() if makes_noise(module))


def _hold(module: nn.Module) -> None:
    setattr(module, "train", MethodType(_stay_in_eval, module))  # noqa: B010  (mypy takes it for a module)
    module.train()


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return type(module).train(module, False)
