"""The full-size architecture with random weights at its own resolution. Minutes and 8 GB: ``make test-full``."""

import gc

import pytest
import torch
from tiny_forward import forward

from sam3_lora.adapter import adapted_modules, count_parameters, get_peft_sam3
from sam3_lora.attention import split_attention
from sam3_lora.base.checkpoint import FULL_SIZE
from sam3_lora.base.loading import load_base

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.fixture(scope="module")
def split_base():
    """The random model after the split, with its outputs before and after."""
    torch.set_num_threads(2)
    model = load_base("random", device="cpu")
    before = forward(model, FULL_SIZE.resolution)
    split_attention(model)
    after = forward(model, FULL_SIZE.resolution)
    yield model, before, after
    del model
    gc.collect()
    torch.set_num_threads(1)


def test_the_whole_model_gives_the_same_outputs_after_the_split(split_base):
    _, before, after = split_base
    assert all(torch.isfinite(tensor).all() for tensor in before.values())
    assert largest_difference(before["pred_logits"], after["pred_logits"]) <= 1e-5
    assert largest_difference(before["pred_boxes"], after["pred_boxes"]) <= 1e-5
    for name in ("pred_masks", "semantic_seg"):
        assert largest_difference(before[name], after[name]) <= 1e-5 * before[name].abs().max().item()


@pytest.mark.parametrize(
    ("preset", "trainable", "modules"),
    [("minimal", 516_096, 84), ("balanced", 4_128_768, 280), ("full", 14_893_056, 416)],
)
def test_a_fresh_adapter_of_each_preset_changes_nothing(split_base, preset, trainable, modules):
    model, _, after = split_base
    adapted = get_peft_sam3(model, preset=preset)
    try:
        assert count_parameters(adapted).trainable == trainable
        assert len(adapted_modules(adapted)) == modules
        outputs = forward(adapted.get_base_model(), FULL_SIZE.resolution)
        assert all(torch.equal(outputs[name], after[name]) for name in after)
    finally:
        adapted.unload()
