import dataclasses

import pytest

from sam3_lora.errors import ConfigError
from sam3_lora.presets import PRESETS, TRAINABLE_PARAMETERS, Preset, get_preset, override_preset

BALANCED = get_preset("balanced")


def test_every_preset_has_a_reason_of_its_own_and_a_count():
    assert list(PRESETS)[:3] == ["minimal", "balanced", "full"]
    assert len({preset.reason for preset in PRESETS.values()}) == len(PRESETS)
    assert PRESETS.keys() == TRAINABLE_PARAMETERS.keys()


def test_the_preset_for_video_adapts_nothing_that_the_tracker_reads():
    assert "vision_encoder" not in get_preset("tracker_safe").components


@pytest.mark.parametrize("name", PRESETS)
def test_alpha_is_twice_r_in_every_preset(name):
    preset = get_preset(name)
    assert all(preset.alpha_of(component) == 2 * r for component, r in preset.components.items())


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("balancd", "unknown preset 'balancd'; did you mean 'balanced'?"),
        ("x", "presets are minimal, balanced, full"),
    ],
)
def test_an_unknown_preset_is_an_error_with_the_close_match_or_the_list(name, problem):
    with pytest.raises(ConfigError) as error:
        get_preset(name)
    assert problem in str(error.value)


def test_a_preset_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BALANCED.kinds = ("mlp",)
    with pytest.raises(TypeError):
        BALANCED.components["scoring"] = 8


def test_one_r_is_for_all_components_and_alpha_follows_it():
    changed = override_preset(BALANCED, {"r": 32})
    assert dict(changed.components) == dict.fromkeys(BALANCED.components, 32)
    assert changed.alpha_of("detr_decoder") == 64


def test_r_by_component_changes_only_those():
    changed = override_preset(BALANCED, {"r": {"vision_encoder": 4}})
    assert dict(changed.components) == {**BALANCED.components, "vision_encoder": 4}


def test_lora_alpha_may_be_given_by_component():
    changed = override_preset(BALANCED, {"lora_alpha": {"vision_encoder": 3.5}})
    assert (changed.alpha_of("vision_encoder"), changed.alpha_of("text_encoder")) == (3.5, 16)


def test_a_new_r_replaces_an_alpha_of_the_preset():
    scaled = override_preset(BALANCED, {"lora_alpha": 8})
    assert scaled.alpha_of("vision_encoder") == 8
    assert override_preset(scaled, {"r": 4}).alpha_of("vision_encoder") == 8


def test_a_component_new_to_the_preset_starts_from_its_smallest_r():
    changed = override_preset(
        BALANCED, {"components": ["detr_decoder", "scoring"], "kinds": ["attention", "mlp"]}
    )
    assert dict(changed.components) == {"detr_decoder": 16, "scoring": 8}
    assert changed.kinds == ("attention", "mlp")


def test_one_component_and_one_kind_may_be_plain_text():
    changed = override_preset(BALANCED, {"components": "scoring", "kinds": "mlp"})
    assert (list(changed.components), changed.kinds) == (["scoring"], ("mlp",))


def test_overrides_leave_the_preset_and_their_own_values_alone():
    before, wanted = dict(BALANCED.components), {"vision_encoder": 4}
    override_preset(BALANCED, {"r": wanted})
    assert (dict(BALANCED.components), wanted) == (before, {"vision_encoder": 4})


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        pytest.param(
            {"lora_dropuot": 0.1}, "unknown override 'lora_dropuot'; did you mean 'lora_dropout'?", id="typo"
        ),
        pytest.param({"rank": 8}, "unknown override 'rank'; it is r here", id="the seed's rank"),
        pytest.param({"lora.rank": 8}, "unknown override 'lora.rank'; it is r here", id="the seed's key"),
        pytest.param({"alpha": 16}, "unknown override 'alpha'; it is lora_alpha here", id="the seed's alpha"),
        pytest.param(
            {"apply_to_text_encoder": False},
            "unknown override 'apply_to_text_encoder'; name the parts to adapt instead: components=[...], "
            "with 'text_encoder' among them or not",
            id="the seed's switch of a component",
        ),
        pytest.param({"r": 0}, "r must be a whole number of 1 or more, got 0", id="r zero"),
        pytest.param({"r": "8x"}, "r must be a whole number of 1 or more, got '8x'", id="r text"),
        pytest.param({"r": 8.0}, "r must be a whole number of 1 or more, got 8.0", id="r float"),
        pytest.param({"r": True}, "r must be a whole number of 1 or more, got True", id="r bool"),
        pytest.param(
            {"r": {"scoring": 8}}, "r is given for 'scoring', which is not adapted", id="r of an idle part"
        ),
        pytest.param(
            {"r": {"vison_encoder": 8}}, "did you mean 'vision_encoder'?", id="r of an unknown part"
        ),
        pytest.param(
            {"lora_alpha": float("nan")}, "lora_alpha must be a positive number, got nan", id="alpha nan"
        ),
        pytest.param(
            {"lora_alpha": float("inf")}, "lora_alpha must be a positive number, got inf", id="alpha inf"
        ),
        pytest.param({"lora_alpha": 0}, "lora_alpha must be a positive number, got 0", id="alpha zero"),
        pytest.param(
            {"lora_alpha": {"scoring": 1}}, "lora_alpha is given for 'scoring'", id="alpha of an idle part"
        ),
        pytest.param({"components": ["scorng"]}, "did you mean 'scoring'?", id="unknown component"),
        pytest.param(
            {"components": ["scoring"] * 2}, "component 'scoring' is given 2 times", id="component twice"
        ),
        pytest.param({"components": []}, "no component is given", id="no component"),
        pytest.param({"components": 5}, "unknown component 5", id="component of another type"),
        pytest.param({"kinds": "atention"}, "did you mean 'attention'?", id="unknown kind"),
        pytest.param({"kinds": []}, "no kind is given", id="no kind"),
    ],
)
def test_a_wrong_override_is_an_error_that_says_what_is_wrong(overrides, problem):
    with pytest.raises(ConfigError) as error:
        override_preset(BALANCED, overrides, also_known=["lora_dropout"])
    assert problem in str(error.value)


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        override_preset(
            BALANCED, {"rank": 8, "components": ["scoring", "scorng"], "r": 0, "lora_alpha": "big"}
        )
    text = str(error.value)
    assert "unknown override 'rank'" in text
    assert "unknown component 'scorng'" in text
    assert "scoring: r must be" in text
    assert "scoring: lora_alpha must be" in text


def test_a_preset_of_your_own_is_checked_when_it_is_made():
    with pytest.raises(ConfigError, match="scoring: r must be a whole number of 1 or more, got -1"):
        Preset(reason="", components={"scoring": -1}, kinds=("mlp",))


@pytest.mark.parametrize(
    ("blocks", "components", "problem"),
    [
        pytest.param(0, {"vision_encoder": 8}, "a whole number of 1 or more, got 0", id="no block"),
        pytest.param(4, {"scoring": 8}, "vision_encoder is not among the components", id="blocks of nothing"),
    ],
)
def test_the_last_blocks_of_a_preset_of_your_own_are_checked(blocks, components, problem):
    with pytest.raises(ConfigError, match=problem):
        Preset(reason="", components=components, kinds=("mlp",), last_n_vision_blocks=blocks)
