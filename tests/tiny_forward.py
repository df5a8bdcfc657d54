"""One forward of a model, by default the tiny one, on a fixed image, with words and a box as prompts."""

import torch
from sam3.model.data_misc import FindStage

from sam3_lora.base.checkpoint import TINY


def forward(model: torch.nn.Module, resolution: int = TINY.resolution) -> dict[str, torch.Tensor]:
    """Return the raw outputs of the model in its own mode, without gradients."""
    with torch.no_grad():
        return forward_with_gradients(model, resolution)


def forward_with_gradients(
    model: torch.nn.Module, resolution: int = TINY.resolution
) -> dict[str, torch.Tensor]:
    """Return the raw outputs of the model in its own mode, attached to its parameters."""
    size = (1, 3, resolution, resolution)
    image = torch.rand(size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    backbone_out = model.backbone.forward_image(image)
    backbone_out.update(model.backbone.forward_text(["a red circle"], device="cpu"))
    prompt = model._get_dummy_prompt()
    prompt.append_boxes(torch.tensor([[[0.4, 0.5, 0.3, 0.2]]]), torch.ones(1, 1, dtype=torch.bool))
    out = model.forward_grounding(
        backbone_out=backbone_out,
        find_input=_one_image_one_prompt(),
        geometric_prompt=prompt,
        find_target=None,
    )
    names = ("pred_logits", "pred_boxes", "pred_masks", "semantic_seg", "presence_logit_dec")
    return {name: out[name] for name in names}


def _one_image_one_prompt() -> FindStage:
    return FindStage(
        img_ids=torch.tensor([0]),
        text_ids=torch.tensor([0]),
        input_boxes=None,
        input_boxes_mask=None,
        input_boxes_label=None,
        input_points=None,
        input_points_mask=None,
    )
