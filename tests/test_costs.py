"""One real step of the full-size model, counted on fake tensors, and the formulas that estimate it."""

import pytest
import torch
import torch.nn.functional as F

from sam3_lora import estimate
from sam3_lora.costs.cuda import as_on_cuda
from sam3_lora.costs.step import FullSizeStep, count_training_step, spread_objects
from sam3_lora.errors import ConfigError
from sam3_lora.estimation.coefficients import counted_formulas

COUNT_AGAIN = "what a step costs has changed; count again: python benchmarks/count.py --again"


@pytest.fixture(scope="module")
def minimal():
    return FullSizeStep("minimal")


def assert_as_estimated(step, tolerance, **size):
    preset = size.pop("preset")
    found = estimate(preset, **size)
    besides = found.breakdown["optimizer"] + found.breakdown["gradients"]
    assert step.peak_bytes + besides == pytest.approx(found.peak_bytes, rel=tolerance), COUNT_AGAIN
    assert step.flops == pytest.approx(found.step_flops, rel=tolerance), COUNT_AGAIN


def test_a_step_of_minimal_costs_what_its_estimate_says(minimal):
    step = minimal.count(prompts=1, objects=5, batch=1)
    assert_as_estimated(step, 0.02, preset="minimal", prompts=1, objects=5, batch=1)
    assert minimal.trainable_parameters() == estimate("minimal").trainable_parameters
    # The trunk is frozen and keeps nothing, its backward does not run, and every byte has a part.
    assert step.parts["vision_encoder"].forward_bytes == 0
    assert step.parts["vision_encoder"].flops == pytest.approx(5.4e12, rel=0.01)
    assert sum(part.flops for part in step.parts.values()) == step.flops
    assert sum(part.peak_bytes for part in step.parts.values()) == step.peak_bytes
    assert sum(part.forward_bytes for part in step.parts.values()) == step.forward_bytes


def test_a_step_of_minimal_with_more_prompts_costs_what_its_estimate_says(minimal):
    step = minimal.count(prompts=4, objects=20, batch=1)
    assert_as_estimated(step, 0.02, preset="minimal", prompts=4, objects=20, batch=1)


@pytest.mark.counts
@pytest.mark.parametrize(
    ("preset", "prompts", "objects", "batch"),
    [("minimal", 8, 30, 2), ("balanced", 2, 12, 1), ("balanced", 6, 9, 3)],
)
def test_estimates_of_steps_that_were_not_counted_are_within_3_percent(preset, prompts, objects, batch):
    assert (prompts, objects, batch) not in counted_formulas()["formulas"][preset]["shipped"].counted
    step = count_training_step(preset, prompts=prompts, objects=objects, batch=batch)
    assert_as_estimated(step, 0.03, preset=preset, prompts=prompts, objects=objects, batch=batch)


@pytest.fixture(scope="module")
def shipped_balanced():
    return count_training_step("balanced", prompts=4, objects=20)


@pytest.mark.counts
@pytest.mark.parametrize(
    ("lever", "off", "grows"),
    [
        ("bf16_base", False, "peak_bytes"),
        ("segmentation_chunk", None, "peak_bytes"),
        ("recompute_box_bias", False, "saved_bytes"),
        ("recompute_neck", False, "saved_bytes"),
        ("mask_loss_chunk", None, "saved_bytes"),
    ],
)
def test_a_lever_that_is_off_changes_the_count(shipped_balanced, lever, off, grows):
    step = count_training_step("balanced", prompts=4, objects=20, config={f"memory.{lever}": off})
    assert getattr(step, grows) > 1.01 * getattr(shipped_balanced, grows)


@pytest.mark.counts
def test_frozen_parts_in_eval_mode_do_less(minimal):
    noisy = FullSizeStep("minimal", config={"memory.eval_frozen": False}).count()
    assert noisy.launches > minimal.count().launches + 50  # DropPath of 32 blocks


@pytest.mark.counts
def test_without_autocast_a_step_holds_more(minimal):
    assert count_training_step("minimal", amp=False).peak_bytes > 1.2 * minimal.count().peak_bytes


@pytest.mark.parametrize(
    ("prompts", "objects", "spread"),
    [(1, 5, [5]), (4, 5, [2, 1, 1, 1]), (3, 2, [1, 1, 0])],
)
def test_objects_are_spread_evenly_over_the_prompts(prompts, objects, spread):
    assert spread_objects(prompts, objects) == spread


@pytest.mark.parametrize("wrong", [{"prompts": 0}, {"objects": 0}, {"batch": 0}, {"objects": 201}])
def test_batches_that_cannot_be_are_refused(minimal, wrong):
    with pytest.raises(ConfigError, match=r"1 or more|200 objects at most"):
        minimal.count(**wrong)


def test_on_cuda_norms_come_out_of_autocast_in_fp32_and_everything_is_put_back():
    attention, autocast = F.scaled_dot_product_attention, torch.amp.autocast
    x = torch.randn(2, 8)
    with as_on_cuda(), torch.amp.autocast("cuda", dtype=torch.bfloat16):
        product = x @ x.T
        assert product.dtype == torch.bfloat16
        assert (
            F.layer_norm(product, (2,)).dtype
            == product.softmax(-1).dtype
            == product.sum().dtype
            == torch.float32
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.layer_norm(x @ x.T, (2,)).dtype == torch.bfloat16
    assert (F.scaled_dot_product_attention, torch.amp.autocast) == (attention, autocast)
