"""One forward of a model, by default the tiny one, on a fixed image, with words and a box as prompts, and what tests of
adapters do with it."""

import torch
from sam3.model.data_misc import FindStage

from sam3_lora.base.checkpoint import TINY
from sam3_lora.base.loading import load_base


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


def untouched() -> torch.nn.Module:
    """Return the tiny base as it is shipped."""
    return load_base("tiny", device="cpu")


def two_steps(adapted: torch.nn.Module, lr: float) -> torch.nn.Module:
    """Train an adapter for two steps on the squares of the outputs, and return it in eval mode."""
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=lr)
    for _ in range(2):
        optimizer.zero_grad()
        outputs = forward_with_gradients(adapted.get_base_model())
        sum(output.square().mean() for output in outputs.values()).backward()
        optimizer.step()
    return adapted.eval()


def assert_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    """Compare outputs; the tolerance is relative to the largest value of each, where that is above 1."""
    for name, tensor in expected.items():
        difference = (found[name] - tensor).abs().max()
        assert difference <= tolerance * tensor.abs().max().clamp(min=1), f"{name}: {difference:.1e}"


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
