"""Adapters that start from data: EVA and LoRA-GA, with the losses of a small dataset."""

import functools

import peft
import pytest
import torch
from tiny_forward import assert_close, forward, untouched

from sam3_lora import dataset_losses
from sam3_lora.adapter import adapted_modules, get_peft_sam3, load_adapter, save_adapter
from sam3_lora.adapter.layers import inner_model, strengths_of
from sam3_lora.adapter_plan import plan_adapter
from sam3_lora.data.shapes import DEMO_CONCEPTS, write_coco
from sam3_lora.errors import ConfigError, DataError
from sam3_lora.training.builder import build_sam3_lora_model
from sam3_lora.training.settings import TrainSettings, check_settings

torch.set_num_threads(1)

ATTENTION = {"components": ["detr_encoder"], "kinds": ["attention"], "r": 4}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_coco(folder / "train", DEMO_CONCEPTS, 4, seed=0)
    return folder


@pytest.fixture(scope="module")
def with_eva(dataset):
    return get_peft_sam3(
        untouched(), init_lora_weights="eva", init_data=dataset_losses(dataset, 3), **ATTENTION
    )


@pytest.fixture(scope="module")
def with_lora_ga(dataset):
    steps = dataset_losses(dataset, 2)
    return get_peft_sam3(untouched(), init_lora_weights="lora_ga", init_data=steps, **ATTENTION)


def nudged(adapted):
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.02
                )
    return adapted.eval()


def test_losses_run_an_image_each_and_leave_the_model_as_it_was(dataset):
    model = untouched()
    steps = dataset_losses(dataset, 3)
    before = {name: p.clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    losses = [step(model).item() for step in steps]
    assert len(set(losses)) == 3
    assert losses == [step(model).item() for step in steps]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert len(dataset_losses(dataset, 99)) == 4


def test_eva_starts_lora_a_from_the_main_directions_of_what_enters(with_eva, dataset):
    base = untouched()
    assert_close(forward(with_eva), forward(base))  # B is zero
    entered = {}
    name = next(name for name in adapted_modules(with_eva) if "self_attn.v_proj" in name)
    inner = inner_model(with_eva)
    layer = inner.get_submodule(name)
    hook = layer.register_forward_hook(lambda module, args, out: entered.setdefault("x", args[0]))
    with torch.no_grad():
        dataset_losses(dataset, 3)[0](inner)
    hook.remove()
    rows = entered["x"].reshape(-1, layer.in_features)
    a = layer.lora_A["default"].weight
    torch.testing.assert_close(a @ a.T, torch.eye(len(a)), atol=1e-4, rtol=0)
    spread = (rows - rows.mean(0)) @ a.T
    random = torch.linalg.qr(
        torch.randn(layer.in_features, len(a), generator=torch.Generator().manual_seed(0))
    )[0]
    assert spread.var(0).sum() > 3 * ((rows - rows.mean(0)) @ random).var(0).sum()


def test_eva_gives_more_rank_where_more_is_to_explain_and_the_same_in_all(with_eva):
    ranks = [strength.r for strength in strengths_of(inner_model(with_eva), "default").values()]
    assert len(set(ranks)) > 1
    assert sum(ranks) == 4 * plan_adapter("balanced", "tiny", init_lora_weights="eva", **ATTENTION).modules


def test_eva_reloads_as_plain_lora(with_eva, tmp_path):
    expected = forward(nudged(with_eva))
    assert_close(forward(load_adapter(untouched(), save_adapter(with_eva, tmp_path / "adapter"))), expected)


def test_lora_ga_starts_from_gradients_and_takes_them_out_of_the_base(with_lora_ga):
    assert_close(forward(with_lora_ga), forward(untouched()))
    layers = inner_model(with_lora_ga).transformer.encoder.layers
    assert layers[0].self_attn.q_proj.lora_B["default"].weight.abs().max() > 0
    assert not any(hasattr(module, "_peft_loraga_grad") for module in with_lora_ga.modules())


def test_lora_ga_reloads_on_an_untouched_base_as_plain_lora(with_lora_ga, tmp_path):
    expected = forward(nudged(with_lora_ga))
    folder = save_adapter(with_lora_ga, tmp_path / "adapter")
    assert_close(forward(load_adapter(untouched(), folder)), expected)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        pytest.param({"init_lora_weights": "eva"}, "starts from data; pass init_data", id="EVA without data"),
        pytest.param({"init_lora_weights": "lora_ga"}, "starts from data", id="LoRA-GA without data"),
        pytest.param({"init_data": [lambda model: None]}, "init_data has no effect", id="data without a use"),
        pytest.param({"init_lora_weights": "corda"}, "'corda' has no helper", id="CorDA"),
        pytest.param(
            {
                "init_lora_weights": "lora_ga",
                "init_data": [lambda model: None],
                "r": 40,
                "components": ["detr_decoder"],
            },
            "r = 40 is more than half its smaller side, 64",
            id="rank too high for both halves",
        ),
    ],
)
def test_what_cannot_start_is_refused_before_the_model_is_touched(settings, problem):
    model = untouched()
    with pytest.raises(ConfigError, match=problem):
        get_peft_sam3(model, **settings)
    assert adapted_modules(model) == []


def test_another_method_does_not_start_from_data():
    with pytest.raises(ConfigError, match="init_data is for LoRA"):
        get_peft_sam3(untouched(), peft.LoHaConfig(), init_data=[lambda model: None])


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_a_start_that_fails_leaves_the_model_as_it_was(init):
    def broken(model):
        raise RuntimeError("the disk is gone")

    model = untouched()
    names = [name for name, _ in model.named_modules()]
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="the disk is gone"):
        get_peft_sam3(model, init_lora_weights=init, init_data=[broken], **ATTENTION)
    assert adapted_modules(model) == []
    assert [name for name, _ in model.named_modules()] == names  # attention is not split either
    assert [p.requires_grad for p in model.parameters()] == trained
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_a_run_is_checked_with_its_start_from_data(dataset, tmp_path):
    settings = functools.partial(
        TrainSettings, dataset, tmp_path, base="tiny", overrides={"init_lora_weights": "eva", **ATTENTION}
    )
    check_settings(settings(config={"adapter.init_data": str(dataset)}))
    with pytest.raises(ConfigError, match="starts from data"):
        check_settings(settings())


def test_eva_gives_up_where_too_few_rows_enter_a_module(dataset, monkeypatch):
    monkeypatch.setattr("sam3_lora.adapter.starting._MOST_PASSES", 3)
    model = untouched()
    with pytest.raises(ConfigError, match="no lasting directions in 1 batches within 3 passes"):
        get_peft_sam3(
            model,
            init_lora_weights="eva",
            init_data=dataset_losses(dataset, 1),
            components=["geometry_encoder"],
            kinds=["attention"],
            r=4,
        )
    assert adapted_modules(model) == []


def test_a_dataset_without_images_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "_annotations.coco.json").write_text(
        '{"images": [], "annotations": [], "categories": []}'
    )
    with pytest.raises(DataError, match="has no images to start from"):
        dataset_losses(tmp_path)


def test_the_trainers_builder_starts_from_a_folder(dataset):
    overrides = {"init_lora_weights": "eva", **ATTENTION}
    model = build_sam3_lora_model("tiny", overrides=overrides, init_data=str(dataset))
    assert len({strength.r for strength in strengths_of(model, "default").values()}) > 1
