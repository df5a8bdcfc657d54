"""The neck between image encoder and DETR: its activations are made again in the backward, its position tables each step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sam3_lora.base.cpu import provide_triton

provide_triton()

from sam3.model.position_encoding import PositionEmbeddingSine  # noqa: E402
from sam3.model.sam3_image import Sam3Image  # noqa: E402


class RecomputedLevel(nn.Sequential):
    """The layers of one level of the neck, in training under an activation checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        run: Any = super().forward
        trained = x.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        result: Tensor = checkpoint(run, x, use_reentrant=False) if self.training and trained else run(x)
        return result


def recompute_neck(model: Sam3Image) -> None:
    """Keep neither the activations of the neck between forward and backward nor its position tables between steps, in place.

    The tables of the 1008 px model take 0.11 GB as they are cached, and only the one of 72 x 72 is ever read.
    """
    neck = model.backbone.vision_backbone
    for level in neck.convs:
        level.__class__ = RecomputedLevel
    neck.position_encoding.register_forward_hook(_forget_tables)


def _forget_tables(module: PositionEmbeddingSine, args: Any, output: Any) -> None:
    if module.training:
        module.cache.clear()
