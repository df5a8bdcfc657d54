"""The segmentation head on a few prompts at a time: its features at the full 288 x 288 are the peak of a step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sam3_lora.base.cpu import provide_triton

provide_triton()

from sam3.model.maskformer_segmentation import MaskPredictor, UniversalSegmentationHead  # noqa: E402
from sam3.model.sam3_image import Sam3Image  # noqa: E402

_SEMANTIC = "semantic_seg_head"


class ChunkedSegmentationHead(UniversalSegmentationHead):
    """The official head in training on ``prompts_at_once`` prompts at a time, each time under one checkpoint.

    The backward computes the features of one chunk again before it goes on to the next. Where no gradient passes below
    the object queries there is little to save, and nothing is computed again.
    """

    prompts_at_once: int

    def forward(
        self,
        backbone_feats: list[Tensor],
        obj_queries: Tensor,
        image_ids: Tensor,
        encoder_hidden_states: Tensor | None = None,
        prompt: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor | None]:
        inputs = (encoder_hidden_states, prompt, prompt_mask)
        if not self.training or any(tensor is None for tensor in inputs):
            return self._run(backbone_feats, obj_queries, image_ids, *inputs, **kwargs)
        assert encoder_hidden_states is not None and prompt is not None and prompt_mask is not None
        saves = any(tensor.requires_grad for tensor in (*backbone_feats, encoder_hidden_states, prompt))
        saves = saves or any(parameter.requires_grad for parameter in self.parameters())
        parts = []
        for start in range(0, len(image_ids), self.prompts_at_once):
            rows = slice(start, start + self.prompts_at_once)
            arguments = (
                backbone_feats,
                obj_queries[:, rows],
                image_ids[rows],
                encoder_hidden_states[:, rows],
                prompt[:, rows],
                prompt_mask[rows],
            )
            run = self._run
            parts.append(checkpoint(run, *arguments, use_reentrant=False) if saves else run(*arguments))
        return {name: _joined([part.pop(name) for part in parts]) for name in list(parts[0])}

    def _run(self, *arguments: Any, **kwargs: Any) -> dict[str, Tensor | None]:
        try:
            outputs: dict[str, Tensor | None] = super().forward(*arguments, **kwargs)
            return outputs
        finally:
            self.__dict__.pop(_SEMANTIC, None)

    def _embed_pixels(self, *args: Any, **kwargs: Any) -> Tensor:
        pixels: Tensor = super()._embed_pixels(*args, **kwargs)
        if self.training:
            # Before the masks instead of after them, so that in the backward its fp32 gradient comes when theirs, for 400
            # queries, has gone. For the official call that follows, the result stands in front of the module.
            semantic = self.semantic_seg_head(pixels)
            self.__dict__[_SEMANTIC] = lambda _: semantic
        return pixels


class HalvedMaskPredictor(MaskPredictor):
    """The official predictor, which in training gives the masks of the one-to-one and of the one-to-many queries apart.

    As two slices of one tensor, 66 MB a prompt in bfloat16, each would get a gradient of that size, and so would their sum.
    """

    def forward(self, obj_queries: Tensor, pixel_embed: Tensor) -> Any:
        if not self.training or obj_queries.dim() != 3 or obj_queries.shape[1] % 2:
            return super().forward(obj_queries, pixel_embed)
        official = super().forward
        return _Halves(*(official(half, pixel_embed) for half in obj_queries.chunk(2, dim=1)))


class _Halves(NamedTuple):
    """Stands for the masks ``(P, Q, H, W)`` of all queries until ``Sam3Image`` takes its slices of them."""

    first: Tensor
    second: Tensor

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, tuple):
            return tuple.__getitem__(self, index)
        half = self.first.shape[1]
        for tensor, (start, stop) in zip(self, ((0, half), (half, 2 * half)), strict=True):
            if index[:1] == (slice(None),) and index[1:] and index[1].indices(2 * half) == (start, stop, 1):
                return tensor
        return torch.cat(list(self), dim=1)[index]


def chunk_segmentation(model: Sam3Image, prompts_at_once: int) -> None:
    """Let the segmentation head of a model, if it has one, take so many prompts at a time, in place.

    Raises:
        TypeError: If the head is of another class than that of SAM3's image model.
    """
    head = model.segmentation_head
    if head is None:
        return
    if not isinstance(head, UniversalSegmentationHead):
        raise TypeError(f"no chunks for a {type(head).__name__}")
    head.__class__ = ChunkedSegmentationHead
    head.prompts_at_once = prompts_at_once
    head.mask_predictor.__class__ = HalvedMaskPredictor
    head.act_ckpt = False
    model.use_act_checkpoint_seg_head = False


def _joined(parts: list[Any]) -> Any:
    """Join what the chunks gave for one name, along the prompts; the list is emptied, so that each goes when it can."""
    if parts[0] is None or len(parts) == 1:
        return parts[0]
    if not isinstance(parts[0], _Halves):
        return torch.cat(parts)
    first, second = (list(half) for half in zip(*parts, strict=True))
    parts.clear()
    joined = torch.cat(first)
    first.clear()
    return _Halves(joined, torch.cat(second))
