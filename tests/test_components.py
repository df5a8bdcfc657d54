import itertools
import re

import pytest
from torch import nn

from sam3_lora.attention import split_attention
from sam3_lora.base.official import build_meta_sam3
from sam3_lora.base.tiny import build_tiny_sam3
from sam3_lora.components import (
    COMPONENTS,
    DEAD_MODULES,
    KINDS,
    PATTERNS,
    UNSUPPORTED_MODULES,
    component_of,
    resolve_targets,
    why_excluded,
)
from sam3_lora.errors import ConfigError, TargetError

# Modules that LoRA can act on in the full-size image model of sam3 0.1.4, dead ones left out.
FULL_SIZE = {
    ("vision_encoder", "attention"): 64,
    ("vision_encoder", "mlp"): 64,
    ("vision_encoder", "conv"): 6,
    ("text_encoder", "attention"): 96,
    ("text_encoder", "mlp"): 48,
    ("text_encoder", "proj"): 1,
    ("geometry_encoder", "attention"): 24,
    ("geometry_encoder", "mlp"): 6,
    ("geometry_encoder", "proj"): 3,
    ("geometry_encoder", "conv"): 1,
    ("detr_encoder", "attention"): 48,
    ("detr_encoder", "mlp"): 12,
    ("detr_decoder", "attention"): 72,
    ("detr_decoder", "mlp"): 12,
    ("detr_decoder", "heads"): 12,
    ("segmentation_head", "attention"): 4,
    ("segmentation_head", "mlp"): 3,
    ("segmentation_head", "conv"): 4,
    ("scoring", "mlp"): 2,
    ("scoring", "proj"): 2,
}
DEAD = [
    "backbone.vision_backbone.convs.3.conv_1x1",
    "backbone.vision_backbone.convs.3.conv_3x3",
    "geometry_encoder.points_direct_project",
    "geometry_encoder.points_pool_project",
    "geometry_encoder.points_pos_enc_project",
    "segmentation_head.pixel_decoder.conv_layers.2",
]
DECONVOLUTIONS = [
    "backbone.vision_backbone.convs.0.dconv_2x2_0",
    "backbone.vision_backbone.convs.0.dconv_2x2_1",
    "backbone.vision_backbone.convs.1.dconv_2x2",
]


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in split_attention(model).named_modules()]


@pytest.fixture(scope="module")
def full_size_model():
    return split_attention(build_meta_sam3())


@pytest.fixture(scope="module")
def full_size_names(full_size_model):
    return [name for name, _ in full_size_model.named_modules()]


@pytest.fixture(scope="module")
def tiny_names():
    return names_of(build_tiny_sam3())


def test_the_map_has_the_golden_kinds_and_no_other():
    assert {(c, k) for c, kinds in PATTERNS.items() for k in kinds} == set(FULL_SIZE)


@pytest.mark.parametrize(("component", "kind"), FULL_SIZE)
def test_each_part_has_its_golden_number_of_modules(component, kind, full_size_names):
    assert len(resolve_targets(full_size_names, [component], [kind])[component]) == FULL_SIZE[component, kind]


def test_map_and_exclusions_name_every_layer_of_the_full_size_model_but_the_patch_embedding(full_size_model):
    layers = {
        name
        for name, module in full_size_model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
    }
    named = {name for name in layers if component_of(name) or why_excluded(name)}
    assert layers - named == {"backbone.vision_backbone.trunk.patch_embed.proj"}


def test_the_map_names_only_layers_with_a_weight(full_size_model):
    modules = dict(full_size_model.named_modules())
    assert all(isinstance(modules[n], (nn.Linear, nn.Conv2d)) for n in modules if component_of(n))


def test_dead_modules_and_deconvolutions_are_there_but_never_resolved(full_size_names):
    everything = resolve_targets(full_size_names, COMPONENTS, KINDS)
    resolved = set(itertools.chain.from_iterable(everything.values()))
    assert sorted(n for n in full_size_names if why_excluded(n)) == sorted(DEAD + DECONVOLUTIONS)
    assert not resolved & set(DEAD + DECONVOLUTIONS)
    assert len(resolved) == sum(FULL_SIZE.values())


@pytest.mark.parametrize("name", DEAD + DECONVOLUTIONS)
def test_an_excluded_module_has_a_reason(name):
    assert why_excluded(name) in {*DEAD_MODULES.values(), *UNSUPPORTED_MODULES.values()}
    assert component_of(name) is None


def test_no_module_belongs_to_two_parts(full_size_names):
    patterns = [pattern for kinds in PATTERNS.values() for pattern in kinds.values()]
    assert all(sum(re.fullmatch(p, name) is not None for p in patterns) <= 1 for name in full_size_names)


def test_every_part_exists_in_the_tiny_model(tiny_names):
    for component, kind in FULL_SIZE:
        assert resolve_targets(tiny_names, [component], [kind])[component]


def test_the_tracker_of_the_interactive_model_is_never_touched(full_size_names):
    names = names_of(build_meta_sam3(enable_inst_interactivity=True))
    assert any(name.startswith("inst_interactive_predictor") for name in names)
    assert resolve_targets(names, COMPONENTS, KINDS) == resolve_targets(full_size_names, COMPONENTS, KINDS)


def test_names_come_per_component_in_the_order_of_the_model():
    names = [
        "dot_prod_scoring.hs_proj",
        "transformer.decoder.layers.0.linear1",
        "dot_prod_scoring.prompt_proj",
    ]
    assert resolve_targets(names, {"scoring": 8, "detr_decoder": 4}, ["mlp", "proj"]) == {
        "detr_decoder": ["transformer.decoder.layers.0.linear1"],
        "scoring": ["dot_prod_scoring.hs_proj", "dot_prod_scoring.prompt_proj"],
    }


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("detector.dot_prod_scoring.hs_proj", id="a longer name"),
        pytest.param("dot_prod_scoring.hs_proj.base_layer", id="below an adapted module"),
        pytest.param("transformer.decoder.layers.0.self_attn", id="a module that only holds layers"),
    ],
)
def test_a_pattern_matches_the_full_name_only(name):
    assert component_of(name) is None


def test_unknown_components_and_kinds_are_reported_together_with_the_close_match(tiny_names):
    with pytest.raises(ConfigError) as error:
        resolve_targets(tiny_names, ["vison_encoder"], ["atention"])
    assert "unknown component 'vison_encoder'; did you mean 'vision_encoder'?" in str(error.value)
    assert "unknown kind 'atention'; did you mean 'attention'?" in str(error.value)


def test_a_component_without_any_requested_kind_is_an_error_that_lists_its_kinds(tiny_names):
    with pytest.raises(TargetError, match="scoring has nothing of kind 'attention'; its kinds are mlp, proj"):
        resolve_targets(tiny_names, ["vision_encoder", "scoring"], ["attention"])


def test_a_model_without_the_component_is_an_error():
    with pytest.raises(TargetError, match="segmentation_head: this model has no such modules"):
        resolve_targets(["dot_prod_scoring.hs_proj"], ["segmentation_head"], ["mlp"])
