"""Layers that their MLP does not call are refused by name; those of sam3 0.1.4 never are."""

import pytest
import torch
from main_branch import EarlierMainMlp, MainMlp, with_main_mlp
from torch import nn

from sam3_lora.adapter import adapted_modules, get_peft_sam3
from sam3_lora.base.official import build_meta_sam3
from sam3_lora.base.tiny import build_tiny_sam3
from sam3_lora.components import resolve_targets
from sam3_lora.errors import TargetError
from sam3_lora.liveness import uncalled_modules

FC1, FC2 = (f"backbone.vision_backbone.trunk.blocks.0.mlp.{name}" for name in ("fc1", "fc2"))


def mlp_layers(model: nn.Module) -> list[str]:
    names = [name for name, _ in model.named_modules()]
    found = resolve_targets(names, ["vision_encoder", "text_encoder"], ["mlp"])
    return [name for part in found.values() for name in part]


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(build_meta_sam3, id="full size, on the meta device"),
        pytest.param(build_tiny_sam3, id="tiny"),
        pytest.param(lambda: build_tiny_sam3().to(torch.bfloat16), id="tiny, bfloat16"),
    ],
)
def test_the_official_mlps_call_all_their_layers(build):
    model = build()
    assert uncalled_modules(model, mlp_layers(model)) == {}


@pytest.mark.parametrize(
    ("cls", "reasons"),
    [
        pytest.param(
            MainMlp,
            {FC1: "main_branch.MainMlp reads fc1.weight without calling fc1 when gradients are off"},
            id="main",
        ),
        pytest.param(
            EarlierMainMlp,
            dict.fromkeys(
                (FC1, FC2),
                "main_branch.EarlierMainMlp cannot run with gradients (Expected grad to be disabled.)",
            ),
            id="earlier main",
        ),
    ],
)
def test_a_layer_that_is_read_but_not_called_is_found_with_the_reason(cls, reasons):
    model = with_main_mlp(build_tiny_sam3(), cls)
    assert uncalled_modules(model, [FC1, FC2]) == reasons


def test_one_mlp_of_each_class_is_run_whatever_their_number():
    runs = []

    class Counted(MainMlp):
        def forward(self, x):
            runs.append(torch.is_grad_enabled())
            return super().forward(x)

    model = with_main_mlp(build_tiny_sam3(), Counted)
    assert len(uncalled_modules(model, mlp_layers(model))) == 4
    assert runs == [True, False]


def test_an_mlp_with_a_forward_of_its_own_is_examined_for_itself():
    model = build_tiny_sam3()
    mlp = model.get_submodule(FC1.rpartition(".")[0])
    mlp.forward = lambda x: mlp.fc2(torch.relu(x @ mlp.fc1.weight.T))
    assert list(uncalled_modules(model, mlp_layers(model))) == [FC1]


def test_an_mlp_that_takes_other_arguments_gets_the_benefit_of_the_doubt():
    class TwoInputs(MainMlp):
        def forward(self, x, y):
            return super().forward(x + y)

    assert uncalled_modules(with_main_mlp(build_tiny_sam3(), TwoInputs), [FC1]) == {}


def test_the_examination_leaves_no_trace():
    model = build_tiny_sam3(dropout=0.5).train()
    state, hooks = torch.get_rng_state(), len(model.get_submodule(FC1)._forward_pre_hooks)
    uncalled_modules(model, mlp_layers(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(model.get_submodule(FC1)._forward_pre_hooks) == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_adapter_on_such_a_layer_is_refused_and_the_model_left_as_it_was():
    model = with_main_mlp(build_tiny_sam3())
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(TargetError) as error:
        get_peft_sam3(model, "full")
    assert str(error.value) == (
        f"{FC1} and 3 more: main_branch.MainMlp reads fc1.weight without calling fc1 when gradients are off, "
        "so that LoRA there would not act; leave them out with exclude_modules=['mlp.fc1']"
    )
    assert [name for name, _ in model.named_modules()] == before


def test_the_way_out_that_the_error_names_works():
    model = with_main_mlp(build_tiny_sam3())
    adapted = adapted_modules(get_peft_sam3(model, "full", exclude_modules=["mlp.fc1"]))
    assert FC2 in adapted
    assert FC1 not in adapted
