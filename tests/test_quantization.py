"""A base in 8 or 4 bits on the CPU: the real packages, the tiny model."""

import sys

import bitsandbytes
import pytest
import torch
from tiny_forward import forward, forward_with_gradients

from sam3_lora.adapter import adapted_modules, get_peft_sam3, load_adapter, save_adapter
from sam3_lora.attention import split_attention
from sam3_lora.base.loading import load_base
from sam3_lora.base.quantization import _METHODS, quantize_base
from sam3_lora.errors import AdapterError, ConfigError
from sam3_lora.training import build_sam3_lora_model

torch.set_num_threads(1)


@pytest.fixture(params=["int8", "bnb-8bit"])
def method(request):
    """What works on a CPU."""
    return request.param


def quantised(method):
    return load_base("tiny", device="cpu", quantization=method)


def trained(model):
    """Return the model with an adapter after two steps on all outputs."""
    adapted = get_peft_sam3(model, "full")
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        outputs = forward_with_gradients(adapted.get_base_model())
        sum(output.square().mean() for output in outputs.values()).backward()
        optimizer.step()
    return adapted


def test_a_quantised_base_gives_nearly_the_same_outputs_and_takes_its_weights_as_whole_numbers(method):
    base = split_attention(load_base("tiny", device="cpu"))
    model = quantised(method)
    expected, found = forward(base), forward(model)
    assert 0 < (found["pred_logits"] - expected["pred_logits"]).abs().max() < 0.02
    weight = model.backbone.language_backbone.encoder.transformer.resblocks[0].attn.q_proj.weight
    assert type(weight) is not torch.nn.Parameter
    untouched = model.transformer.decoder.layers[0].linear1.weight
    assert torch.equal(untouched, base.transformer.decoder.layers[0].linear1.weight)


def test_an_adapter_on_a_quantised_base_is_fresh_trains_and_reloads(method, tmp_path):
    model = quantised(method)
    before = forward(model)
    fresh = get_peft_sam3(model, "full")
    assert len(adapted_modules(fresh)) == 90
    after = forward(model)
    assert all(torch.equal(after[name], before[name]) for name in before)

    adapted = trained(quantised(method))
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    assert all(p.dtype == torch.float32 for p in adapted.parameters() if p.requires_grad)
    expected = forward(adapted.eval())
    assert any((expected[name] - before[name]).abs().max() > 1e-4 for name in before)
    folder = save_adapter(adapted, tmp_path / "adapter")
    found = forward(load_adapter(quantised(method), folder))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_adapter_goes_from_a_quantised_base_to_the_full_one_and_to_no_other(method, tmp_path):
    folder = save_adapter(trained(quantised(method)), tmp_path / "adapter")
    assert adapted_modules(load_adapter(load_base("tiny", device="cpu"), folder))
    other = load_base("tiny", device="cpu")
    with torch.no_grad():
        other.backbone.vision_backbone.trunk.blocks[0].attn.qkv.weight.mul_(1.5)
    with pytest.raises(AdapterError, match="base: vision_encoder of this model is not as in"):
        load_adapter(quantize_base(other, method), folder)


def test_the_builder_of_the_trainer_takes_it(method):
    model = build_sam3_lora_model("tiny", "minimal", quantization=method)
    assert type(model.backbone.vision_backbone.trunk.blocks[0].mlp.fc1.weight) is not torch.nn.Parameter
    assert len(adapted_modules(model)) == 42


def test_other_components_can_be_chosen():
    model = quantize_base(load_base("tiny", device="cpu"), "int8", ["detr_encoder"])
    kinds = {
        name: type(model.get_submodule(name).weight) is torch.nn.Parameter
        for name in (
            "transformer.encoder.layers.0.linear1",
            "backbone.vision_backbone.trunk.blocks.0.mlp.fc1",
        )
    }
    assert list(kinds.values()) == [False, True]


@pytest.mark.parametrize(
    ("arguments", "error", "problem"),
    [
        pytest.param(["int3"], ConfigError, "unknown quantization 'int3'; did you mean 'int8'?", id="method"),
        pytest.param(["int8", ["vision"]], ConfigError, "did you mean 'vision_encoder'?", id="component"),
    ],
)
def test_what_does_not_exist_is_refused(arguments, error, problem):
    with pytest.raises(error) as raised:
        quantize_base(load_base("tiny", device="cpu"), *arguments)
    assert problem in str(raised.value)


def test_4_bits_are_refused_on_a_cpu():
    with pytest.raises(ConfigError, match="bnb-4bit needs CUDA"):
        load_base("tiny", device="cpu", quantization="bnb-4bit")


def test_peft_trains_lora_on_layers_of_4_bits():
    """As far as the CPU goes: in training mode, where bitsandbytes does not repack the weights."""
    model = split_attention(load_base("tiny", device="cpu"))
    names = [f"transformer.encoder.layers.0.linear{number}" for number in (1, 2)]
    _METHODS["bnb-4bit"](bitsandbytes, model, names)
    adapted = get_peft_sam3(model, target_modules=names)
    layers = [model.get_submodule(name).train() for name in names]
    assert [type(layer).__name__ for layer in layers] == ["Linear4bit"] * 2
    sum(output.square().mean() for output in forward_with_gradients(model).values()).backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_an_adapted_model_is_refused():
    with pytest.raises(AdapterError, match="has an adapter already"):
        quantize_base(get_peft_sam3(load_base("tiny", device="cpu"), "minimal").get_base_model(), "int8")


def test_a_missing_package_is_named_with_the_command_that_brings_it(method, monkeypatch):
    for package in ("torchao", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, f"{package}.quantization", None)
    with pytest.raises(ConfigError, match=r"pip install 'sam3-lora\[quantization\]'"):
        quantised(method)
