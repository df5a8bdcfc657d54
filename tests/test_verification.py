import json
import random

import peft
import pytest
import torch
import torch.nn.functional as F
from tiny_forward import forward
from torch import nn

from sam3_lora.adapter import get_peft_sam3, save_adapter
from sam3_lora.attention import split_attention
from sam3_lora.base.loading import load_base
from sam3_lora.cli import main
from sam3_lora.components import COMPONENTS, KINDS
from sam3_lora.errors import AdapterError, ConfigError
from sam3_lora.verification import LEAST_MOVEMENT, verify_adapter

torch.set_num_threads(1)

EVERYTHING = {"components": list(COMPONENTS), "kinds": list(KINDS)}
LIVE = "transformer.decoder.layers.0.linear1"
FC1 = "backbone.vision_backbone.trunk.blocks.0.mlp.fc1"


@pytest.fixture
def base():
    return load_base("tiny", device="cpu")


@pytest.fixture
def everything(base):
    return get_peft_sam3(base, **EVERYTHING)


def adapted_by_plain_peft(base: nn.Module, *names: str) -> nn.Module:
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=list(names)))


def test_every_module_of_the_component_map_is_alive(everything):
    result = verify_adapter(everything)
    assert (result.checked, result.dead) == (138, [])
    assert min(proof.moved for proof in result.modules.values()) > 10 * LEAST_MOVEMENT
    assert min(proof.gradient for proof in result.modules.values()) > 0


@pytest.mark.parametrize(
    ("dead", "reason"),
    [
        pytest.param(
            "transformer.decoder.layers.0.self_attn.out_proj",
            "reads its weight without calling it",
            id="out_proj of fused attention in the decoder",
        ),
        pytest.param(
            "backbone.language_backbone.encoder.transformer.resblocks.1.attn.out_proj",
            "reads its weight without calling it",
            id="out_proj of fused attention in the text encoder",
        ),
        pytest.param(
            "segmentation_head.pixel_decoder.conv_layers.2", "two upsampling steps", id="third upsampling"
        ),
        pytest.param("backbone.vision_backbone.convs.3.conv_1x1", "scalp=1", id="level that is dropped"),
        pytest.param("backbone.vision_backbone.convs.3.conv_3x3", "scalp=1", id="level that is dropped, 3x3"),
        pytest.param("geometry_encoder.points_direct_project", "no point prompts", id="points, direct"),
        pytest.param("geometry_encoder.points_pool_project", "no point prompts", id="points, pooled"),
        pytest.param("geometry_encoder.points_pos_enc_project", "no point prompts", id="points, encoded"),
    ],
)
def test_a_dead_module_is_named_with_the_reason_and_a_live_one_beside_it_is_not(base, dead, reason):
    result = verify_adapter(adapted_by_plain_peft(base, dead, LIVE))
    assert result.dead == [dead]
    assert reason in result.modules[dead].dead_because
    assert result.modules[dead].moved <= LEAST_MOVEMENT
    assert result.modules[dead].gradient == 0
    assert result.modules[LIVE].moved > LEAST_MOVEMENT


class ReadsItsWeight(nn.Module):
    """An MLP like that of sam3's main branch, which gives ``fc1.weight`` to a fused kernel when gradients are off."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = mlp.fc1, mlp.act, mlp.fc2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(x) if torch.is_grad_enabled() else F.linear(x, self.fc1.weight, self.fc1.bias)
        return self.fc2(self.act(hidden))


def test_a_module_whose_weight_is_read_at_inference_is_dead_though_it_trains(base):
    block = base.backbone.vision_backbone.trunk.blocks[0]
    block.mlp = ReadsItsWeight(block.mlp)
    result = verify_adapter(adapted_by_plain_peft(base, FC1, FC1.replace("fc1", "fc2")))
    assert result.dead == [FC1]
    assert "reads its weight" in result.modules[FC1].dead_because
    assert result.modules[FC1].gradient > 0


def test_a_module_without_a_gradient_is_dead_though_it_moves_the_output(base):
    head = base.transformer.decoder.presence_token_head
    head.register_forward_hook(lambda module, inputs, output: output.detach())
    name = "transformer.decoder.presence_token_head.layers.0"
    result = verify_adapter(adapted_by_plain_peft(base, name, LIVE))
    assert result.dead == [name]
    assert result.modules[name].dead_because == "the losses give it no gradient"
    assert result.modules[name].moved > LEAST_MOVEMENT


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({"use_dora": True}, id="DoRA"),
        pytest.param({"lora_bias": True}, id="bias in B"),
        pytest.param({"lora_dropout": 0.9}, id="dropout"),
        pytest.param({"r": 1}, id="rank 1"),
    ],
)
def test_kinds_of_lora_are_alive(base, overrides):
    assert verify_adapter(get_peft_sam3(base, "minimal", **overrides)).dead == []


def test_the_model_is_as_it_was_afterwards(everything):
    inner = everything.get_base_model().train()
    inner.backbone.eval()
    with torch.no_grad():
        for parameter in inner.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    outputs, states = forward(inner.eval()), {n: t.clone() for n, t in inner.state_dict().items()}
    inner.train()
    inner.backbone.eval()
    modes = [module.training for module in inner.modules()]
    trained = [parameter.requires_grad for parameter in inner.parameters()]
    random_states = torch.get_rng_state(), random.getstate()
    verify_adapter(everything)
    assert all(torch.equal(tensor, states[name]) for name, tensor in inner.state_dict().items())
    assert [module.training for module in inner.modules()] == modes
    assert [parameter.requires_grad for parameter in inner.parameters()] == trained
    assert all(parameter.grad is None for parameter in inner.parameters())
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]
    after = forward(inner.eval())
    assert all(torch.equal(after[name], outputs[name]) for name in outputs)


def test_only_the_adapter_that_is_asked_for_is_checked(base):
    adapted = get_peft_sam3(base, "minimal")
    adapted.add_adapter("other", peft.LoraConfig(r=2, target_modules=[LIVE]))
    adapted.set_adapter("default")
    assert list(verify_adapter(adapted, adapter_name="other").modules) == [LIVE]
    assert adapted.active_adapters == ["default"]
    assert verify_adapter(adapted).checked == 42


def test_progress_counts_to_the_number_of_modules(base):
    seen = []
    verify_adapter(get_peft_sam3(base, "minimal"), on_progress=lambda *counts: seen.append(counts))
    assert seen == [(done, 42) for done in range(1, 43)]


def merged(base: nn.Module) -> nn.Module:
    adapted = get_peft_sam3(base, "minimal")
    adapted.merge_adapter()
    return adapted


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        pytest.param(lambda base: base, AdapterError, "no adapter 'default'; it has none", id="no adapter"),
        pytest.param(merged, AdapterError, "is merged into the base, in 42 of 42 modules", id="merged"),
        pytest.param(lambda base: nn.Linear(2, 2), ConfigError, "got a Linear", id="no SAM3"),
    ],
)
def test_what_cannot_be_verified_is_refused(base, make, error, message):
    with pytest.raises(error, match=message):
        verify_adapter(make(base))


def test_the_command_prints_what_was_checked_and_what_is_dead(capsys):
    assert main(["verify", "--base", "tiny", "--preset", "full", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["checked"], printed["dead"]) == (90, [])
    assert printed["modules"][LIVE].keys() == {"moved", "output", "gradient", "dead_because"}


def test_the_command_verifies_a_saved_adapter_on_its_own_base(base, tmp_path, capsys):
    save_adapter(get_peft_sam3(base, "minimal"), tmp_path / "adapter")
    assert main(["verify", "--adapter", str(tmp_path / "adapter")]) == 0
    printed = capsys.readouterr().out
    assert "42 modules" in printed
    assert "none" in printed


def test_the_command_fails_for_a_dead_module(base, tmp_path, capsys):
    dead = "segmentation_head.pixel_decoder.conv_layers.2"
    base.name_or_path = "tiny"
    adapted_by_plain_peft(split_attention(base), dead, LIVE).save_pretrained(tmp_path / "adapter")
    assert main(["verify", "--adapter", str(tmp_path / "adapter")]) == 1
    assert f"without effect on 1 of 2 modules: {dead}: three levels" in capsys.readouterr().err


def test_an_adapter_beside_a_preset_is_refused(capsys):
    assert main(["verify", "--adapter", "somewhere", "--preset", "full"]) == 1
    assert "leave out --preset and --set" in capsys.readouterr().err
