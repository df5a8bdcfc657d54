"""The official mask loss on a few matched masks at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sam3_lora.base.cpu import provide_triton

provide_triton()

from sam3.train.loss.loss_fns import Masks, dice_loss, sigmoid_focal_loss  # noqa: E402
from sam3.train.loss.mask_sampling import (  # noqa: E402
    calculate_uncertainty,
    get_uncertain_point_coords_with_randomness,
    point_sample,
)

_NAMES = ("loss_mask", "loss_dice")


class ChunkedMasks(Masks):
    """The official mask loss, ``chunk`` matched masks at a time, so that each annotated object costs little memory.

    Over all pixels, predictions are enlarged to the image and compared with their objects under an activation
    checkpoint: the losses and gradients are the official ones up to the order of a sum. With ``num_sample_points`` it is
    the official loss at sampled points, which are the same for the same random state, but the objects are read as the
    booleans they are. That one is another loss than the one over all pixels.

    Args:
        chunk: Matched masks at a time; each object has up to 5. ``None`` is the official computation.
        official: The keywords of :class:`sam3.train.loss.loss_fns.Masks`.
    """

    def __init__(self, *, chunk: int | None = None, **official: Any) -> None:
        super().__init__(**official)
        self.chunk = chunk

    def get_loss(
        self,
        outputs: Mapping[str, Any],
        targets: Mapping[str, Any],
        indices: tuple[Tensor, Tensor, Tensor | None],
        num_boxes: Tensor,
    ) -> dict[str, Tensor]:
        masks = targets["masks"]
        if self.chunk is None or masks is None or outputs.get("is_video_grounding_batch", False):
            official: dict[str, Tensor] = super().get_loss(outputs, targets, indices, num_boxes)
            return official
        valid, objects = targets["is_valid_mask"], indices[2]
        if objects is None:
            objects = torch.arange(len(masks), device=masks.device)
        else:
            valid = valid[objects]
        prompts, queries, objects = (index.to(valid.device)[valid] for index in (*indices[:2], objects))
        predicted = outputs["pred_masks"][(prompts, queries)]
        if not len(objects):
            return {name: predicted.float().sum() * 0 for name in _NAMES}
        loss = self._of_all_pixels if self.num_sample_points is None else self._of_points
        return loss(predicted, masks, objects, num_boxes)

    def _of_all_pixels(
        self, predicted: Tensor, masks: Tensor, objects: Tensor, num_boxes: Tensor
    ) -> dict[str, Tensor]:
        official = super().get_loss

        def loss(some: Tensor, own: Tensor) -> tuple[Tensor, ...]:
            rows = torch.arange(len(some), device=some.device)
            found = official(
                {"pred_masks": some[None]},
                {"masks": masks[own], "is_valid_mask": slice(None)},
                (torch.zeros_like(rows), rows, None),
                num_boxes,
            )
            return tuple(found[name] for name in _NAMES)

        parts = [
            checkpoint(loss, predicted[rows], objects[rows], use_reentrant=False, preserve_rng_state=False)
            for rows in self._chunks(len(objects))
        ]
        return dict(
            zip(_NAMES, (torch.stack(values).sum() for values in zip(*parts, strict=True)), strict=True)
        )

    def _of_points(
        self, predicted: Tensor, masks: Tensor, objects: Tensor, num_boxes: Tensor
    ) -> dict[str, Tensor]:
        planes = predicted[:, None]
        with torch.no_grad():
            # For all at once, since the random numbers of CUDA depend on how many are drawn.
            points = get_uncertain_point_coords_with_randomness(
                planes,
                calculate_uncertainty,
                self.num_sample_points,
                self.oversample_ratio,
                self.importance_sample_ratio,
            )
            wanted = torch.cat(
                [
                    _at(masks[objects[rows]][:, None].to(planes), points[rows])
                    for rows in self._chunks(len(objects))
                ]
            )
        found = _at(planes, points)
        focal = {"alpha": self.focal_alpha, "gamma": self.focal_gamma}
        return {
            "loss_mask": sigmoid_focal_loss(found, wanted, num_boxes, **focal),
            "loss_dice": dice_loss(found, wanted, num_boxes),
        }

    def _chunks(self, length: int) -> Iterator[slice]:
        assert self.chunk is not None
        return (slice(start, start + self.chunk) for start in range(0, length, self.chunk))


def _at(planes: Tensor, points: Tensor) -> Tensor:
    """Return the values ``(N, P)`` of planes ``(N, 1, H, W)`` at points ``(N, P, 2)``, x and y from 0 to 1."""
    values: Tensor = point_sample(planes, points, align_corners=False)
    return values.squeeze(1)
