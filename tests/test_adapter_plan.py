"""A plan has the numbers that the real adapter has, and its advice holds in a real training step."""

import re

import pytest
import torch
from official_step import backward, write_images

from sam3_lora.adapter import (
    WEIGHTS_FILE,
    adapted_modules,
    count_parameters,
    get_peft_sam3,
    save_adapter,
)
from sam3_lora.adapter_plan import plan_adapter
from sam3_lora.base.loading import load_base
from sam3_lora.components import COMPONENTS, KINDS, SOMETIMES_IDLE, why_excluded
from sam3_lora.errors import CheckpointError, ConfigError, TargetError
from sam3_lora.presets import PRESETS, Preset

torch.set_num_threads(1)

EVERYTHING = Preset("all of the map", dict.fromkeys(COMPONENTS, 1), KINDS)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return {
        "with objects": write_images(folder / "with", with_objects=True),
        "without objects": write_images(folder / "without", with_objects=False),
    }


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        *(pytest.param(preset, {}, id=preset) for preset in PRESETS),
        pytest.param(EVERYTHING, {}, id="everything"),
        pytest.param("minimal", {"use_dora": True}, id="DoRA"),
        pytest.param("minimal", {"lora_bias": True}, id="bias in B"),
        pytest.param("minimal", {"bias": "all"}, id="all biases"),
        pytest.param("minimal", {"modules_to_save": ["dot_prod_scoring"]}, id="a module trained whole"),
        pytest.param("balanced", {"r": {"vision_encoder": 3}, "lora_alpha": 5}, id="other numbers"),
        pytest.param("minimal", {"rank_pattern": {"linear1": 100}}, id="a pattern"),
    ],
)
def test_a_plan_counts_what_the_real_adapter_holds_to_the_byte(preset, overrides, tmp_path):
    plan = plan_adapter(preset, base="tiny", **overrides)
    model = get_peft_sam3(load_base("tiny", device="cpu"), preset, **overrides)
    file = save_adapter(model, tmp_path / "adapter") / WEIGHTS_FILE
    assert plan.adapter_bytes == file.stat().st_size
    assert (plan.trainable_parameters, plan.total_parameters) == count_parameters(model)
    assert plan.modules == sum(part.modules for part in plan.parts) == len(adapted_modules(model))
    assert plan.preset == (preset if isinstance(preset, str) else None)
    in_parts = sum(part.trainable_parameters for part in plan.parts)
    assert (in_parts < plan.trainable_parameters) == ("bias" in overrides or "modules_to_save" in overrides)


def test_the_plan_of_balanced_on_the_full_size_model():
    plan = plan_adapter("balanced").as_dict()
    assert plan["trainable_parameters"] == 4_128_768
    assert plan["total_parameters"] == 840_509_750 + 4_128_768
    assert plan["share"] == pytest.approx(0.004888, rel=1e-3)
    assert (plan["modules"], plan["adapter_bytes"]) == (280, 16_602_784)
    assert plan["components"] == {
        "vision_encoder": {"modules": 64, "trainable_parameters": 1_572_864},
        "text_encoder": {"modules": 96, "trainable_parameters": 1_572_864},
        "detr_encoder": {"modules": 48, "trainable_parameters": 393_216},
        "detr_decoder": {"modules": 72, "trainable_parameters": 589_824},
    }
    assert plan["parts"][0] == {
        "component": "vision_encoder",
        "kind": "attention",
        "modules": 64,
        "r": 8,
        "lora_alpha": 16,
        "trainable_parameters": 1_572_864,
        "example": "backbone.vision_backbone.trunk.blocks.0.attn.qkv",
    }
    assert len(plan["dead_modules"]) == 9
    assert all(why_excluded(name) == reason for name, reason in plan["dead_modules"].items())


def test_a_strength_that_differs_within_a_kind_is_a_part_of_its_own():
    parts = plan_adapter("minimal", base="tiny", kinds=["mlp"], rank_pattern={"linear1": 2}).parts
    assert [(part.modules, part.r, part.lora_alpha) for part in parts] == [(3, 2, 4), (3, 8, 16)]


def test_parts_come_in_the_order_of_the_component_map():
    parts = plan_adapter(EVERYTHING, base="tiny").parts
    assert list(dict.fromkeys(part.component for part in parts)) == list(COMPONENTS)


@pytest.mark.parametrize(
    ("base", "overrides", "error", "problem"),
    [
        pytest.param("tinny", {}, CheckpointError, "did you mean 'tiny'", id="unknown base"),
        pytest.param("no/such/file.pt", {}, CheckpointError, "no checkpoint at", id="missing file"),
        pytest.param("tiny", {"rank": 4}, ConfigError, "it is r here", id="name of the seed"),
        pytest.param(
            "tiny", {"target_modules": ["conv_layers.2"]}, TargetError, "three levels", id="dead module"
        ),
    ],
)
def test_what_could_not_be_made_is_refused_in_the_plan(base, overrides, error, problem):
    with pytest.raises(error, match=problem):
        plan_adapter("minimal", base=base, **overrides)


@pytest.mark.parametrize("images", ["with objects", "without objects"])
@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        pytest.param(EVERYTHING, {}, id="everything"),
        pytest.param(EVERYTHING, {"use_dora": True}, id="DoRA"),
        pytest.param("minimal", {"bias": "all"}, id="all biases"),
        pytest.param("minimal", {"modules_to_save": ["pixel_decoder"]}, id="pixel decoder"),
        pytest.param("minimal", {"modules_to_save": ["language_backbone"]}, id="text encoder"),
        pytest.param("minimal", {"modules_to_save": ["geometry_encoder"]}, id="geometry encoder"),
    ],
)
def test_the_advice_for_ddp_is_that_of_a_real_step(preset, overrides, images, datasets):
    model = get_peft_sam3(load_base("tiny", device="cpu", eval_mode=False), preset, **overrides)
    inner = model.get_base_model().train()
    backward(inner, datasets[images])
    unused = [name for name, p in inner.named_parameters() if p.requires_grad and p.grad is None]
    plan = plan_adapter(preset, base="tiny", **overrides)
    assert plan.find_unused_parameters == bool(unused), unused
    if unused:
        assert plan.ddp_reason.startswith("no step uses ")
        assert ("more" in plan.ddp_reason) == (len(unused) > 1)


def test_a_plan_names_the_parts_whose_gradient_is_zero_in_some_steps(datasets):
    model = get_peft_sam3(load_base("tiny", device="cpu", eval_mode=False), EVERYTHING)
    inner = model.get_base_model().train()
    backward(inner, datasets["without objects"])
    idle = [
        name.partition(".lora_")[0]
        for name, p in inner.named_parameters()
        if "lora_B" in name and not p.grad.any()
    ]
    assert any("boxes_pool_project" in name for name in idle)
    assert any("segmentation_head" in name for name in idle)
    assert not [name for name in idle if not any(re.fullmatch(p, name) for p in SOMETIMES_IDLE)]
    assert plan_adapter(EVERYTHING, base="tiny").notes == tuple(SOMETIMES_IDLE.values())
    assert plan_adapter("text", base="tiny").notes == ()
