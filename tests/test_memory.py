"""Levers on memory: the same gradients with and without each, less held, and an adapter that saves and loads as before."""

import copy
import itertools
import re

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from official_step import register_resolvers
from tiny_forward import forward

from sam3_lora import build_sam3_lora_model, get_peft_sam3, load_adapter, load_base, save_adapter
from sam3_lora.adapter.copies import without_weights
from sam3_lora.adapter.layers import fingerprint_of
from sam3_lora.base.tiny import build_tiny_sam3
from sam3_lora.counting import count_step
from sam3_lora.data.shapes import DEMO_CONCEPTS, write_coco
from sam3_lora.errors import ConfigError
from sam3_lora.memory import ChunkedMasks, MemorySettings, apply_levers, memory_settings

OFFICIAL = {
    "eval_frozen": False,
    "bf16_base": False,
    "segmentation_chunk": None,
    "recompute_box_bias": False,
    "recompute_neck": False,
    "mask_loss_chunk": None,
    "mask_points": None,
}
ALL = {
    "eval_frozen": True,
    "bf16_base": True,
    "segmentation_chunk": 1,
    "recompute_box_bias": True,
    "recompute_neck": True,
    "mask_loss_chunk": 8,
}
LEVERS = [
    {"eval_frozen": True},
    {"segmentation_chunk": 1},
    {"segmentation_chunk": 2},
    {"recompute_box_bias": True},
    {"recompute_neck": True},
    {"mask_loss_chunk": 1},
    {"mask_loss_chunk": 3},
    {**ALL, "bf16_base": False},
]


def name_of(lever: object) -> str | None:
    return ",".join(f"{key}={value}" for key, value in lever.items()) if isinstance(lever, dict) else None


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Return a folder of datasets with one image each, by the number of prompts."""
    folder = tmp_path_factory.mktemp("datasets")
    for prompts in (1, 3):
        for split in ("train", "valid"):
            write_coco(folder / str(prompts) / split, DEMO_CONCEPTS[:prompts], 1, seed=4)
    return folder


@pytest.fixture
def make(datasets):
    """Make model, loss and batch from the config of the demo, with some levers and a fresh adapter that acts."""

    def make(prompts=3, preset="balanced", *overrides, **levers):
        register_resolvers()
        values = {**OFFICIAL, **levers}
        settings = [f"memory.{key}={'null' if value is None else value}" for key, value in values.items()]
        settings += [f"paths.dataset_root={datasets / str(prompts)}", f"adapter.preset={preset}", *overrides]
        with initialize_config_module("sam3.train", version_base="1.2"):
            config = compose("sam3_lora/demo", overrides=settings)
        torch.manual_seed(0)
        model = instantiate(config.trainer.model)
        draw_adapter(model)
        images = instantiate(config.trainer.data.train.dataset)
        batch = instantiate(config.trainer.data.train.collate_fn)([images[0]])
        loss = instantiate(config.trainer.loss.all, normalization="local")
        return model, loss, (batch[0] if isinstance(batch, list) else batch)["all"]

    return make


def draw_adapter(model):
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.02)


def loss_of(model, loss, batch):
    outputs = model(batch)
    return loss(outputs, [model.back_convert(target) for target in batch.find_targets])["core_loss"]


def gradients(model, loss, batch):
    torch.manual_seed(1)
    value = loss_of(model, loss, batch)
    value.backward()
    return value.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_equal_gradients(with_levers, without):
    (value, found), (official_value, official) = with_levers, without
    torch.testing.assert_close(value, official_value, rtol=1e-6, atol=0)
    assert found.keys() == official.keys()
    for name, gradient in official.items():
        if re.search(r"(boxRPB_embed_[xy]\.layers\.1|k_proj)\..*bias", name):
            continue  # the same for all keys, which softmax does not see: nothing but rounding
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error <= 1e-5, (name, error)
    assert sum(bool(gradient.any()) for gradient in official.values()) > len(official) / 2


@pytest.mark.parametrize(
    ("prompts", "preset", "lever"),
    [
        *itertools.product([1, 3], ["balanced"], LEVERS),
        *itertools.product([3], ["minimal", "vision", "segmentation_head"], LEVERS[-1:]),
    ],
    ids=name_of,
)
def test_gradients_with_a_lever_are_those_without(make, official_gradients, prompts, preset, lever):
    found = gradients(*make(prompts, preset, **lever))
    assert_equal_gradients(found, official_gradients(prompts, preset))


@pytest.fixture(scope="module")
def official_cache():
    return {}


@pytest.fixture
def official_gradients(make, official_cache):
    def official(prompts, preset):
        key = prompts, preset
        if key not in official_cache:
            official_cache[key] = gradients(*make(prompts, preset))
        return official_cache[key]

    return official


def test_sampled_points_give_the_loss_and_gradients_of_the_official_sampled_loss(make):
    model, loss, batch = make(mask_loss_chunk=2, mask_points=200)
    ours = gradients(model, loss, batch)
    model.zero_grad()
    official = make(mask_points=200)
    assert isinstance(loss.loss_fns_find[2], ChunkedMasks) and official[1].loss_fns_find[2].chunk is None
    theirs = gradients(*official)
    assert torch.equal(ours[0], theirs[0])
    assert all(torch.equal(ours[1][name], gradient) for name, gradient in theirs[1].items())


def count(model, loss, batch):
    held = [*model.parameters(), *model.buffers()]
    return count_step(lambda: loss_of(model, loss, batch), held)


@pytest.mark.parametrize(
    ("lever", "what"),
    [
        ({"segmentation_chunk": 1}, "flops"),
        ({"segmentation_chunk": 1}, "peak_bytes"),
        ({"recompute_box_bias": True}, "forward_bytes"),
        ({"recompute_neck": True}, "saved_bytes"),
        ({"mask_loss_chunk": 1}, "saved_bytes"),
        ({"mask_loss_chunk": 1, "mask_points": 100}, "saved_bytes"),
    ],
    ids=name_of,
)
def test_a_lever_holds_less(make, lever, what):
    assert getattr(count(*make(**lever)), what) < 0.99 * getattr(count(*make()), what)


def test_nothing_is_computed_again_in_the_head_where_no_gradient_passes(make):
    with_chunks, official = (
        count(*make(preset="minimal", segmentation_chunk=1)),
        count(*make(preset="minimal")),
    )
    assert with_chunks.flops < 0.8 * official.flops


@pytest.fixture
def noisy():
    """Return a model with dropout and DropPath, adapted in the decoder only, in training mode."""

    def noisy(**levers):
        model = get_peft_sam3(build_tiny_sam3(dropout=0.1), "minimal").get_base_model()
        apply_levers(model, MemorySettings(**levers))
        return model.train()

    return noisy


def image_features(model):
    size = (1, 3, 112, 112)
    image = torch.rand(size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return model.backbone.forward_image(image)["vision_features"]


def test_frozen_parts_have_no_noise_in_training_mode(noisy):
    official, held = noisy(), noisy(eval_frozen=True)
    first = image_features(official)  # DropPath leaves out a block now and then only
    assert not all(torch.equal(image_features(official), first) for _ in range(30))
    features = image_features(held)
    assert torch.equal(features, image_features(held))
    assert torch.equal(features, image_features(held.eval()))


def test_train_leaves_frozen_parts_in_eval_mode_and_no_other(noisy):
    model = noisy(eval_frozen=True)
    twin = copy.deepcopy(model)
    for changed in (model.train(), twin.eval().train()):
        assert not any(module.training for module in changed.backbone.vision_backbone.trunk.modules())
        assert not changed.transformer.encoder.layers[0].dropout1.training
        assert not changed.transformer.encoder.layers[0].self_attn.training
        assert changed.transformer.encoder.training and changed.transformer.encoder.layers[0].training
        assert all(module.training for module in changed.transformer.decoder.modules())
    assert copy.deepcopy(model).eval().training is False and model.training


def test_a_part_that_is_trained_whole_keeps_its_dropout():
    overrides = {"lora_dropout": 0.1, "train_also": "scoring"}
    model = build_sam3_lora_model("tiny", "minimal", overrides, memory={"eval_frozen": True}).train()
    dropout = [m for n, m in model.named_modules() if n.endswith("lora_dropout.default")]
    assert dropout and all(module.training for module in dropout)
    assert model.dot_prod_scoring.prompt_mlp.drop.training
    assert not model.geometry_encoder.encode[0].dropout1.training


def test_a_base_in_bf16_gives_the_same_bits_under_autocast(make):
    official = make(3, "balanced")
    held = make(3, "balanced", "training.amp_enabled=true", bf16_base=True)
    results = []
    for model, loss, batch in (official, held):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(gradients(model, loss, batch))
    (value, theirs), (found, ours) = results
    assert torch.equal(found, value)
    assert all(torch.equal(ours[name], gradient) for name, gradient in theirs.items())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [forward(model.eval()) for model, _, _ in (official, held)]
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}


def test_norms_embeddings_adapters_and_the_decoder_ffn_stay_fp32(make):
    model, _, _ = make(1, "balanced", "training.amp_enabled=true", bf16_base=True)
    cast = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert all(re.search(r"(weight|bias)$", name) and ".lora_" not in name for name in cast)
    left = {n for n, m in linears(model).items() if m.weight.dtype == torch.float32 and ".lora_" not in n}
    assert left == {f"transformer.decoder.layers.{i}.linear{j}" for i in range(3) for j in (1, 2)}
    assert model.backbone.language_backbone.encoder.token_embedding.weight.dtype == torch.float32
    assert all(m.weight.dtype == torch.float32 for m in model.modules() if isinstance(m, torch.nn.LayerNorm))


def test_weights_below_dora_and_weights_that_are_trained_stay_fp32():
    overrides = {"use_dora": True, "train_also": "scoring"}
    model = build_sam3_lora_model("tiny", "minimal", overrides, memory={"bf16_base": True}, amp=True)
    assert model.transformer.decoder.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.float32
    assert model.backbone.vision_backbone.trunk.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    trained = [p.dtype for p in model.parameters() if p.requires_grad]
    assert set(trained) == {torch.float32}


def test_training_on_a_bf16_base_changes_no_bit_and_the_adapter_fits_the_fp32_base(make, tmp_path):
    model, loss, batch = make(3, "balanced", "training.amp_enabled=true", **ALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss_of(model, loss, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".lora_" in name}

    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(load_base("tiny"), tmp_path / "adapter")  # refuses another base by its fingerprint
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = forward(model.eval()), forward(loaded.get_base_model())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_names_and_shapes_of_the_state_dict_stay_the_same(make):
    with_levers, official = make(1, "balanced", "training.amp_enabled=true", **ALL)[0], make(1, "balanced")[0]
    shapes = [[(n, t.shape) for n, t in model.state_dict().items()] for model in (with_levers, official)]
    assert shapes[0] == shapes[1]


def test_without_settings_the_model_is_the_official_one():
    model = build_sam3_lora_model("tiny", "minimal")
    assert type(model.segmentation_head).__module__.startswith("sam3.model")
    assert type(model.transformer.decoder).__module__.startswith("sam3.model")
    assert all(module.training for module in model.train().modules())


def test_the_shipped_configs_train_with_every_exact_lever():
    register_resolvers()
    with initialize_config_module("sam3.train", version_base="1.2"):
        config = compose("sam3_lora/balanced", overrides=["paths.dataset_root=/nowhere"])
    settings = memory_settings(config.trainer.model.memory)
    assert settings == MemorySettings(
        eval_frozen=True,
        bf16_base="auto",
        segmentation_chunk=1,
        recompute_box_bias=True,
        recompute_neck=True,
        mask_loss_chunk=8,
        mask_points=None,
    )
    masks = instantiate(config.trainer.loss.all.loss_fns_find[2])
    assert (type(masks), masks.chunk, masks.num_sample_points) == (ChunkedMasks, 8, None)


@pytest.mark.parametrize(
    ("levers", "amp", "message"),
    [
        ({"eval_frosen": True}, True, "memory: unknown key 'eval_frosen'; did you mean 'eval_frozen'?"),
        ({"segmentation_chunk": 0}, True, "memory.segmentation_chunk must be a whole number of 1 or more"),
        ({"bf16_base": "yes"}, True, "memory.bf16_base must be true or false or auto, got 'yes'"),
        ({"bf16_base": True}, False, "memory.bf16_base: true needs training.amp_enabled: true"),
    ],
)
def test_wrong_settings_are_refused(levers, amp, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_sam3_lora_model("tiny", "minimal", memory=levers, amp=amp)


def test_a_batch_without_objects_has_a_mask_loss_of_zero_at_points_too(make):
    _, loss, batch = make(1, mask_loss_chunk=2, mask_points=50)
    masks = loss.loss_fns_find[2]
    none = torch.zeros(0, dtype=torch.long)
    target = batch.find_targets[0]
    predicted = torch.randn(1, 4, 28, 28, requires_grad=True)
    targets = {"masks": target.segments[:0], "is_valid_mask": target.is_valid_segment[:0]}
    found = masks.get_loss({"pred_masks": predicted}, targets, (none, none, none), torch.tensor(1.0))
    (found["loss_mask"] + found["loss_dice"]).backward()
    assert found["loss_mask"] == found["loss_dice"] == 0 and not predicted.grad.any()


def test_masks_of_one_kind_of_query_alone_are_not_halved(make):
    with_chunks, official = make(3, segmentation_chunk=1), make(3)
    for model in (with_chunks[0], official[0]):
        model.o2m_mask_predict = False
    assert_equal_gradients(gradients(*with_chunks), gradients(*official))


def test_parts_that_are_trained_whole_get_the_same_gradients(make):
    whole = "+adapter.overrides.train_also=[segmentation_head,box_heads]"
    found = gradients(*make(3, "minimal", whole, **{**ALL, "bf16_base": False}))
    assert_equal_gradients(found, gradients(*make(3, "minimal", whole)))
    assert any("semantic_seg_head" in name and gradient.any() for name, gradient in found[1].items())


@pytest.mark.parametrize(
    ("cuda", "amp", "cast"),
    [(True, "auto", True), (True, False, False), (False, "auto", False), (False, True, False)],
)
def test_auto_casts_the_base_on_cuda_under_autocast_only(monkeypatch, cuda, amp, cast):
    model = get_peft_sam3(build_tiny_sam3(), "minimal").get_base_model()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    apply_levers(model, MemorySettings(bf16_base="auto"), amp=amp)
    weight = model.backbone.vision_backbone.trunk.blocks[0].attn.qkv.weight
    assert weight.dtype == (torch.bfloat16 if cast else torch.float32)


def test_a_base_in_bf16_keeps_its_fingerprint():
    model = get_peft_sam3(load_base("tiny"), "minimal").get_base_model()
    before = fingerprint_of(model)
    apply_levers(model, MemorySettings(bf16_base=True), amp=True)
    assert before and fingerprint_of(model) == before


def test_a_copy_without_weights_is_put_in_eval_mode_on_its_own():
    model = get_peft_sam3(build_tiny_sam3(), "minimal").get_base_model()
    apply_levers(model, MemorySettings(eval_frozen=True))
    twin = without_weights(model)
    twin.backbone.vision_backbone.trunk.training = True
    twin.train()
    assert not twin.backbone.vision_backbone.trunk.training


def test_the_position_tables_of_the_neck_are_kept_for_inference_only(make):
    model, _, batch = make(1, recompute_neck=True)
    cache = model.backbone.vision_backbone.position_encoding.cache
    model.train().backbone.forward_image(batch.img_batch)
    assert not cache
    model.eval().backbone.forward_image(batch.img_batch)
    assert cache
