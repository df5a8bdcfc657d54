"""Parts that are trained whole beside LoRA."""

import json

import peft
import pytest
import torch
from tiny_forward import forward, forward_with_gradients
from torch import nn

from sam3_lora.adapter import adapted_modules, get_peft_sam3, load_adapter, save_adapter
from sam3_lora.adapter.layers import saved_modules
from sam3_lora.attention import fuse_attention, split_attention
from sam3_lora.base.loading import load_base
from sam3_lora.base.official import build_meta_sam3
from sam3_lora.components import COMPONENTS
from sam3_lora.errors import ConfigError, TargetError
from sam3_lora.train_also import WORDS, layers_of

torch.set_num_threads(1)

# Layers of the full-size model that each word stands for beside the preset balanced.
FULL_SIZE = {"scoring": 5, "segmentation_head": 14, "box_heads": 9, "norms": 158}


@pytest.fixture
def base():
    return load_base("tiny", device="cpu")


def tensors_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train(adapted, steps=2):
    """Take steps on all outputs, in eval mode: what matters is which tensors change."""
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = forward_with_gradients(adapted.get_base_model())
        sum(output.square().mean() for output in outputs.values()).backward()
        optimizer.step()
    return adapted


def change(model):
    """Give all trained tensors other values, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.02
    return model


@pytest.mark.parametrize(("word", "layers"), FULL_SIZE.items())
def test_each_word_stands_for_layers_of_the_full_size_model(word, layers):
    model = split_attention(build_meta_sam3())
    names = [name for name, _ in model.named_modules()]
    adapted = ("vision_encoder", "text_encoder", "detr_encoder", "detr_decoder")
    found = layers_of([word], names, adapted)
    assert len(found) == layers
    kinds = (
        (nn.LayerNorm, nn.GroupNorm)
        if word == "norms"
        else (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm)
    )
    assert all(isinstance(model.get_submodule(name), kinds) for name in found)


def test_norms_of_all_components_are_all_norms_but_the_one_that_nothing_reads():
    model = split_attention(build_meta_sam3())
    norms = [n for n, m in model.named_modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm))]
    assert set(norms) - set(layers_of("norms", norms, COMPONENTS)) == {
        "segmentation_head.pixel_decoder.norms.2"
    }


@pytest.mark.parametrize("word", WORDS)
def test_layers_that_are_trained_whole_act_save_load_and_merge(word, base, tmp_path):
    untouched = forward(split_attention(load_base("tiny", device="cpu")))
    adapted = get_peft_sam3(base, "minimal", train_also=[word])
    whole = saved_modules(base)
    assert whole
    assert not set(whole) & set(adapted_modules(adapted))
    fresh = forward(adapted)
    assert all(torch.equal(fresh[name], untouched[name]) for name in fresh)

    expected = forward(change(adapted))
    assert any((expected[name] - untouched[name]).abs().max() > 1e-3 for name in expected)
    folder = save_adapter(adapted, tmp_path / "adapter")
    assert json.loads((folder / "sam3_lora.json").read_text())["modules"] == 42
    for loaded in (
        load_adapter(load_base("tiny", device="cpu"), folder),
        peft.PeftModel.from_pretrained(split_attention(load_base("tiny", device="cpu")), folder),
    ):
        found = forward(loaded)
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    official = load_base("tiny", device="cpu")
    official.load_state_dict(fuse_attention(adapted.merge_and_unload()).state_dict())
    for name, tensor in forward(official).items():
        assert (tensor - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max().clamp(min=1)


@pytest.mark.parametrize("word", WORDS)
def test_every_layer_that_is_trained_whole_is_trained_and_the_base_is_not(word, base):
    adapted = get_peft_sam3(base, "minimal", train_also=word)
    before = tensors_of(base)
    train(adapted)
    after = base.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {n for n in before if ".lora_" in n or ".modules_to_save." in n}


def test_words_go_beside_modules_to_save_and_take_layers_from_lora(base):
    adapted = get_peft_sam3(
        base,
        components=["detr_decoder", "scoring"],
        kinds=["mlp", "proj"],
        train_also=["scoring"],
        modules_to_save=["presence_token_head"],
    )
    assert "transformer.decoder.presence_token_head" in saved_modules(base)
    assert "dot_prod_scoring.hs_proj" in saved_modules(base)
    assert not any(name.startswith("dot_prod_scoring") for name in adapted_modules(adapted))


def test_norms_are_those_of_the_adapted_components_alone(base):
    get_peft_sam3(base, "minimal", train_also="norms")
    assert {name.split(".")[1] for name in saved_modules(base)} == {"decoder"}


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        pytest.param(
            ["scorin"], "unknown part 'scorin'; did you mean 'scoring'? in train_also", id="misspelt"
        ),
        pytest.param(
            ["x"], "parts are scoring, segmentation_head, box_heads, norms in train_also", id="unknown"
        ),
        pytest.param([], "train_also must be some of scoring", id="empty"),
        pytest.param(3, "got 3", id="a number"),
    ],
)
def test_a_wrong_word_is_refused_with_those_there_are(value, problem, base):
    with pytest.raises(ConfigError) as error:
        get_peft_sam3(base, "minimal", train_also=value)
    assert problem in str(error.value)


@pytest.mark.parametrize("name", ["segmentation_head", "boxRPB_embed_x"])
def test_a_part_that_sam3_wraps_is_refused_as_a_module_to_save_with_the_way_out(name, base):
    with pytest.raises(TargetError, match="name its children, or use train_also"):
        get_peft_sam3(base, "minimal", modules_to_save=[name])
