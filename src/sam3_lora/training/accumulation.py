"""The official losses, such that a batch in several forward passes and processes has the gradient of the same batch in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sam3_lora.base.cpu import provide_triton

provide_triton()

from sam3.train.loss.loss_fns import CORE_LOSS_KEY, IABCEMdetr, Masks, SemanticSegCriterion  # noqa: E402
from sam3.train.loss.sam3_loss import Sam3LossWrapper  # noqa: E402

_EPSILON = 1e-6  # SemanticSegCriterion adds it to the number of prompts that it divides by


@dataclass(frozen=True)
class _Whole:
    """What the terms of a whole batch, in all passes and processes, are divided by on this process.

    DistributedDataParallel takes the mean over processes: each divides by its even share of all counts.
    """

    passes: int
    num_boxes: Any  # as the official wrapper gives it, but exact for fewer objects than processes
    prompts: float
    prompts_with_masks: Tensor | float  # with the official epsilon
    all_prompts: int  # not shared between the processes


class AccumulatedLoss(Sam3LossWrapper):
    """The official loss wrapper, whose terms can be divided by the counts of a whole accumulated batch.

    The official trainer adds up the losses of the forward passes of a step, each divided by the objects and prompts of
    its own images: a pass with one object in it weighs as much as one with fifty. After :meth:`expect` every term of a
    pass is its share of the term that all images would give in one pass, so that the gradients add up to that one's.
    The values that are returned, and logged, are multiplied by the number of passes: their mean is the big batch's.
    So it is with several processes where ``normalization`` is ``global``; the official wrapper counts objects over all of them,
    but prompts, and their square root, on each alone.

    Not equal are terms that draw random numbers: ``Masks`` with ``num_sample_points`` samples other points. Counts of
    unshipped settings (``weak_loss`` with prompts that are not exhaustive, ``downsample`` of semantic masks so small
    that they vanish) are taken as if all counted.

    Args:
        masks: Whether the masks are trained; without, ``Masks`` and ``loss_fn_semantic_seg`` are left out.
        official: The keywords of :class:`sam3.train.loss.sam3_loss.Sam3LossWrapper`.
    """

    def __init__(self, *, masks: bool = True, **official: Any) -> None:
        if not masks:
            terms = [term for term in official["loss_fns_find"] if not isinstance(term, Masks)]
            official |= {"loss_fns_find": terms, "loss_fn_semantic_seg": None}
        super().__init__(**official)
        self._whole: _Whole | None = None
        for term in self.terms:
            term.register_forward_hook(self._share_of_whole, with_kwargs=True)

    @property
    def terms(self) -> list[Any]:
        """The official losses that this one adds up."""
        return [*self.loss_fns_find, *filter(None, [self.loss_fn_semantic_seg])]

    def expect(self, targets: Sequence[Any], device: torch.device) -> None:
        """Divide from now on by the counts of all of these targets.

        All processes must call it at the same time: the official ``normalization: global`` asks them all.

        Args:
            targets: The official ``BatchedFindTarget`` of each forward pass to come.
            device: Where processes exchange numbers.
        """
        self._whole = None
        processes = torch.distributed.get_world_size() if self.normalization == "global" else 1
        if len(targets) < 2 and processes == 1:
            return
        counted = {
            "boxes": torch.cat([target.boxes.view(-1, 4) for target in targets]).to(device),
            "num_boxes": torch.cat([target.num_boxes for target in targets]).to(device),
        }
        with_masks: Any = 0
        if self.loss_fn_semantic_seg is not None:
            with_masks = sum(_with_masks(t.num_boxes, t.segments, t.semantic_segments) for t in targets)
        prompts = len(counted["num_boxes"])
        if processes > 1:
            own = torch.tensor([self._objects(counted), prompts, int(with_masks)], device=device)
            torch.distributed.all_reduce(own)
            objects, prompts, with_masks = own.tolist()
            num_boxes = torch.tensor(max(objects, 1) / processes, device=device)
        else:
            num_boxes = super()._get_num_boxes(counted)
        self._whole = _Whole(
            len(targets),
            num_boxes,
            prompts / processes,
            (int(with_masks) + _EPSILON) / processes,
            prompts,
        )

    def _objects(self, counted: Mapping[str, Tensor]) -> int:
        if self.normalize_by_valid_object_num:
            return int((counted["boxes"][:, 2:] > 0).all(dim=-1).sum())
        return int(counted["num_boxes"].sum())

    def forward(self, find_stages: Any, find_targets: Any) -> dict[str, Any]:
        losses: dict[str, Any] = super().forward(find_stages, find_targets)
        if self._whole is not None and self.scale_by_find_batch_size:
            own = len(find_targets[0]["num_boxes"])
            losses[CORE_LOSS_KEY] = losses[CORE_LOSS_KEY] * (self._whole.all_prompts / own) ** 0.5
        return losses

    def _get_num_boxes(self, targets: Mapping[str, Any]) -> Any:
        return super()._get_num_boxes(targets) if self._whole is None else self._whole.num_boxes

    def _share_of_whole(
        self, term: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], losses: dict[str, Any]
    ) -> dict[str, Any]:
        if self._whole is None or len(losses) == 1:  # one: an auxiliary output that the term leaves out
            return losses
        targets = kwargs["targets"] if "targets" in kwargs else args[1]
        for name in term.weight_dict:
            share = losses[name] * _share(term, name, targets, self._whole)
            losses[name] = share + (self._whole.passes - 1) * share.detach()
        losses[CORE_LOSS_KEY] = term.reduce_loss(losses)
        return losses


def _share(term: nn.Module, name: str, targets: Mapping[str, Any], whole: _Whole) -> Any:
    """Return what a term's own divisor is of that of the whole."""
    prompts = len(targets["num_boxes"]) / whole.prompts
    if isinstance(term, IABCEMdetr):
        return prompts
    if not isinstance(term, SemanticSegCriterion):
        return 1  # of boxes and masks, which are divided by num_boxes
    if not term.presence_head or name == "loss_semantic_presence":
        return prompts
    own = _with_masks(targets["num_boxes"], targets["masks"], targets["semantic_masks"])
    return (own + _EPSILON) / whole.prompts_with_masks


def _with_masks(num_boxes: Tensor, masks: Tensor | None, semantic_masks: Tensor | None) -> Tensor:
    """Return how many prompts have a pixel to find, as ``SemanticSegCriterion`` counts them."""
    if semantic_masks is not None and len(semantic_masks):
        return semantic_masks.flatten(1).any(1).sum()
    found = torch.zeros_like(num_boxes, dtype=torch.bool)
    if masks is not None and len(masks):
        prompt_of_mask = torch.arange(len(num_boxes), device=num_boxes.device).repeat_interleave(num_boxes)
        found[prompt_of_mask[masks.flatten(1).any(1)]] = True
    return found.sum()
