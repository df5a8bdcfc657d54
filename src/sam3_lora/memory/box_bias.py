"""The decoder's box position bias, made inside the checkpoint of each layer instead of kept as its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sam3_lora.base.cpu import provide_triton

provide_triton()

from sam3.model.decoder import TransformerDecoder  # noqa: E402
from sam3.model.sam3_image import Sam3Image  # noqa: E402


class RecomputingDecoder(TransformerDecoder):
    """The official decoder, which in training hands each layer the promise of its bias: 33 MB a prompt and layer in bfloat16.

    A hook before the layer, inside of its checkpoint, makes the bias.
    """

    def _get_rpb_matrix(self, reference_boxes: Tensor, feat_size: tuple[int, int]) -> Any:
        official: Any = super()._get_rpb_matrix
        if not self.training:
            return official(reference_boxes, feat_size)
        size_hw = (int(feat_size[0]), int(feat_size[1]))  # tensors: now, not once more in the backward
        return _Promise(lambda: official(reference_boxes, size_hw))


class _Promise:
    """Stands for a tensor where the decoder flattens it and passes it on."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make = make

    def flatten(self, start_dim: int, end_dim: int) -> _Promise:
        return _Promise(lambda: self.make().flatten(start_dim, end_dim))


def recompute_box_bias(model: Sam3Image) -> None:
    """Let the decoder of a model make its box position bias where it is used, in place."""
    decoder = model.transformer.decoder
    decoder.__class__ = RecomputingDecoder
    for layer in decoder.layers:
        layer.register_forward_pre_hook(_keep_promises, with_kwargs=True)


def _keep_promises(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(map(_kept, args)), {name: _kept(value) for name, value in kwargs.items()}


def _kept(value: Any) -> Any:
    return value.make() if isinstance(value, _Promise) else value
