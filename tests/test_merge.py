"""Merging an adapter into the base and taking it out again, for every kind of module, and back to official names."""

import copy

import pytest
import torch
from tiny_forward import forward

from sam3_lora.adapter import adapted_modules, get_peft_sam3, load_adapter, save_adapter
from sam3_lora.attention import fuse_attention, split_attention
from sam3_lora.base.loading import load_base
from sam3_lora.components import COMPONENTS, KINDS, component_of

torch.set_num_threads(1)

EVERYTHING = {"components": list(COMPONENTS), "kinds": list(KINDS)}
VARIANTS = [
    pytest.param({}, id="LoRA"),
    pytest.param({"use_rslora": True}, id="rank-stabilised"),
    pytest.param({"use_dora": True}, id="DoRA"),
    pytest.param({"lora_bias": True}, id="bias in B"),
]


def trained(**overrides):
    """Return the tiny model with an adapter everywhere, as if trained: a change of 1 % to 10 % of each weight."""
    adapted = get_peft_sam3(load_base("tiny", device="cpu"), **EVERYTHING, r=4, **overrides)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return adapted


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = tensor.abs().max().clamp(min=1)
        assert (found[name] - tensor).abs().max() <= tolerance * scale, name


@pytest.fixture(scope="module")
def plain():
    return trained()


@pytest.mark.parametrize("overrides", VARIANTS)
def test_the_merged_model_gives_the_outputs_of_the_adapted_one(overrides):
    adapted = trained(**overrides)
    expected, base = forward(adapted), forward(load_base("tiny", device="cpu"))
    merged = adapted.merge_and_unload()
    assert adapted_modules(merged) == []
    assert_close(forward(merged), expected)
    assert sum((expected[name] - base[name]).abs().max() > 1e-2 for name in base) >= 4  # of 5


@pytest.mark.parametrize("overrides", VARIANTS)
def test_unmerging_gives_the_base_weights_back(overrides):
    adapted = trained(**overrides)
    before, outputs = weights(adapted), forward(adapted)
    adapted.merge_adapter()
    merged = weights(adapted)
    adapted.unmerge_adapter()
    assert_close(weights(adapted), before)
    assert_close(forward(adapted), outputs)
    assert sum(not torch.equal(merged[name], before[name]) for name in before) >= 138


@pytest.mark.parametrize(
    ("component", "kind"),
    sorted({component_of(name) for name in adapted_modules(get_peft_sam3(load_base("tiny"), **EVERYTHING))}),
)
def test_the_merged_weight_is_w_plus_alpha_over_r_times_b_a(plain, component, kind):
    adapted = copy.deepcopy(plain)
    inner = adapted.get_base_model()
    expected = {}
    for name in adapted_modules(adapted):
        if component_of(name) == (component, kind):
            layer = inner.get_submodule(name)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            change = 8 / 4 * (b.flatten(1).double() @ a.flatten(1).double())
            expected[name] = layer.base_layer.weight.double() + change.view_as(layer.base_layer.weight)
    merged = adapted.merge_and_unload()
    assert expected
    for name, weight in expected.items():
        assert (merged.get_submodule(name).weight - weight).abs().max() <= 1e-5, name


def test_a_merged_and_fused_model_has_the_official_keys_and_shapes_and_the_adapted_outputs(plain):
    expected = forward(plain)
    official = load_base("tiny", device="cpu")
    fused = fuse_attention(copy.deepcopy(plain).merge_and_unload())
    found, wanted = fused.state_dict(), official.state_dict()
    assert list(found) == list(wanted)
    assert [name for name in wanted if found[name].shape != wanted[name].shape] == []
    official.load_state_dict(found)  # into an unmodified official model, strictly
    assert_close(forward(official), expected)


def test_an_adapter_that_was_never_trained_leaves_the_official_bits(tmp_path):
    official = load_base("tiny", device="cpu").state_dict()
    folder = save_adapter(get_peft_sam3(load_base("tiny", device="cpu"), **EVERYTHING), tmp_path / "fresh")
    adapted = load_adapter(load_base("tiny", device="cpu"), folder)
    fused = fuse_attention(adapted.merge_and_unload()).state_dict()
    assert [name for name in official if not torch.equal(fused[name], official[name])] == []


def test_taking_an_adapter_out_and_fusing_leaves_the_official_bits(plain):
    official = load_base("tiny", device="cpu").state_dict()
    fused = fuse_attention(copy.deepcopy(plain).unload()).state_dict()
    assert list(fused) == list(official)
    assert [name for name in official if not torch.equal(fused[name], official[name])] == []


def test_an_adapter_loaded_into_a_split_or_an_official_base_is_the_same(plain, tmp_path):
    folder = save_adapter(plain, tmp_path / "adapter")
    outputs = [
        forward(load_adapter(prepare(load_base("tiny", device="cpu")), folder))
        for prepare in (split_attention, lambda model: model)
    ]
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])
