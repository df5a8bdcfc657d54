"""Methods of PEFT other than LoRA: settings of PEFT in the place of the preset."""

import json

import peft
import pytest
import torch
from tiny_forward import assert_close, forward, two_steps, untouched

from sam3_lora.adapter import (
    adapted_modules,
    combine_adapters,
    count_parameters,
    disable_adapter,
    get_peft_sam3,
    hotswap_adapter,
    load_adapter,
    save_adapter,
    scale_adapter,
    set_adapter,
    unload,
)
from sam3_lora.attention import split_attention
from sam3_lora.errors import AdapterError, ConfigError, TargetError
from sam3_lora.training.builder import build_sam3_lora_model
from sam3_lora.verification import verify_adapter

torch.set_num_threads(1)

METHODS = [
    pytest.param(peft.LoHaConfig(r=2), id="LoHa"),
    pytest.param(peft.LoKrConfig(r=2), id="LoKr", marks=pytest.mark.slow),
    pytest.param(peft.OFTConfig(oft_block_size=4), id="OFT"),
    pytest.param(peft.BOFTConfig(boft_block_size=4), id="BOFT", marks=pytest.mark.slow),
    pytest.param(peft.IA3Config(), id="IA3"),
    pytest.param(peft.VeraConfig(r=4), id="VeRA, whose matrices all layers share"),
    pytest.param(
        peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, topk=1), id="VB-LoRA, a shared bank of vectors"
    ),
]
DECODER = {"components": ["detr_decoder"], "kinds": ["attention", "mlp"]}


def trained(config, **places):
    return two_steps(get_peft_sam3(untouched(), config, **(places or DECODER)), lr=0.02)


@pytest.mark.parametrize("config", METHODS)
def test_a_method_trains_reloads_on_an_untouched_base_and_merges(config, tmp_path):
    adapted = trained(config)
    expected, base = forward(adapted), forward(untouched())
    assert any((expected[name] - base[name]).abs().max() > 1e-5 for name in base)
    folder = save_adapter(adapted.get_base_model(), tmp_path / "adapter")
    loaded = load_adapter(untouched(), folder)
    assert_close(forward(loaded), expected)
    assert_close(forward(peft.PeftModel.from_pretrained(split_attention(untouched()), folder)), expected)
    with disable_adapter(loaded):
        assert_close(forward(loaded), base)
    assert_close(forward(loaded.merge_and_unload()), expected)
    record = json.loads((folder / "sam3_lora.json").read_text())
    assert record["modules"] == len(adapted_modules(adapted)) == 42
    assert record["parameters"] >= count_parameters(adapted).trainable
    card = (folder / "README.md").read_text()
    assert f"# {config.peft_type.value} adapter for SAM3" in card
    assert "| detr_decoder | attention | 36 | - | - |" in card


@pytest.mark.parametrize("config", [METHODS[0], METHODS[5]])
def test_two_adapters_of_a_method_switch_on_one_base(config, tmp_path):
    first = save_adapter(trained(config), tmp_path / "first")
    second = save_adapter(trained(config, components=["scoring"], kinds=["mlp", "proj"]), tmp_path / "second")
    alone = {folder: forward(load_adapter(untouched(), folder)) for folder in (first, second)}
    base = untouched()
    model = load_adapter(base, first, "first")
    load_adapter(base, second, "second")
    for name, folder in (("second", second), ("first", first)):
        set_adapter(model, name)
        assert_close(forward(model), alone[folder], 0)
    assert_close(forward(unload(model)), forward(untouched()))


def test_modules_are_chosen_as_for_lora():
    model = get_peft_sam3(untouched(), peft.LoHaConfig(r=2), components=["text_encoder"])
    assert {name.split(".")[1] for name in adapted_modules(model)} == {"language_backbone"}
    config = peft.IA3Config(target_modules=["linear1"], exclude_modules=["decoder.layers.0.linear1"])
    named = adapted_modules(get_peft_sam3(untouched(), config))
    assert {name.rpartition(".")[2] for name in named} == {"linear1"}
    assert "transformer.decoder.layers.1.linear1" in named
    assert "transformer.decoder.layers.0.linear1" not in named


def test_ia3_scales_an_mlp_at_its_inputs_and_attention_at_its_outputs():
    model = get_peft_sam3(untouched(), peft.IA3Config(), **DECODER).get_base_model()
    layer = model.transformer.decoder.layers[0]
    assert layer.linear1.is_feedforward
    assert not layer.self_attn.q_proj.is_feedforward


def test_whole_layers_can_be_trained_beside_any_method(tmp_path):
    adapted = trained(peft.LoHaConfig(r=2), **DECODER, train_also=["box_heads"])
    expected = forward(adapted)
    assert_close(forward(load_adapter(untouched(), save_adapter(adapted, tmp_path / "adapter"))), expected)


def test_a_lora_config_gives_what_its_fields_as_keywords_give():
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["linear1", "linear2"], use_rslora=True)
    by_config = get_peft_sam3(untouched(), config)
    by_keywords = get_peft_sam3(
        untouched(), target_modules=["linear1", "linear2"], r=3, lora_alpha=5, use_rslora=True
    )
    assert adapted_modules(by_config) == adapted_modules(by_keywords)
    assert count_parameters(by_config) == count_parameters(by_keywords)
    layer = by_config.get_base_model().transformer.decoder.layers[0].linear1
    assert layer.scaling == {"default": pytest.approx(5 / 3**0.5)}


@pytest.mark.parametrize(
    ("config", "settings", "problems"),
    [
        pytest.param(peft.LNTuningConfig(), {}, ["LN_TUNING is not for SAM3", "train_also"], id="norms"),
        pytest.param(peft.AdaLoraConfig(total_step=9), {}, ["every optimizer step"], id="AdaLoRA"),
        pytest.param(
            peft.FourierFTConfig(n_frequency=4),
            DECODER,
            ["it changes the outputs before any training", "init_weights=True"],
            id="random start",
        ),
        pytest.param(
            peft.OFTConfig(oft_block_size=4),
            {"components": ["vision_encoder"], "kinds": ["attention"]},
            ["OFT does not work on these modules", "shape"],
            id="four axes",
        ),
        pytest.param(
            peft.VeraConfig(r=2),
            {"components": ["segmentation_head"], "kinds": ["conv"]},
            ["VeRA"],
            id="conv",
        ),
        pytest.param(
            peft.LoHaConfig(),
            {"r": 8},
            ["r: not a setting that chooses modules", "in the PeftConfig"],
            id="r",
        ),
        pytest.param(peft.LoHaConfig(), {"components": ["decoder"]}, ["decoder"], id="component"),
    ],
)
def test_what_does_not_work_is_refused_before_the_model_is_touched(config, settings, problems):
    model = untouched()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises((ConfigError, TargetError)) as caught:
        get_peft_sam3(model, config, **settings)
    assert all(problem in str(caught.value) for problem in problems), str(caught.value)
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize(
    "action",
    [
        pytest.param(lambda m, f: scale_adapter(m, 0.5), id="scale"),
        pytest.param(lambda m, f: combine_adapters(m, {"default": 0.5}, "new"), id="combine"),
        pytest.param(lambda m, f: hotswap_adapter(m, f), id="swap"),
    ],
)
def test_what_is_for_lora_alone_says_so(action, tmp_path):
    model = get_peft_sam3(untouched(), peft.LoHaConfig(r=2), **DECODER)
    folder = save_adapter(model, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="'default' is LOHA; only LoRA can be scaled, combined or swapped"):
        action(model, folder)


def test_the_trainers_builder_takes_the_settings_of_a_method():
    model = build_sam3_lora_model("tiny", preset=peft.LoHaConfig(r=2), overrides=DECODER)
    assert len(adapted_modules(model)) == 42
    assert any("hada_w1_a" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("config", [METHODS[0], METHODS[5]])
def test_every_module_of_a_method_is_proved_to_act(config):
    model = get_peft_sam3(untouched(), config, components=["detr_decoder"], kinds=["mlp"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    proof = verify_adapter(model)
    assert proof.checked == 6
    assert proof.dead == []
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_layers_trained_whole_are_proved_too():
    model = get_peft_sam3(untouched(), "minimal", kinds=["mlp"], train_also=["scoring"])
    proof = verify_adapter(model)
    whole = [name for name in proof.modules if name.startswith("dot_prod_scoring")]
    assert (proof.checked, proof.dead) == (6 + len(whole), [])
    assert len(whole) == 5


def test_a_whole_layer_without_effect_is_named():
    dead = "backbone.vision_backbone.convs.3.conv_1x1"  # its level of the pyramid is thrown away
    model = get_peft_sam3(untouched(), "minimal", kinds=["mlp"], modules_to_save=[dead])
    assert verify_adapter(model).dead == [dead]
