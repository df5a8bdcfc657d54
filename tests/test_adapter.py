import copy
import fnmatch
import hashlib
import json
import shutil
import stat
import warnings

import peft
import pytest
import torch
from main_branch import with_main_attention, with_main_mlp
from safetensors.torch import load_file, save_file
from tiny_forward import forward, forward_with_gradients
from torch import nn

from sam3_lora.adapter import (
    ADAPTER_FILES,
    adapted_modules,
    count_parameters,
    get_peft_sam3,
    load_adapter,
    save_adapter,
)
from sam3_lora.attention import SplitAttention, split_attention
from sam3_lora.base.official import build_meta_sam3
from sam3_lora.base.tiny import build_tiny_sam3
from sam3_lora.components import PATTERNS
from sam3_lora.errors import AdapterError, ConfigError, OutputError, TargetError
from sam3_lora.presets import PRESETS, TRAINABLE_PARAMETERS

torch.set_num_threads(1)

PREFIX = "base_model.model."
EVERYTHING = {
    "components": [
        "vision_encoder",
        "text_encoder",
        "geometry_encoder",
        "detr_encoder",
        "detr_decoder",
        "segmentation_head",
        "scoring",
    ],
    "kinds": ["attention", "mlp", "heads", "proj", "conv"],
}
PARTS = [(component, kind) for component, kinds in PATTERNS.items() for kind in kinds]


@pytest.fixture(scope="module")
def pristine():
    model = build_tiny_sam3(eval_mode=True)
    nn.init.normal_(
        model.transformer.decoder.bbox_embed.layers[-1].weight, std=0.1
    )  # zero would hide all changes
    return model


@pytest.fixture
def base(pristine):
    return fresh_copy(pristine)


def fresh_copy(model: nn.Module) -> nn.Module:
    tokenizer = (
        model.backbone.language_backbone.tokenizer
    )  # copying its vocabulary takes longer than all the rest
    return copy.deepcopy(model, {id(tokenizer): tokenizer})


@pytest.fixture(scope="module")
def saved(tmp_path_factory, pristine):
    """A trained-looking balanced adapter: its folder and the outputs of the model it came from."""
    adapted = randomize(get_peft_sam3(fresh_copy(pristine), "balanced"))
    return save_adapter(adapted, tmp_path_factory.mktemp("saved") / "adapter"), forward(adapted)


def randomize(adapted: nn.Module) -> nn.Module:
    """Give the trainable tensors values that show in the output; LoRA's B starts at zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return adapted


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in adapted_modules(model)}


# --- Adding an adapter ---


@pytest.mark.parametrize(
    ("preset", "modules", "parameters"),
    [
        ("minimal", 84, 516_096),
        ("balanced", 280, 4_128_768),
        ("full", 416, 14_893_056),
        ("light", 128, 688_128),
        ("vision", 64, 3_145_728),
        ("text", 96, 1_572_864),
        ("detr", 144, 1_867_776),
        ("segmentation_head", 11, 151_568),
        ("tracker_safe", 216, 2_555_904),
    ],
)
def test_a_preset_adapts_its_exact_share_of_the_full_size_model(preset, modules, parameters):
    assert TRAINABLE_PARAMETERS[preset] == parameters
    model = build_meta_sam3()
    adapted = get_peft_sam3(model, preset)
    assert count_parameters(adapted) == (parameters, 840_509_750 + parameters)
    assert len(adapted_modules(adapted)) == modules
    assert {layer.scaling["default"] for layer in lora_layers(model).values()} == {2.0}


def test_the_tracker_of_the_interactive_model_gets_no_adapter():
    adapted = get_peft_sam3(build_meta_sam3(enable_inst_interactivity=True), "full")
    assert count_parameters(adapted).trainable == 14_893_056
    assert not any("inst_interactive_predictor" in name for name in adapted_modules(adapted))


@pytest.mark.parametrize("preset", PRESETS)
def test_adding_an_adapter_gives_no_warning(base, preset):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_sam3(base, preset)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_fresh_adapter_does_not_change_the_model(base, preset):
    before = forward(split_attention(base))
    assert_same(forward(get_peft_sam3(base, preset)), before)


def test_every_adapted_weight_acts_as_w_plus_alpha_over_r_times_b_a(base):
    adapted = randomize(
        get_peft_sam3(base, "full", **EVERYTHING, r={"scoring": 3}, lora_alpha={"scoring": 7})
    )
    layers = lora_layers(adapted.get_base_model())
    assert len(layers) == 138
    for name, layer in layers.items():
        alpha, r = (7, 3) if name.startswith("dot_prod_scoring") else (2, 1)
        weight, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        change = alpha / r * (b.flatten(1) @ a.flatten(1)).view_as(weight)
        expected = copy.deepcopy(layer.base_layer)
        expected.weight = nn.Parameter(weight + change)
        if isinstance(expected, nn.Conv2d):
            x = torch.randn(2, expected.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
        else:
            x = torch.randn(2, 4, expected.in_features, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(
            layer(x), expected(x), rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_whole_model_acts_as_one_with_the_weights_changed_by_hand(base, pristine):
    by_hand = split_attention(fresh_copy(base))
    adapted = randomize(get_peft_sam3(base, "balanced"))
    with torch.no_grad():
        for name, layer in lora_layers(base).items():
            change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            by_hand.get_submodule(name).weight += 2 * change
    expected, untouched = forward(by_hand), forward(pristine)
    for name, found in forward(adapted).items():
        assert (found - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max().clamp(min=1)
        assert (found - untouched[name]).abs().max() > 1e-3


def test_every_tensor_of_an_adapter_gets_a_gradient_and_training_changes_no_base_tensor(base):
    get_peft_sam3(base, "full")
    before = tensors_of(base)
    adapter = {name: p for name, p in base.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-2)
    for _ in range(2):  # A gets its first gradient once B has left zero
        optimizer.zero_grad()
        sum(output.square().mean() for output in forward_with_gradients(base).values()).backward()
        optimizer.step()
    assert [name for name, p in adapter.items() if p.grad is None or not p.grad.any()] == []
    after = base.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == adapter.keys()
    assert all(".lora_" in name for name in adapter)


@pytest.mark.slow
@pytest.mark.parametrize(("component", "kind"), sorted(PARTS))
def test_gradients_agree_with_finite_differences(component, kind):
    base = build_tiny_sam3(eval_mode=True)
    # The decoder detaches the boxes that it hands on, so they must not move: bbox_embed still ends in zeros.
    left_out = {"exclude_modules": r".*\.(bbox_embed|presence_token_head)\..*"} if kind == "heads" else {}
    adapted = randomize(get_peft_sam3(base, components=[component], kinds=[kind], **left_out)).eval()
    tensors = [p for p in adapted.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(8)
    directions = [torch.randn(p.shape, generator=generator) * p.detach().abs().mean() for p in tensors]

    def value():
        outputs = forward_with_gradients(base)
        del outputs["presence_logit_dec"]  # clamped, so with kinks
        return sum(output.double().square().mean() for output in outputs.values())

    gradients = torch.autograd.grad(value(), tensors)
    expected = sum((g.double() * d).sum() for g, d in zip(gradients, directions, strict=True)).item()
    step, values = 1e-3, []
    with torch.no_grad():
        for side in (step, -2 * step):
            for tensor, direction in zip(tensors, directions, strict=True):
                tensor += side * direction
            values.append(value().item())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(
        expected, rel=0.05
    )  # fp32 and ReLU leave up to 3 %


def test_the_adapter_of_a_bf16_base_is_fp32(base):
    adapted = get_peft_sam3(base.to(torch.bfloat16))
    dtypes = {("lora_" in name, p.dtype) for name, p in adapted.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_the_base_model_inside_is_the_model_itself_with_its_official_parameter_names(base, pristine):
    adapted = get_peft_sam3(base)
    assert adapted.get_base_model() is base
    assert type(base) is type(pristine)
    split_names = {name for name, _ in split_attention(fresh_copy(pristine)).named_parameters()}
    names = {name for name, _ in base.named_parameters()}
    assert {name.replace(".base_layer", "") for name in names if "lora_" not in name} == split_names
    for pattern in (
        "backbone.vision_backbone.*",
        "backbone.language_backbone.*",
        "*bias*",
    ):  # sam3's own configs
        assert fnmatch.filter(names, pattern)


def test_adding_an_adapter_copies_no_tensor_of_the_base(base):
    places = {parameter.untyped_storage().data_ptr() for parameter in base.parameters()}
    get_peft_sam3(base, "full")
    after = {p.untyped_storage().data_ptr() for name, p in base.named_parameters() if ".lora_" not in name}
    assert after == places


def test_attention_of_the_main_branchs_class_is_split_and_every_adapter_on_it_acts(base, pristine):
    adapted = get_peft_sam3(with_main_attention(base), "full", kinds=["attention"], init_lora_weights=False)
    official = get_peft_sam3(fresh_copy(pristine), "full", kinds=["attention"])
    assert adapted_modules(adapted) == adapted_modules(official)
    layers = lora_layers(base)
    for layer in layers.values():
        layer.set_scale("default", 0)
    before = forward(base)
    assert_same(before, forward(official))
    for name, layer in layers.items():
        layer.set_scale("default", 1)
        changed = forward(base)
        layer.set_scale("default", 0)
        assert any((changed[key] - before[key]).abs().max() > 1e-4 for key in before), name


def test_attention_that_is_split_already_is_fine(base):
    assert len(adapted_modules(get_peft_sam3(split_attention(base), "minimal"))) == 42


def test_a_model_without_an_adapter_has_no_adapted_modules(base):
    assert adapted_modules(base) == []


# --- Overrides ---


def test_components_kinds_and_r_can_be_chosen(base):
    get_peft_sam3(base, components=["scoring", "segmentation_head"], kinds=["mlp"], r={"scoring": 2})
    assert {name: layer.r["default"] for name, layer in lora_layers(base).items()} == {
        "segmentation_head.mask_predictor.mask_embed.layers.0": 8,
        "segmentation_head.mask_predictor.mask_embed.layers.1": 8,
        "segmentation_head.mask_predictor.mask_embed.layers.2": 8,
        "dot_prod_scoring.prompt_mlp.layers.0": 2,
        "dot_prod_scoring.prompt_mlp.layers.1": 2,
    }
    assert {layer.scaling["default"] for layer in lora_layers(base).values()} == {2.0}


def test_a_rank_pattern_reaches_peft_with_the_scaling_kept(base):
    get_peft_sam3(base, "minimal", rank_pattern={r"layers\.0\.linear1": 2})
    layers = lora_layers(base)
    assert layers["transformer.decoder.layers.0.linear1"].r["default"] == 2
    assert layers["transformer.decoder.layers.1.linear1"].r["default"] == 8
    assert {layer.scaling["default"] for layer in layers.values()} == {2.0}


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({"use_dora": True}, id="DoRA"),
        pytest.param({"use_rslora": True}, id="rank-stabilised"),
        pytest.param({"lora_bias": True}, id="bias in B"),
        pytest.param({"bias": "lora_only"}, id="biases of the base"),
        pytest.param({"lora_dropout": 0.1}, id="dropout"),
        pytest.param({"modules_to_save": ["dot_prod_scoring"]}, id="a module trained whole"),
        pytest.param({"exclude_modules": r".*\.0\..*", "layers_to_transform": [1]}, id="some layers"),
        pytest.param({"target_modules": ["self_attn.q_proj"], "r": 3}, id="modules by name"),
        pytest.param({"init_lora_weights": "gaussian"}, id="another start"),
        pytest.param({**EVERYTHING}, id="all that can be adapted"),
    ],
)
def test_settings_of_peft_train_save_and_load(base, pristine, overrides, tmp_path):
    adapted = randomize(get_peft_sam3(base, "minimal", **overrides)).eval()
    save_adapter(adapted, tmp_path / "adapter")
    expected = forward(adapted)
    assert_same(forward(load_adapter(fresh_copy(pristine), tmp_path / "adapter")), expected)
    plain = peft.PeftModel.from_pretrained(split_attention(fresh_copy(pristine)), tmp_path / "adapter")
    assert_same(forward(plain), expected)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_starts_from_the_weights_keeps_the_output(base, init):
    before = forward(split_attention(base))
    adapted = forward(get_peft_sam3(base, "minimal", init_lora_weights=init))
    for name, expected in before.items():
        assert (adapted[name] - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize(
    ("preset", "overrides", "error", "problem"),
    [
        pytest.param("balancd", {}, ConfigError, "did you mean 'balanced'?", id="unknown preset"),
        pytest.param(
            "full", {"lora_dropuot": 0}, ConfigError, "did you mean 'lora_dropout'?", id="unknown override"
        ),
        pytest.param(
            "full", {"r": 0}, ConfigError, "r must be a whole number of 1 or more, got 0", id="r zero"
        ),
        pytest.param("full", {"lora_alpha": float("nan")}, ConfigError, "got nan", id="alpha nan"),
        pytest.param("full", {"bias": "some"}, ConfigError, "PEFT refuses these settings", id="bias"),
        pytest.param(
            "full",
            {"components": "segmentation_head", "kinds": ["mlp", "conv"], "init_lora_weights": "pissa"},
            ConfigError,
            "segmentation_head.pixel_decoder.conv_layers.0: is no Linear; leave out kind 'conv'",
            id="PiSSA on a convolution",
        ),
        pytest.param(
            "full",
            {"components": "detr_decoder", "kinds": "heads", "init_lora_weights": "olora", "r": 2},
            ConfigError,
            "presence_token_head.layers.2: r = 2 is more than its smaller side, 1",
            id="OLoRA on a layer with one output",
        ),
        pytest.param("full", {"lora_dropout": 2.0}, ConfigError, "PEFT refuses these settings", id="dropout"),
        pytest.param(
            "full", {"init_lora_weights": "zero"}, ConfigError, "PEFT refuses these settings", id="init"
        ),
        pytest.param(
            "full", {"components": "scoring", "kinds": "conv"}, TargetError, "scoring has nothing", id="kind"
        ),
        pytest.param(
            "full", {"target_modules": ["conv_layers.2"]}, TargetError, "no effect", id="dead module"
        ),
        pytest.param(
            "full",
            {"target_parameters": ["dot_prod_scoring.hs_proj.weight"]},
            TargetError,
            "dot_prod_scoring.hs_proj: wrapped without being asked for",
            id="more wrapped than planned",
        ),
    ],
)
def test_a_wrong_request_is_refused_and_leaves_the_model_as_it_was(base, preset, overrides, error, problem):
    before = tensors_of(base)
    trainable = [p.requires_grad for p in base.parameters()]
    with pytest.raises(error) as raised:
        get_peft_sam3(base, preset, **overrides)
    assert problem in str(raised.value)
    assert_same(base.state_dict(), before)
    assert [p.requires_grad for p in base.parameters()] == trainable
    assert not any(isinstance(module, SplitAttention) for module in base.modules())


@pytest.mark.parametrize("which", ["wrapper", "inner"])
def test_a_second_fresh_adapter_is_refused(base, which):
    adapted = get_peft_sam3(base, "minimal")
    with pytest.raises(AdapterError, match="has an adapter already, on 42 modules"):
        get_peft_sam3(adapted if which == "wrapper" else base)


def test_an_adapter_that_is_merged_is_taken_out_by_unmerging_first(base, pristine):
    adapted = randomize(get_peft_sam3(base, "minimal"))
    adapted.merge_adapter()
    with pytest.raises(
        AdapterError, match=r"merged into their weights; .* unmerge_adapter\(\) and then unload"
    ):
        get_peft_sam3(base, "minimal")
    adapted.unmerge_adapter()
    base = adapted.unload()
    assert adapted_modules(get_peft_sam3(base, "minimal"))
    assert count_parameters(base).total - count_parameters(base).trainable == count_parameters(pristine).total


@pytest.mark.parametrize("moment", ["in the trial", "in the model itself"])
def test_what_peft_wrapped_is_compared_with_the_plan(base, monkeypatch, moment):
    original = peft.tuners.lora.LoraModel._create_and_replace

    def skips_one(self, config, adapter_name, target, target_name, parent, current_key, **options):
        in_trial = target.weight.is_meta
        if current_key != "transformer.decoder.layers.0.linear2" or in_trial != (moment == "in the trial"):
            original(self, config, adapter_name, target, target_name, parent, current_key, **options)

    monkeypatch.setattr(peft.tuners.lora.LoraModel, "_create_and_replace", skips_one)
    with pytest.raises(TargetError, match=r"transformer\.decoder\.layers\.0\.linear2: not wrapped"):
        get_peft_sam3(base, "minimal")


# --- Saving ---


def test_an_adapter_folder_holds_four_files_that_all_can_read(saved):
    folder, _ = saved
    assert sorted(path.name for path in folder.iterdir()) == sorted(ADAPTER_FILES)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}
    assert sorted(path.name for path in folder.parent.iterdir()) == ["adapter"]


def test_the_file_holds_the_adapter_alone_under_the_keys_of_peft(base, tmp_path):
    adapted = randomize(get_peft_sam3(base))
    found = load_file(save_adapter(adapted, tmp_path / "ours") / "adapter_model.safetensors")
    base.name_or_path = "facebook/sam3"
    adapted.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    assert_same(found, load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    assert all(name.startswith(PREFIX) and ".lora_" in name for name in found)
    assert sum(tensor.numel() for tensor in found.values()) == count_parameters(adapted).trainable


def test_the_saved_targets_are_full_names_in_a_pattern(saved, base):
    config = json.loads((saved[0] / "adapter_config.json").read_text())
    expected = adapted_modules(get_peft_sam3(base))
    assert sorted(config["target_modules"].replace("\\", "").split("|")) == sorted(expected)
    assert config["peft_type"] == "LORA"
    assert config["inference_mode"] is True
    assert config["auto_mapping"] == {
        "base_model_class": "Sam3Image",
        "parent_library": "sam3.model.sam3_image",
    }


def test_wrapper_and_inner_model_save_the_same_files(base, tmp_path):
    adapted = get_peft_sam3(base)
    save_adapter(adapted, tmp_path / "wrapper")
    save_adapter(base, tmp_path / "inner")
    for name in ADAPTER_FILES:
        assert (tmp_path / "wrapper" / name).read_bytes() == (tmp_path / "inner" / name).read_bytes()


def test_saving_changes_nothing_in_the_model(base, tmp_path):
    adapted = get_peft_sam3(base)
    before, config = tensors_of(adapted), copy.deepcopy(adapted.peft_config["default"])
    save_adapter(adapted, tmp_path / "adapter")
    assert_same(adapted.state_dict(), before)
    assert adapted.peft_config["default"] == config


def test_a_saved_adapter_is_replaced_and_nothing_stays_behind(base, saved, tmp_path):
    folder = save_adapter(get_peft_sam3(base, "minimal"), tmp_path / "runs" / "last")
    (folder / "README.md").unlink()
    first = load_file(folder / "adapter_model.safetensors")
    save_adapter(randomize(base), folder)
    second = load_file(folder / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[name], second[name]) for name in first)
    assert [path.name for path in folder.parent.iterdir()] == ["last"]


def test_a_failure_while_writing_leaves_the_old_adapter_and_nothing_else(base, tmp_path, monkeypatch):
    folder = save_adapter(get_peft_sam3(base, "minimal"), tmp_path / "last")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("sam3_lora.adapter.saving.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(randomize(base), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_folder_with_other_files_is_never_replaced(base, tmp_path):
    (tmp_path / "photo.jpg").write_text("precious")
    with pytest.raises(OutputError, match=r"holds \['photo.jpg'\]"):
        save_adapter(get_peft_sam3(base, "minimal"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_file_in_place_of_the_folder_is_never_replaced(base, tmp_path):
    (tmp_path / "adapter").write_text("precious")
    with pytest.raises(OutputError, match="is a file"):
        save_adapter(get_peft_sam3(base, "minimal"), tmp_path / "adapter")


def test_a_model_without_that_adapter_cannot_be_saved(base, tmp_path):
    with pytest.raises(AdapterError, match="this model has no adapter 'default'; it has none"):
        save_adapter(base, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"no adapter 'cats'; it has \['default'\]"):
        save_adapter(get_peft_sam3(base, "minimal"), tmp_path / "adapter", adapter_name="cats")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "in_metadata", "shown"),
    [
        pytest.param("facebook/sam3", True, "- Base model: `facebook/sam3`", id="Hub id"),
        pytest.param("tiny", False, "- Base model: `tiny`", id="plain name"),
        pytest.param(None, False, "- Base model: not recorded", id="unknown"),
    ],
)
def test_the_base_model_is_recorded_in_config_and_card(base, tmp_path, name, in_metadata, shown):
    if name is not None:
        base.name_or_path = name
    folder = save_adapter(get_peft_sam3(base), tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == name
    card = (folder / "README.md").read_text()
    assert shown in card
    assert (f"base_model: {name}\n" in card) == (f"- base_model:adapter:{name}\n" in card) == in_metadata


def test_the_base_model_can_be_named_by_hand(base, tmp_path):
    adapted = get_peft_sam3(base, base_model_name_or_path="facebook/sam3")
    assert adapted.peft_config["default"].base_model_name_or_path == "facebook/sam3"
    assert "base_model: facebook/sam3" in (save_adapter(adapted, tmp_path / "a") / "README.md").read_text()


def test_the_card_tells_what_is_adapted_how_to_load_it_and_the_license(saved):
    card = (saved[0] / "README.md").read_text()
    for line in (
        "- Preset: balanced",
        "- Parameters: 133,120",
        "| vision_encoder | attention | 8 | 8 | 16 |",
        "| detr_decoder | attention | 36 | 16 | 32 |",
        'model = sam3_lora.load_adapter(base, "path/to/this/folder")',
        "license_name: sam-license",
    ):
        assert line in card


def test_the_card_names_no_preset_that_was_changed(base, tmp_path):
    folder = save_adapter(get_peft_sam3(base, "minimal", r=4), tmp_path / "adapter")
    assert "- Preset: none" in (folder / "README.md").read_text()


def test_the_record_tells_what_the_adapter_was_made_with_and_for(base, tmp_path):
    base.name_or_path = "tiny"
    adapted = get_peft_sam3(base, "balanced")
    training = {"epoch": 3, "metrics": {"segm_AP": 0.5}}
    save_adapter(adapted, tmp_path / "a", prompts=["red circle", "crack"], training=training)
    record = json.loads((tmp_path / "a" / "sam3_lora.json").read_text())
    content = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    assert record["weights_sha256"] == hashlib.sha256(content).hexdigest()
    assert record["versions"].keys() == {"sam3-lora", "sam3", "peft", "torch"}
    assert record["base_fingerprint"].keys() == set(EVERYTHING["components"])
    assert {
        key: record[key] for key in ("base", "preset", "modules", "parameters", "prompts", "training")
    } == {
        "base": "tiny",
        "preset": "balanced",
        "modules": 68,
        "parameters": 133_120,
        "prompts": ["red circle", "crack"],
        "training": training,
    }


# --- Loading ---


def test_what_the_record_says_of_the_training_survives_loading_and_saving_again(base, tmp_path):
    folder = save_adapter(
        get_peft_sam3(fresh_copy(base), "minimal"), tmp_path / "a", prompts=["crack"], training={"epoch": 3}
    )
    again = save_adapter(load_adapter(base, folder, is_trainable=True), tmp_path / "b")
    assert (again / "sam3_lora.json").read_bytes() == (folder / "sam3_lora.json").read_bytes()


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(split_attention, id="split attention"),
        pytest.param(lambda model: model.to(torch.bfloat16), id="bfloat16"),
        pytest.param(lambda model: model.train(), id="training mode"),
    ],
)
def test_the_same_base_in_another_form_is_no_other_base(variant, saved, base):
    assert len(adapted_modules(load_adapter(variant(base), saved[0]))) == 68


def test_a_base_into_which_the_adapter_was_merged_is_another_base(base, pristine, tmp_path):
    adapted = randomize(get_peft_sam3(base, "minimal"))
    folder = save_adapter(adapted, tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    with pytest.raises(AdapterError, match=r"base: detr_decoder of this model is not as in .*only once"):
        load_adapter(merged, folder)


def test_an_adapter_without_a_record_loads_by_its_tensors_alone(saved, base, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "adapter")
    (folder / "sam3_lora.json").unlink()
    assert_same(forward(load_adapter(base, folder)), saved[1])


def test_an_adapter_does_not_load_where_a_module_would_not_be_called(base, pristine, tmp_path):
    folder = save_adapter(get_peft_sam3(base, "full"), tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"blocks\.0\.mlp\.fc1: .* reads fc1\.weight without calling fc1"):
        load_adapter(with_main_mlp(fresh_copy(pristine)), folder)


def test_an_adapter_does_not_load_into_a_model_that_only_holds_the_image_model(saved, base):
    with pytest.raises(TargetError, match=r"pass model\.detector"):
        load_adapter(nn.ModuleDict({"detector": base}), saved[0])


@pytest.mark.parametrize(
    "path", [pytest.param("dump.pth", id="the file"), pytest.param("", id="the folder that holds it")]
)
def test_a_pickle_is_refused_with_the_reason(path, base, tmp_path):
    torch.save({"lora_A": torch.ones(2)}, tmp_path / "dump.pth")
    with pytest.raises(AdapterError, match=r"can run code when .* read"):
        load_adapter(base, tmp_path / path)


def test_a_reloaded_adapter_gives_bit_identical_outputs_and_tensors(saved, base, tmp_path):
    folder, expected = saved
    adapted = load_adapter(base, folder)
    assert_same(forward(adapted), expected)
    again = save_adapter(adapted, tmp_path / "again")
    for name in ADAPTER_FILES:
        assert (again / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_plain_peft_loads_the_folder_bit_identically(saved, base, low_cpu_mem_usage):
    folder, expected = saved
    plain = peft.PeftModel.from_pretrained(split_attention(base), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same(forward(plain), expected)


def test_a_folder_written_by_plain_peft_loads(base, pristine, tmp_path):
    adapted = randomize(get_peft_sam3(base, "minimal"))
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    assert_same(forward(load_adapter(fresh_copy(pristine), tmp_path)), forward(adapted))


def test_a_loaded_adapter_is_frozen_unless_it_is_to_be_trained(saved, pristine):
    frozen = load_adapter(fresh_copy(pristine).train(), saved[0])
    assert count_parameters(frozen).trainable == 0
    assert not frozen.training
    trainable = load_adapter(fresh_copy(pristine).train(), saved[0], is_trainable=True)
    assert count_parameters(trainable).trainable == 133_120
    assert trainable.training


def test_an_adapter_can_be_loaded_under_another_name(saved, base, tmp_path):
    folder, expected = saved
    adapted = load_adapter(base, folder, "cats")
    assert list(adapted.peft_config) == ["cats"]
    assert_same(forward(adapted), expected)
    again = save_adapter(adapted, tmp_path / "again", adapter_name="cats")
    assert_same(
        load_file(again / "adapter_model.safetensors"), load_file(folder / "adapter_model.safetensors")
    )


def test_the_recorded_base_survives_a_base_without_a_name(base, pristine, tmp_path):
    base.name_or_path = "facebook/sam3"
    folder = save_adapter(get_peft_sam3(base, "minimal"), tmp_path / "adapter")
    adapted = load_adapter(fresh_copy(pristine), folder)
    assert adapted.peft_config["default"].base_model_name_or_path == "facebook/sam3"


def edit_weights(edit):
    def damage(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file(edit(tensors), path)

    return damage


def edit_config(**changes):
    def damage(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def cut_short(name):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


FIRST, LAST = (
    f"{PREFIX}{name}.weight"
    for name in (
        "backbone.vision_backbone.trunk.blocks.0.attn.qkv.lora_A",
        "transformer.decoder.layers.2.cross_attn.out_proj.lora_B",
    )
)


def edit_record(**changes):
    def damage(folder):
        path = folder / "sam3_lora.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def edit_config_and_forget(**changes):
    def damage(folder):
        edit_config(**changes)(folder)
        (folder / "sam3_lora.json").unlink()

    return damage


def edit_weights_and_forget(edit):
    def damage(folder):
        edit_weights(edit)(folder)
        (folder / "sam3_lora.json").unlink()

    return damage


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("damage", "problems"),
    [
        pytest.param(
            edit_weights(without(FIRST)), [f"{FIRST}: missing in the file"], id="one tensor missing"
        ),
        pytest.param(
            edit_weights(
                lambda t: {**without(FIRST)(t), LAST: t[LAST][:-1], PREFIX + "stray": torch.ones(1)}
            ),
            [
                "4 problems",
                "adapter_model.safetensors: not the file that was saved",
                f"{FIRST}: missing",
                f"{PREFIX}stray: no place",
                f"{LAST}: shape (63, 16) in the file, (64",
            ],
            id="missing, unexpected and misshaped at once",
        ),
        pytest.param(
            edit_weights(lambda t: {name.removeprefix(PREFIX): tensor for name, tensor in t.items()}),
            ["has keys without PEFT's prefix 'base_model.model.'"],
            id="no prefix",
        ),
        pytest.param(edit_weights(lambda t: {}), ["137 problems", "and 107 more"], id="no tensor at all"),
        pytest.param(edit_config(r=4), ["shape (16, 64) in the file, (4, 64) in the model"], id="another r"),
        pytest.param(
            edit_config(use_dora=True), ["lora_magnitude_vector: missing"], id="another kind of LoRA"
        ),
        pytest.param(
            edit_weights(lambda t: {**t, LAST: t[LAST] + 1e-3}),
            ["adapter_model.safetensors: not the file that was saved", "delete sam3_lora.json"],
            id="another value in one tensor",
        ),
        pytest.param(
            edit_weights_and_forget(lambda t: {**t, LAST: t[LAST] / 0}),
            [f"{LAST}: holds NaN or infinity"],
            id="not a number",
        ),
        pytest.param(
            edit_weights_and_forget(lambda t: {**t, LAST: t[LAST].long()}),
            [f"{LAST}: is torch.int64"],
            id="whole numbers",
        ),
        pytest.param(edit_config(lora_alpha=99), ["other settings than the adapter"], id="another alpha"),
        pytest.param(edit_config(use_rslora=True), ["other settings than the adapter"], id="another scaling"),
        pytest.param(
            edit_config(init_lora_weights="pissa"), ["other settings than the adapter"], id="another start"
        ),
        pytest.param(
            edit_config(rank_pattern=None), ["refuses these settings (AttributeError)"], id="no rank pattern"
        ),
        pytest.param(
            edit_config_and_forget(lora_alpha=0, alpha_pattern={}),
            ["68 problems", "qkv: lora_alpha must be a positive number, got 0"],
            id="alpha zero",
        ),
        pytest.param(
            edit_config(target_modules=r"transformer\.decoder\.layers\.0\.linear1"),
            ["linear1.lora_A.weight: missing", "no place in the model", "other settings than the adapter"],
            id="other targets",
        ),
        pytest.param(
            edit_record(component_map_version=99, versions={"sam3": "9.9.1", "sam3-lora": "7.0"}),
            [
                "2 problems",
                "component map: the adapter has version 99, this sam3-lora 1; load it with sam3-lora 7.0",
                "sam3: the adapter was trained with 9.9.1, here is",
            ],
            id="other versions",
        ),
        pytest.param(
            edit_record(base_fingerprint={"detr_decoder": "0", "scoring": "1", "unheard_of": "2"}),
            ["base: detr_decoder, scoring of this model is not as in"],
            id="another base",
        ),
        pytest.param(
            edit_record(format_version=9), ["in a format that this one", "install the newer one"], id="newer"
        ),
        pytest.param(edit_record(format_version=None), ["sam3_lora.json' is damaged"], id="no format"),
        pytest.param(cut_short("sam3_lora.json"), ["sam3_lora.json' is damaged"], id="half a record"),
        pytest.param(edit_config(peft_type="IA3"), ["does not fit this model"], id="another method"),
        pytest.param(edit_config(peft_type="PREFIX_TUNING"), ["not for SAM3"], id="a method for text"),
        pytest.param(edit_config(peft_type="LORE"), ["adapter_config.json' is damaged"], id="unknown method"),
        pytest.param(edit_config(target_modules="nothing"), ["does not fit this model"], id="no target"),
        pytest.param(cut_short("adapter_config.json"), ["adapter_config.json' is damaged"], id="half a JSON"),
        pytest.param(
            cut_short("adapter_model.safetensors"),
            ["adapter_model.safetensors' is damaged"],
            id="half a tensor file",
        ),
        pytest.param(
            lambda folder: (folder / "adapter_config.json").unlink(),
            ["it has no adapter_config.json"],
            id="no config",
        ),
        pytest.param(
            lambda folder: [path.unlink() for path in folder.iterdir()],
            ["it has no adapter_model.safetensors and no adapter_config.json"],
            id="empty folder",
        ),
    ],
)
def test_a_wrong_adapter_is_refused_with_all_its_problems_and_leaves_the_model_as_it_was(
    damage, problems, base, pristine, tmp_path
):
    folder = save_adapter(get_peft_sam3(fresh_copy(pristine)), tmp_path / "adapter")
    damage(folder)
    before = tensors_of(base)
    with pytest.raises(AdapterError) as raised:
        load_adapter(base, folder)
    assert [problem for problem in problems if problem not in str(raised.value)] == []
    assert_same(base.state_dict(), before)
    assert [p.requires_grad for p in base.parameters()] == [p.requires_grad for p in pristine.parameters()]
    assert not any(isinstance(module, SplitAttention) for module in base.modules())
