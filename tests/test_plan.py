import re

import pytest

from sam3_lora.errors import ConfigError, TargetError
from sam3_lora.plan import Strength, make_plan, preset_of
from sam3_lora.presets import get_preset

NAMES = [
    "",
    "backbone.vision_backbone.trunk.blocks.0.attn.qkv",
    "backbone.vision_backbone.trunk.blocks.0.mlp.fc1",
    "backbone.vision_backbone.trunk.blocks.1.attn.qkv",
    "backbone.vision_backbone.convs.3.conv_1x1",
    "backbone.language_backbone.encoder.transformer.resblocks.0.attn.q_proj",
    "transformer.encoder.layers.0.self_attn.q_proj",
    "transformer.decoder.layers.0.self_attn",
    "transformer.decoder.layers.0.self_attn.q_proj",
    "transformer.decoder.layers.0.linear1",
    "transformer.decoder.bbox_embed",
    "transformer.decoder.bbox_embed.layers.0",
    "transformer.decoder.boxRPB_embed_x",
    "segmentation_head",
    "segmentation_head.pixel_decoder.conv_layers.2",
    "dot_prod_scoring",
    "dot_prod_scoring.hs_proj",
    "inst_interactive_predictor.model.transformer.encoder.layers.0.self_attn.q_proj",
]
FIELDS = ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern"]
FIELDS += ["alpha_pattern", "modules_to_save", "lora_dropout"]

VISION_0, VISION_1 = (f"backbone.vision_backbone.trunk.blocks.{i}.attn.qkv" for i in (0, 1))
ENCODER = "transformer.encoder.layers.0.self_attn.q_proj"
DECODER = "transformer.decoder.layers.0.self_attn.q_proj"


def plan(preset="balanced", **overrides):
    return make_plan(NAMES, get_preset(preset), overrides, FIELDS)


def test_each_module_gets_the_strength_of_its_component():
    modules = plan().modules
    assert modules[VISION_0] == modules[VISION_1] == Strength(8, 16)
    assert modules[ENCODER] == modules[DECODER] == Strength(16, 32)
    assert len(modules) == 5


def test_the_target_pattern_matches_the_planned_names_in_full_and_nothing_else():
    made = plan()
    pattern = made.lora_config["target_modules"]
    assert [name for name in NAMES if re.fullmatch(pattern, name)] == list(made.modules)


def test_rank_and_alpha_pattern_belong_to_the_same_components():
    config = plan(r={"vision_encoder": 4}).lora_config
    assert config["rank_pattern"].keys() == config["alpha_pattern"].keys()
    assert {2 * r for r in config["rank_pattern"].values()} == set(config["alpha_pattern"].values())


def test_r_by_component_writes_both_patterns_so_that_alpha_over_r_stays_2():
    made = plan(r={"vision_encoder": 16, "detr_decoder": 8})
    assert made.modules[VISION_0] == Strength(16, 32)
    assert made.modules[DECODER] == Strength(8, 16)
    assert {strength.lora_alpha / strength.r for strength in made.modules.values()} == {2}
    config = made.lora_config
    for name, strength in made.modules.items():
        for key, default, value in (
            ("rank_pattern", "r", strength.r),
            ("alpha_pattern", "lora_alpha", strength[1]),
        ):
            found = [v for p, v in config[key].items() if re.match(rf"(.*\.)?({p})$", name)]
            assert (found or [config[default]]) == [value]


def test_one_strength_for_all_needs_no_patterns():
    config = plan(r=4).lora_config
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


def test_other_settings_pass_through_and_those_that_are_none_count_as_not_given():
    config = plan(lora_dropout=0.1, target_modules=None, r=None).lora_config
    assert config["lora_dropout"] == 0.1
    assert "lora_dropout" not in plan(lora_dropout=None).lora_config


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        pytest.param({"target_modules": [VISION_1]}, [VISION_1], id="a full name"),
        pytest.param({"target_modules": ["attn.qkv"]}, [VISION_0, VISION_1], id="the end of a name"),
        pytest.param({"target_modules": r"transformer\..*q_proj"}, [ENCODER, DECODER], id="a pattern"),
        pytest.param(
            {"exclude_modules": ["attn.qkv", "attn.q_proj"]}, [ENCODER, DECODER], id="exclude by end"
        ),
        pytest.param({"exclude_modules": r"(backbone|transformer\.e).*"}, [DECODER], id="exclude by pattern"),
        pytest.param({"layers_to_transform": 1}, [VISION_1], id="one layer"),
        pytest.param(
            {"last_n_vision_blocks": 1, "components": ["vision_encoder", "detr_decoder"]},
            [VISION_1, DECODER],
            id="last blocks of the vision encoder",
        ),
        pytest.param(
            {"last_n_vision_blocks": 2, "components": "vision_encoder"}, [VISION_0, VISION_1], id="all blocks"
        ),
        pytest.param(
            {"layers_to_transform": [0, 1], "layers_pattern": "blocks"},
            [VISION_0, VISION_1],
            id="layers of a list",
        ),
    ],
)
def test_settings_of_peft_choose_modules(overrides, expected):
    assert list(plan(**overrides).modules) == expected


def test_the_tracker_never_counts_as_a_target():
    assert list(plan(target_modules=["self_attn.q_proj"]).modules) == [ENCODER, DECODER]


def test_target_modules_takes_r_from_the_preset_or_the_override():
    assert plan(target_modules=[DECODER]).modules == {DECODER: Strength(16, 32)}
    assert plan(target_modules=[DECODER, VISION_0], r={"vision_encoder": 2}).modules[VISION_0] == Strength(
        2, 4
    )


def test_modules_inside_a_module_to_save_are_not_adapted():
    made = plan("minimal", kinds=["mlp", "heads"], modules_to_save=["bbox_embed"])
    assert list(made.modules) == ["transformer.decoder.layers.0.linear1"]
    assert made.lora_config["modules_to_save"] == ["bbox_embed"]


def test_a_rank_pattern_keeps_the_scaling():
    modules = plan(rank_pattern={r"transformer\.decoder\..*": 2}).modules
    assert (modules[DECODER], modules[ENCODER]) == (Strength(2, 4), Strength(16, 32))


def test_a_rank_pattern_with_an_alpha_leaves_the_alpha_alone():
    assert plan(rank_pattern={"self_attn.q_proj": 2}, lora_alpha=8).modules[DECODER] == Strength(2, 8)
    made = plan(rank_pattern={"self_attn.q_proj": 2}, alpha_pattern={"self_attn.q_proj": 3})
    assert made.modules[DECODER] == Strength(2, 3)


@pytest.mark.parametrize(
    ("overrides", "error", "problem"),
    [
        pytest.param(
            {"target_modules": ["conv_layers.2"]},
            TargetError,
            "segmentation_head.pixel_decoder.conv_layers.2 (three levels",
            id="dead target by name",
        ),
        pytest.param(
            {"target_modules": r".*conv_1x1"},
            TargetError,
            "convs.3.conv_1x1 (the backbone drops",
            id="dead by pattern",
        ),
        pytest.param(
            {"target_modules": ["kqv"]}, TargetError, "did you mean 'qkv'?", id="target that is not there"
        ),
        pytest.param(
            {"target_modules": "all-linear"},
            TargetError,
            "names no module that LoRA can adapt",
            id="PEFT's shorthand",
        ),
        pytest.param(
            {"target_modules": "(", "r": 1}, ConfigError, "'(' is not a regular expression", id="pattern"
        ),
        pytest.param(
            {"target_modules": ["attn.qkv"], "kinds": "mlp"},
            ConfigError,
            "target_modules and kinds",
            id="two choices",
        ),
        pytest.param(
            {"exclude_modules": ["qvk"]}, TargetError, "exclude_modules 'qvk' excludes nothing", id="idle"
        ),
        pytest.param(
            {"exclude_modules": ".*"}, TargetError, "exclude_modules leaves no module", id="exclude all"
        ),
        pytest.param(
            {"layers_to_transform": 7}, TargetError, "layers_to_transform leaves no module", id="layer"
        ),
        pytest.param(
            {"layers_pattern": "blocks"}, ConfigError, "without layers_to_transform", id="pattern alone"
        ),
        pytest.param(
            {"last_n_vision_blocks": 1, "components": ["detr_decoder"]},
            TargetError,
            "last_n_vision_blocks has no effect: no block of vision_encoder is adapted",
            id="last blocks of nothing",
        ),
        pytest.param(
            {"last_n_vision_blocks": 3},
            ConfigError,
            "last_n_vision_blocks must be a whole number from 1 to 2, the blocks there are, got 3",
            id="more blocks than there are",
        ),
        pytest.param({"last_n_vision_blocks": 0}, ConfigError, "from 1 to 2", id="no block"),
        pytest.param({"last_n_vision_blocks": "4"}, ConfigError, "got '4'", id="blocks as text"),
        pytest.param(
            {"last_n_vision_blocks": 1, "layers_to_transform": [1]},
            ConfigError,
            "last_n_vision_blocks and layers_to_transform both choose blocks",
            id="blocks twice",
        ),
        pytest.param(
            {"rank_pattern": {"self_attn": 4}},
            TargetError,
            "rank_pattern 'self_attn' is the pattern of no adapted module",
            id="idle rank pattern",
        ),
        pytest.param(
            {"rank_pattern": {".*": 0}},
            ConfigError,
            "rank_pattern '.*': r must be a whole number",
            id="rank zero",
        ),
        pytest.param(
            {"modules_to_save": ["box_embed"]}, TargetError, "did you mean 'bbox_embed'?", id="idle save"
        ),
        pytest.param(
            {"modules_to_save": ["segmentation_head"]},
            TargetError,
            "name its children",
            id="save of a wrapper",
        ),
    ],
)
def test_a_setting_without_effect_is_an_error(overrides, error, problem):
    with pytest.raises(error) as raised:
        plan(**overrides)
    assert problem in str(raised.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("target_modules", 5),
        ("exclude_modules", [1]),
        ("modules_to_save", 5),
        ("modules_to_save", []),
        ("layers_to_transform", "last"),
        ("rank_pattern", "q_proj"),
        ("alpha_pattern", {1: 2}),
    ],
)
def test_a_value_of_another_type_is_an_error_that_says_what_is_wanted(setting, value):
    with pytest.raises(ConfigError, match=f"{setting} must be a .*, got "):
        plan(**{setting: value})


def test_components_in_a_list_of_their_own_are_unknown_names():
    with pytest.raises(ConfigError, match="unknown component"):
        plan(components=[["vision_encoder"]])


def test_all_that_is_wrong_is_reported_at_once():
    with pytest.raises(ConfigError) as raised:
        plan(
            r={"vision_encoder": "8x", "detr_decoder": 0},
            lora_alpha=float("nan"),
            components=["vision_encoder", "vision_encoder", "detr_decoder", "scorng"],
            exclude_modules=["qvk"],
            rank_pattern={"no_such_layer": 4},
            modules_to_save=["box_embed"],
            rank=8,
            last_n_vision_blocks=9,
        )
    text = str(raised.value)
    for problem in (
        "vision_encoder: r must be a whole number of 1 or more, got '8x'",
        "detr_decoder: r must be a whole number of 1 or more, got 0",
        "vision_encoder: lora_alpha must be a positive number, got nan",
        "component 'vision_encoder' is given 2 times",
        "unknown component 'scorng'; did you mean 'scoring'?",
        "exclude_modules 'qvk' excludes nothing",
        "rank_pattern 'no_such_layer' is the pattern of no adapted module",
        "modules_to_save 'box_embed' names no module; did you mean 'bbox_embed'?",
        "unknown override 'rank'; it is r here",
        "last_n_vision_blocks must be a whole number from 1 to 2",
    ):
        assert problem in text


SIX_BLOCKS = [f"backbone.vision_backbone.trunk.blocks.{i}.attn.qkv" for i in range(6)] + [ENCODER, DECODER]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        pytest.param({}, [*SIX_BLOCKS[2:6], ENCODER, DECODER], id="as the preset has it"),
        pytest.param({"last_n_vision_blocks": 1}, [SIX_BLOCKS[5], ENCODER, DECODER], id="other blocks"),
        pytest.param({"layers_to_transform": 0}, [SIX_BLOCKS[0], ENCODER, DECODER], id="layers instead"),
        pytest.param({"components": ["detr_decoder"]}, [DECODER], id="no vision encoder"),
        pytest.param({"target_modules": ["attn.qkv"]}, SIX_BLOCKS[:6], id="modules by name"),
    ],
)
def test_the_last_blocks_of_a_preset_hold_until_another_setting_chooses(overrides, expected):
    made = make_plan(SIX_BLOCKS, get_preset("light"), overrides, FIELDS)
    assert list(made.modules) == expected


def test_a_preset_with_last_blocks_is_recognised():
    assert preset_of(make_plan(SIX_BLOCKS, get_preset("light"), {}, FIELDS).modules, SIX_BLOCKS) == "light"


def test_a_plan_is_recognised_as_its_preset_unless_it_was_changed():
    assert preset_of(plan("balanced").modules, NAMES) == "balanced"
    assert preset_of(plan("minimal").modules, NAMES) == "minimal"
    assert preset_of(plan("minimal", r=4).modules, NAMES) is None
    assert preset_of(plan("minimal", kinds=["mlp"]).modules, NAMES) is None
