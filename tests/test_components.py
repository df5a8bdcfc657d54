import itertools
import json
import re
from pathlib import Path

import pytest
from torch import nn

from sam3_lora.adapter import adapted_modules, get_peft_sam3
from sam3_lora.attention import split_attention
from sam3_lora.base.official import build_meta_sam3, leave_autocast, on_meta
from sam3_lora.base.tiny import build_tiny_sam3
from sam3_lora.base.vocabulary import bpe_path
from sam3_lora.components import (
    COMPONENT_MAP_VERSION,
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

from sam3.model_builder import build_sam3_video_model  # isort: skip  (after the stand-in for triton)

GOLDEN = json.loads(
    (Path(__file__).parent / "golden" / "components_sam3_0_1_4.json").read_text(encoding="utf-8")
)
PARTS = [(component, kind) for component, kinds in GOLDEN["full_size"].items() for kind in kinds]


def expanded(templates: list[str]) -> list[str]:
    """Return every name that templates such as ``layers.{0..1}.{a,b}`` stand for."""
    names = []
    for template in templates:
        pieces = re.split(r"\{(.+?)\}", template)
        choices = [choices_of(piece) if odd % 2 else [piece] for odd, piece in enumerate(pieces)]
        names += ["".join(name) for name in itertools.product(*choices)]
    return names


def choices_of(braces: str) -> list[str]:
    first, dots, last = braces.partition("..")
    return [str(i) for i in range(int(first), int(last) + 1)] if dots else braces.split(",")


LEFT_OUT = expanded(GOLDEN["left_out"])


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in split_attention(model).named_modules()]


@pytest.fixture(scope="module")
def full_size_model():
    return split_attention(build_meta_sam3())


@pytest.fixture(scope="module")
def full_size_names(full_size_model):
    return [name for name, _ in full_size_model.named_modules()]


def built_video_model():
    with on_meta():
        model = build_sam3_video_model(bpe_path=str(bpe_path()), load_from_HF=False, device="meta")
    leave_autocast(model)
    return model


@pytest.fixture(scope="module")
def video_model():
    return built_video_model()


@pytest.fixture(scope="module")
def names(full_size_names, video_model):
    """The module names of every model that the map is for."""
    return {
        "full_size": full_size_names,
        "tiny": names_of(build_tiny_sam3()),
        "interactive": names_of(build_meta_sam3(enable_inst_interactivity=True)),
        "video detector": names_of(video_model.detector),
    }


def test_the_golden_list_is_that_of_this_version_of_the_map():
    assert GOLDEN["component_map_version"] == COMPONENT_MAP_VERSION


def test_the_map_has_the_golden_kinds_and_no_other():
    assert [(c, k) for c, kinds in PATTERNS.items() for k in kinds] == PARTS


@pytest.mark.parametrize(("component", "kind"), PARTS)
@pytest.mark.parametrize("model", ["full_size", "tiny", "interactive", "video detector"])
def test_each_part_has_its_golden_modules(model, component, kind, names):
    golden = GOLDEN["tiny" if model == "tiny" else "full_size"][component][kind]
    found = resolve_targets(names[model], [component], [kind])[component]
    assert sorted(found) == sorted(expanded(golden))


@pytest.mark.parametrize("model", ["interactive", "video detector"])
def test_what_only_the_tracker_uses_is_never_touched(model, names):
    ours = set(names["full_size"])
    others = [name for name in names[model] if name not in ours]
    assert any("sam2_convs" in name or "inst_interactive_predictor" in name for name in others)
    assert not [name for name in others if component_of(name)]


def test_the_video_model_itself_is_refused_in_favour_of_its_detector(video_model):
    with pytest.raises(TargetError, match=r"only a part of this one; pass model\.detector$"):
        get_peft_sam3(video_model)


def test_the_detector_of_the_video_model_takes_an_adapter_and_the_tracker_stays_as_it_is():
    video_model = built_video_model()
    before = list(dict(video_model.tracker.named_parameters()))
    adapted = adapted_modules(get_peft_sam3(video_model.detector, "full"))
    assert len(adapted) == 416
    assert list(dict(video_model.tracker.named_parameters())) == before
    assert not adapted_modules(video_model.tracker)


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


@pytest.mark.parametrize("model", ["full_size", "tiny", "interactive", "video detector"])
def test_dead_modules_and_deconvolutions_are_there_but_never_resolved(model, names):
    everything = resolve_targets(names[model], COMPONENTS, KINDS)
    resolved = set(itertools.chain.from_iterable(everything.values()))
    assert sorted(n for n in names[model] if why_excluded(n)) == sorted(LEFT_OUT)
    assert not resolved & set(LEFT_OUT)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_an_excluded_module_has_a_reason(name):
    assert why_excluded(name) in {*DEAD_MODULES.values(), *UNSUPPORTED_MODULES.values()}
    assert component_of(name) is None


def test_no_module_belongs_to_two_parts(full_size_names):
    patterns = [pattern for kinds in PATTERNS.values() for pattern in kinds.values()]
    assert all(sum(re.fullmatch(p, name) is not None for p in patterns) <= 1 for name in full_size_names)


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


def test_unknown_components_and_kinds_are_reported_together_with_the_close_match(names):
    with pytest.raises(ConfigError) as error:
        resolve_targets(names["tiny"], ["vison_encoder"], ["atention"])
    assert "unknown component 'vison_encoder'; did you mean 'vision_encoder'?" in str(error.value)
    assert "unknown kind 'atention'; did you mean 'attention'?" in str(error.value)


def test_a_component_without_any_requested_kind_is_an_error_that_lists_its_kinds(names):
    with pytest.raises(TargetError, match="scoring has nothing of kind 'attention'; its kinds are mlp, proj"):
        resolve_targets(names["tiny"], ["vision_encoder", "scoring"], ["attention"])


def test_a_model_without_the_component_is_an_error():
    with pytest.raises(TargetError, match="segmentation_head: this model has no such modules"):
        resolve_targets(["dot_prod_scoring.hs_proj"], ["segmentation_head"], ["mlp"])
