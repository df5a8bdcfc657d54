"""Fifty real training steps change no base tensor by one bit."""

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sam3.train.utils.train_utils import register_omegaconf_resolvers

from sam3_lora.data.shapes import DEMO_CONCEPTS, write_coco

STEPS = 50


@pytest.fixture
def make_trainer(tmp_path, monkeypatch):
    """Make a trainer of the tiny model, in this process, that sees 50 batches of one image."""
    for split, count in (("train", STEPS), ("valid", 2)):
        write_coco(tmp_path / "data" / split, DEMO_CONCEPTS, count, seed=count)
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**environment, "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    if not OmegaConf.has_resolver("get_method"):
        register_omegaconf_resolvers()

    def make(*overrides, **training):
        settings = {"max_epochs": 1, "batch_size": 1, "num_train_workers": 0, "lr": 1e-2, **training}
        overrides = [*overrides, *(f"training.{name}={value}" for name, value in settings.items())]
        overrides += [
            f"paths.dataset_root={tmp_path / 'data'}",
            f"paths.experiment_log_dir={tmp_path / 'run'}",
        ]
        with initialize_config_module("sam3.train", version_base="1.2"):
            config = compose("sam3_lora/demo", [*overrides, "trainer.prepare=null", "adapter.preset=full"])
        return instantiate(config.trainer, _recursive_=False)

    yield make
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16 autocast"])
def test_fifty_steps_change_every_adapter_tensor_and_no_base_tensor_by_one_bit(make_trainer, amp):
    trainer = make_trainer(amp_enabled=amp)
    model = trainer.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = set()
    layer = model.module.get_submodule("transformer.encoder.layers.0.linear1.base_layer")
    layer.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    trainer.run()
    assert trainer.steps["train"] == STEPS
    assert seen == {torch.bfloat16 if amp else torch.float32}
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".lora_" in name}


@pytest.mark.slow
def test_the_trainer_trains_on_a_quantised_base(make_trainer):
    trainer = make_trainer("base.quantization=int8", batch_size=STEPS // 2)
    weight = trainer.model.module.backbone.vision_backbone.trunk.blocks[0].attn.qkv.base_layer.weight
    before = weight.qdata.clone()
    trainer.run()
    assert torch.equal(weight.qdata, before)
    assert all(p.any() for name, p in trainer.model.named_parameters() if ".lora_B." in name)


@pytest.mark.parametrize(("ratio", "rates"), [("null", {0.01: ""}), (16, {0.01: "lora_A", 0.16: "lora_B"})])
def test_lora_plus_gives_b_its_own_rate(make_trainer, ratio, rates):
    trainer = make_trainer(lora_plus_ratio=ratio)
    groups = trainer.optim.optimizer.param_groups
    trainer.optim.step_schedulers(0.0, step=0)
    names = {id(p): name for name, p in trainer.model.named_parameters() if p.requires_grad}
    found = {}
    for group in groups:
        for parameter in group["params"]:
            if id(parameter) in names:
                found.setdefault(round(group["lr"], 6), set()).add(names[id(parameter)])
    assert found.keys() == rates.keys()
    assert all(word in name for rate, word in rates.items() for name in found[rate])
    assert sum(map(len, found.values())) == len(names)


def test_a_ratio_below_one_is_refused(make_trainer):
    with pytest.raises(Exception, match=r"lora_plus_ratio must be a number of 1 or more, got 0\.5"):
        make_trainer(lora_plus_ratio=0.5)
