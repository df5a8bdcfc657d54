"""Several adapters on one tiny base: each acts as it does alone, and nothing that fails leaves a trace."""

import copy
import gc
import json
import re

import peft
import pytest
import torch
from tiny_forward import forward, forward_with_gradients
from torch import nn

from sam3_lora.adapter import (
    active_adapters,
    adapted_modules,
    adapter_names,
    combine_adapters,
    count_parameters,
    delete_adapter,
    disable_adapter,
    get_peft_sam3,
    hotswap_adapter,
    load_adapter,
    prepare_hotswap,
    save_adapter,
    scale_adapter,
    set_adapter,
    unload,
    use_adapter,
)
from sam3_lora.attention import split_attention
from sam3_lora.base.tiny import build_tiny_sam3
from sam3_lora.errors import AdapterError, ConfigError

torch.set_num_threads(1)

KINDS = {
    "cracks": ("balanced", {}),
    "rust": ("balanced", {}),
    "words": ("text", {}),
    "thin": ("balanced", {"r": 2}),
    "steep": (
        "minimal",
        {"rank_pattern": {r"layers\.0\.linear1": 2}, "alpha_pattern": {r"layers\.0\.linear1": 9}},
    ),
    "dora": ("minimal", {"use_dora": True}),
    "stable": ("minimal", {"use_rslora": True}),
    "whole": ("minimal", {"modules_to_save": ["dot_prod_scoring"]}),
    "biased": ("minimal", {"bias": "lora_only"}),
    "plain": ("minimal", {}),
}


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
    tokenizer = model.backbone.language_backbone.tokenizer
    return copy.deepcopy(model, {id(tokenizer): tokenizer})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pristine):
    """Return the folder of an adapter of a kind, which looks as if it had been trained."""
    root, made = tmp_path_factory.mktemp("adapters"), {}

    def folder_of(kind):
        if kind not in made:
            preset, overrides = KINDS[kind]
            adapted = get_peft_sam3(fresh_copy(pristine), preset, **overrides)
            generator = torch.Generator().manual_seed(len(made))
            with torch.no_grad():
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        parameter += torch.randn(parameter.shape, generator=generator) * 0.05
            made[kind] = save_adapter(adapted, root / kind, prompts=[f"a {kind}"])
        return made[kind]

    return folder_of


@pytest.fixture(scope="module")
def alone(folder, pristine):
    """Return the outputs of a base of its own with one adapter, or with none."""
    known = {}

    def outputs(kind):
        if kind not in known:
            model = fresh_copy(pristine)
            model = split_attention(model) if kind == "base" else load_adapter(model, folder(kind))
            known[kind] = forward(model)
        return known[kind]

    return outputs


@pytest.fixture
def loaded(base, folder):
    """Return the model with adapters of these kinds, each under the name of its kind."""

    def load(*kinds):
        for kind in kinds:
            adapted = load_adapter(base, folder(kind), kind)
        return adapted

    return load


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def assert_close(found, expected):
    for name in expected:
        limit = 1e-5 * expected[name].abs().max().clamp(min=1)
        assert (found[name] - expected[name]).abs().max() <= limit, name


def differs(found, expected):
    return any(not torch.equal(found[name], expected[name]) for name in expected)


def state_of(model):
    """Everything that a failure must not change."""
    return {
        "names": [name for name, _ in model.named_modules()],
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "adapters": adapter_names(model),
        "active": active_adapters(model),
        "modes": [module.training for module in model.modules()],
    }


def assert_unchanged(model, before):
    after = state_of(model)
    assert_same(after.pop("tensors"), before.pop("tensors"))
    assert after == before


# --- Loading beside others ---


@pytest.mark.parametrize("which", ["wrapper", "inner"])
def test_an_adapter_is_loaded_beside_another_and_is_not_active(base, folder, alone, which):
    adapted = load_adapter(base, folder("cracks"), "cracks")
    assert load_adapter(adapted if which == "wrapper" else base, folder("words"), "words") is adapted
    assert adapter_names(base) == adapter_names(adapted) == ["cracks", "words"]
    assert active_adapters(base) == ["cracks"]
    assert_same(forward(adapted), alone("cracks"))
    assert count_parameters(adapted).trainable == 0


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"biased"}))
def test_each_of_several_gives_the_bits_of_a_base_of_its_own(loaded, alone, base, kind):
    loaded("cracks", *({kind} - {"cracks"}))
    set_adapter(base, kind)
    assert_same(forward(base), alone(kind))
    set_adapter(base, "cracks")
    assert_same(forward(base), alone("cracks"))


def test_an_adapter_that_came_second_is_saved_as_it_was(loaded, folder, tmp_path):
    save_adapter(loaded("cracks", "words"), tmp_path / "words", adapter_name="words")
    first, again = (
        json.loads((f / "sam3_lora.json").read_text()) for f in (folder("words"), tmp_path / "words")
    )
    assert first == again


def test_an_adapter_beside_others_can_be_trained_further(loaded, base, folder):
    loaded("cracks")
    load_adapter(base, folder("words"), "words", is_trainable=True)
    assert {name.split(".")[-2] for name, p in base.named_parameters() if p.requires_grad} == {"words"}
    set_adapter(base, "words", is_trainable=True)
    sum(output.square().mean() for output in forward_with_gradients(base).values()).backward()
    assert {name.split(".")[-2] for name, p in base.named_parameters() if p.grad is not None} == {"words"}


def test_a_model_that_plain_peft_wrapped_takes_another_through_its_wrapper(base, folder, alone):
    adapted = peft.PeftModel.from_pretrained(split_attention(base), folder("cracks"), adapter_name="cracks")
    with pytest.raises(AdapterError, match="pass the PeftModel instead of the model inside"):
        load_adapter(base, folder("words"), "words")
    load_adapter(adapted, folder("words"), "words")
    set_adapter(base, "words")
    assert_same(forward(base), alone("words"))


def test_a_copy_of_an_adapted_model_is_a_model_of_its_own(loaded, base, alone):
    loaded("cracks", "words")
    twin = fresh_copy(base)
    set_adapter(twin, "words")
    assert active_adapters(base) == ["cracks"]
    assert_same(forward(twin), alone("words"))


@pytest.mark.parametrize(
    ("there", "new", "name", "problem"),
    [
        pytest.param(
            ["cracks", "rust"],
            "words",
            "rust",
            r"adapter 'rust' already; its adapters are \['cracks', 'rust'\]",
            id="taken",
        ),
        pytest.param(["cracks"], "words", "base", "'base' is no name for an adapter", id="the base's name"),
        pytest.param(["cracks"], "words", "a.b", "'a.b' is no name for an adapter", id="a dot"),
        pytest.param(
            ["cracks"],
            "words",
            "decoder",
            "'decoder' is no name .* part of a module's name",
            id="a part's name",
        ),
        pytest.param(["cracks"], "words", "", "'' is no name for an adapter", id="no name"),
        pytest.param(
            ["cracks"],
            "biased",
            "new",
            "bias='lora_only' changes weights of the base in place",
            id="bias beside",
        ),
        pytest.param(
            ["biased"],
            "cracks",
            "new",
            r"'biased' of this model changes weights .* \(bias='lora_only'\)",
            id="beside bias",
        ),
        pytest.param(["cracks"], "nowhere", "new", "is not an adapter folder", id="no folder"),
    ],
)
def test_what_cannot_stand_beside_the_others_is_refused_and_leaves_no_trace(
    loaded, base, folder, there, new, name, problem
):
    loaded(*there)
    before = state_of(base)
    with pytest.raises(AdapterError, match=problem):
        load_adapter(base, folder(new) if new in KINDS else new, name)
    assert_unchanged(base, before)


def test_an_adapter_of_another_base_is_refused_beside_others_too(loaded, folder, base, pristine, tmp_path):
    other = fresh_copy(pristine)
    with torch.no_grad():
        other.backbone.language_backbone.resizer.weight += 1
    save_adapter(get_peft_sam3(other, "text"), tmp_path / "other")
    loaded("cracks")
    before = state_of(base)
    with pytest.raises(AdapterError, match="base: text_encoder of this model is not as in"):
        load_adapter(base, tmp_path / "other", "other")
    assert_unchanged(base, before)


def test_a_damaged_adapter_is_refused_beside_others_with_all_that_is_wrong(loaded, folder, base, tmp_path):
    from safetensors.torch import load_file, save_file

    loaded("cracks")
    (tmp_path / "adapter_config.json").write_text((folder("words") / "adapter_config.json").read_text())
    tensors = load_file(folder("words") / "adapter_model.safetensors")
    first, second, *_ = tensors
    tensors[first] = tensors[first][:1].contiguous()
    del tensors[second]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    before = state_of(base)
    with pytest.raises(AdapterError, match=r"2 problems:(?s:.*)missing in the file(?s:.*)in the model"):
        load_adapter(base, tmp_path, "words")
    assert_unchanged(base, before)


def test_a_load_that_breaks_off_takes_the_adapter_out_again(loaded, base, folder, monkeypatch):
    adapted = loaded("cracks")
    before = state_of(base)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sam3_lora.adapter.loading.set_peft_model_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_adapter(adapted, folder("words"), "words")
    assert_unchanged(base, before)


@pytest.mark.parametrize(
    "action",
    [
        pytest.param(lambda model, folder: load_adapter(model, folder("words"), "words"), id="load"),
        pytest.param(lambda model, folder: set_adapter(model, "cracks"), id="switch"),
        pytest.param(lambda model, folder: delete_adapter(model, "rust"), id="delete"),
        pytest.param(lambda model, folder: unload(model), id="unload"),
        pytest.param(lambda model, folder: hotswap_adapter(model, folder("rust"), "cracks"), id="hot swap"),
        pytest.param(lambda model, folder: combine_adapters(model, {"cracks": 1}, "new"), id="combine"),
        pytest.param(lambda model, folder: scale_adapter(model, 0.5), id="scale"),
        pytest.param(lambda model, folder: disable_adapter(model).__enter__(), id="disable"),
        pytest.param(lambda model, folder: use_adapter(model, "rust").__enter__(), id="use"),
    ],
)
def test_a_merged_adapter_must_be_unmerged_first(loaded, base, folder, action):
    adapted = loaded("cracks", "rust")
    adapted.merge_adapter()
    with pytest.raises(AdapterError, match=r"'cracks' is merged into .*unmerge_adapter\(\)"):
        action(base, folder)
    adapted.unmerge_adapter()
    assert adapter_names(base) == ["cracks", "rust"]


# --- Switching ---


def test_switch_disable_and_enable_give_the_bits_of_fresh_loads(loaded, base, alone):
    adapted = loaded("cracks", "rust", "words")
    for model in (adapted, base):
        for kind in ("words", "rust", "cracks"):
            set_adapter(model, kind)
            assert adapted.active_adapter == kind
            assert_same(forward(model), alone(kind))
            for way in (disable_adapter(model), adapted.disable_adapter(), use_adapter(model, "base")):
                with way:
                    assert active_adapters(base) == []
                    assert_same(forward(base), alone("base"))
            assert_same(forward(model), alone(kind))


def test_switching_leaves_what_is_frozen_frozen(loaded, base):
    loaded("cracks", "rust", "whole")
    for kind in ("rust", "whole", "cracks"):
        set_adapter(base, kind)
        with disable_adapter(base):
            pass
        with use_adapter(base, "rust"):
            pass
    assert count_parameters(base).trainable == 0


def test_an_adapter_is_used_for_a_while_and_the_one_before_comes_back(loaded, base, alone):
    adapted = loaded("cracks", "whole", "rust")
    set_adapter(base, "whole")
    with use_adapter(base, "rust"):
        assert_same(forward(base), alone("rust"))
        with use_adapter(base, "base"), use_adapter(base, "cracks"):
            assert_same(forward(base), alone("cracks"))
        with use_adapter(base, None):
            assert_same(forward(base), alone("rust"))
    with pytest.raises(ZeroDivisionError), use_adapter(base, "rust"):
        _ = 1 / 0
    assert adapted.active_adapter == "whole"
    assert_same(forward(base), alone("whole"))


def test_peft_itself_can_go_on_from_where_we_left_it(loaded, base, alone, folder):
    adapted = loaded("cracks", "rust")
    set_adapter(base, "rust")
    adapted.load_adapter(folder("words"), "words")
    assert_same(forward(base), alone("rust"))
    adapted.set_adapter("words")
    assert active_adapters(base) == ["words"]
    assert_same(forward(base), alone("words"))
    assert adapted.get_model_status().active_adapters == ["words"]


@pytest.mark.parametrize("action", [set_adapter, delete_adapter, lambda m, n: use_adapter(m, n).__enter__()])
def test_an_unknown_adapter_is_an_error_with_the_closest(loaded, action):
    adapted = loaded("cracks", "rust")
    with pytest.raises(AdapterError, match="no adapter 'crack'; did you mean 'cracks'"):
        action(adapted, "crack")
    with pytest.raises(AdapterError, match=re.escape("no adapter 'x'; it has ['cracks', 'rust']")):
        action(adapted, "x")


def test_a_model_without_adapters_says_so(base):
    assert (adapter_names(base), active_adapters(base)) == ([], [])
    with pytest.raises(AdapterError, match="has no adapter; add one"):
        set_adapter(base, "default")
    with use_adapter(base, "base"):
        pass


def test_the_base_of_an_adapter_with_biases_cannot_be_had_back(loaded, base):
    loaded("biased")
    for action in (lambda: disable_adapter(base).__enter__(), lambda: unload(base)):
        with pytest.raises(AdapterError, match=r"'biased' changes weights .*Load a base of its own"):
            action()


# --- Memory ---


def storage_bytes(model):
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def live_tensors():
    gc.collect()
    return sum(isinstance(found, torch.Tensor) for found in gc.get_objects())


def test_ten_more_adapters_take_their_own_bytes_only(loaded, base, folder):
    loaded("cracks")
    before, places = storage_bytes(base), {p.untyped_storage().data_ptr() for p in base.parameters()}
    for number in range(10):
        load_adapter(base, folder("rust"), f"rust{number}")
    size = (folder("rust") / "adapter_model.safetensors").stat().st_size
    assert 0.9 * 10 * size < storage_bytes(base) - before <= 1.1 * 10 * size
    assert places <= {p.untyped_storage().data_ptr() for p in base.parameters()}


def test_a_thousand_switches_leave_nothing_behind(loaded, base):
    loaded("cracks", "rust", "whole")

    def switch(times):
        for number in range(times):
            set_adapter(base, ("cracks", "rust", "whole")[number % 3])
            with use_adapter(base, "base"):
                pass

    switch(3)
    before = live_tensors(), storage_bytes(base), sum(1 for _ in base.modules())
    switch(999)
    assert (live_tensors(), storage_bytes(base), sum(1 for _ in base.modules())) == before


def test_loading_and_deleting_leaves_nothing_behind(loaded, base, folder, alone):
    loaded("cracks")
    before = state_of(base), live_tensors()
    for kind in ("words", "whole", "dora") * 2:
        load_adapter(base, folder(kind), kind)
        delete_adapter(base, kind)
    assert live_tensors() == before[1]
    assert_unchanged(base, before[0])
    assert_same(forward(base), alone("cracks"))


def test_the_active_adapter_is_not_deleted(loaded, base):
    loaded("cracks", "rust")
    with pytest.raises(AdapterError, match="'cracks' is active; set_adapter to another first"):
        delete_adapter(base, "cracks")
    set_adapter(base, "rust")
    delete_adapter(base, "cracks")
    assert adapter_names(base) == ["rust"]


def test_unloading_gives_the_base_back_for_another_start(loaded, base, alone):
    adapted = loaded("cracks", "whole")
    assert unload(adapted) is base
    assert adapted_modules(base) == adapter_names(base) == []
    assert_same(forward(base), alone("base"))
    assert adapted_modules(get_peft_sam3(base, "minimal"))


# --- Combination ---


def changes(model, name):
    """Return the change of every weight by an adapter, as explicit arithmetic."""
    found = {}
    for module in adapted_modules(model):
        layer = model.get_submodule(module)
        if name in layer.r:
            a, b = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
            scaling = layer.lora_alpha[name] / layer.r[name]
            found[module] = (scaling * (b.flatten(1) @ a.flatten(1))).detach()
    return found


def weighted_sum(model, weights):
    total = {}
    for name, weight in weights.items():
        for module, change in changes(model, name).items():
            total[module] = total.get(module, 0) + weight * change
    return total


COMBINED = [
    pytest.param({"cracks": 0.7, "rust": 0.3}, id="same ranks"),
    pytest.param({"cracks": 0.7, "thin": -1.5}, id="other ranks, and a negative weight"),
    pytest.param({"cracks": 0.5, "words": 2, "steep": 1}, id="other modules, and patterns of r and alpha"),
    pytest.param({"rust": 2.0}, id="one alone"),
]


@pytest.mark.parametrize("weights", COMBINED)
@pytest.mark.parametrize("way", ["cat", "svd"])
def test_a_combination_is_the_weighted_sum_of_the_changes(loaded, base, weights, way):
    loaded(*weights)
    highest = {"svd_rank": 64} if way == "svd" and len(weights) > 1 else {}
    combine_adapters(base, weights, "mixed", way, **highest)
    expected, found = weighted_sum(base, weights), changes(base, "mixed")
    assert found.keys() == expected.keys()
    for module, change in expected.items():
        torch.testing.assert_close(found[module], change, rtol=0, atol=1e-5 * float(change.abs().max()))


def test_a_linear_combination_adds_a_and_b_each_on_their_own(loaded, base):
    loaded("cracks", "rust")
    combine_adapters(base, {"cracks": 0.7, "rust": -0.3}, "mixed", "linear")
    for module in adapted_modules(base):
        layer = base.get_submodule(module)
        for tensors, signs in ((layer.lora_A, (1, -1)), (layer.lora_B, (1, 1))):
            parts = [
                sign * (abs(weight) * layer.scaling[name]) ** 0.5 * tensors[name].weight
                for name, weight, sign in zip(("cracks", "rust"), (0.7, -0.3), signs, strict=True)
            ]
            torch.testing.assert_close(tensors["mixed"].weight, sum(parts))


def test_an_svd_of_the_rank_of_one_is_the_best_of_that_rank(loaded, base):
    loaded("cracks", "rust")
    combine_adapters(base, {"cracks": 0.7, "rust": 0.3}, "mixed", "svd")
    found = changes(base, "mixed")
    for module, change in weighted_sum(base, {"cracks": 0.7, "rust": 0.3}).items():
        r = base.get_submodule(module).r["mixed"]
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        best = u[:, :r] @ torch.diag(s[:r]) @ v[:r]
        torch.testing.assert_close(found[module], best, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["cat", "svd", "linear"])
def test_a_combination_is_saved_and_loaded_as_any_adapter(loaded, base, pristine, tmp_path, way):
    adapted = loaded("cracks", "rust")
    combine_adapters(base, {"cracks": 0.7, "rust": 0.3}, "mixed", way)
    assert active_adapters(base) == ["cracks"]
    assert count_parameters(base).trainable == 0
    set_adapter(base, "mixed")
    save_adapter(adapted, tmp_path / "mixed", adapter_name="mixed")
    assert_same(forward(load_adapter(fresh_copy(pristine), tmp_path / "mixed")), forward(base))
    plain = peft.PeftModel.from_pretrained(split_attention(fresh_copy(pristine)), tmp_path / "mixed")
    assert_same(forward(plain), forward(base))
    record = json.loads((tmp_path / "mixed" / "sam3_lora.json").read_text())
    assert record["prompts"] == ["a cracks", "a rust"]
    assert record["training"]["combined"]["weights"] == {"cracks": 0.7, "rust": 0.3}


def test_a_combination_has_in_each_module_the_rank_that_it_needs(loaded, base):
    loaded("cracks", "rust", "words")
    combine_adapters(base, {"cracks": 1, "rust": 1}, "mixed", "cat")
    layers = [base.get_submodule(name) for name in adapted_modules(base)]
    ranks = [(layer.r["cracks"], layer.r["mixed"]) for layer in layers if "mixed" in layer.r]
    assert set(ranks) == {(8, 16), (16, 32)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "options", "error", "problem"),
    [
        pytest.param(
            {"cracks": 1, "thin": 1},
            {"combination_type": "linear"},
            AdapterError,
            "'linear' needs the same r everywhere, and 68 of 68 modules differ, such as backbone",
            id="linear, ranks",
        ),
        pytest.param(
            {"steep": 1, "plain": 1},
            {"combination_type": "linear"},
            AdapterError,
            "1 of 42 modules differ, such as transformer.decoder.layers.0.linear1: r is 2 in 'steep', 8 in 'plain'",
            id="linear, a pattern",
        ),
        pytest.param(
            {"dora": 1, "whole": 1, "stable": 1},
            {},
            AdapterError,
            "3 problems:\n  'dora' has use_dora=True",
            id="DoRA",
        ),
        pytest.param({"cracks": 1, "x": 1}, {}, AdapterError, "no adapter 'x'", id="unknown"),
        pytest.param({"cracks": 1}, {"adapter_name": "thin"}, AdapterError, "'thin' already", id="taken"),
        pytest.param(
            {"cracks": float("nan"), "thin": True},
            {"combination_type": "lineal", "svd_rank": 3},
            ConfigError,
            "4 problems:\n  combination_type 'lineal' is none of linear, cat, svd; did you mean 'linear'?",
            id="numbers",
        ),
        pytest.param({}, {}, ConfigError, "no adapter; name at least one", id="none"),
    ],
)
def test_what_cannot_be_combined_is_refused_and_leaves_no_trace(
    loaded, base, weights, options, error, problem
):
    loaded("cracks", "thin", "steep", "plain", "dora", "whole", "stable")
    before = state_of(base)
    with pytest.raises(error) as raised:
        combine_adapters(base, weights, **{"adapter_name": "new", **options})
    assert problem in str(raised.value)
    assert_unchanged(base, before)


# --- Strength ---


def test_a_component_is_scaled_by_a_factor_of_its_change(loaded, base, pristine):
    loaded("cracks")
    scale_adapter(base, {"vision_encoder": 1.0, "text_encoder": 0.3})
    by_hand = split_attention(fresh_copy(pristine))
    with torch.no_grad():
        for module, change in changes(base, "cracks").items():
            factor = 0.3 if module.startswith("backbone.language_backbone") else 1
            by_hand.get_submodule(module).weight += factor * change
    assert_close(forward(base), forward(by_hand))


@pytest.mark.parametrize("kind", ["cracks", "steep", "stable", "dora"])
def test_scale_one_gives_the_bits_back_and_zero_the_base(loaded, base, alone, kind):
    loaded(kind)
    for scale in (0.3, 7, 0.0):
        scale_adapter(base, scale)
        assert differs(forward(base), alone(kind))
    if kind != "dora":
        assert_close(forward(base), alone("base"))
    scale_adapter(base, {"detr_decoder": 1.0})
    scale_adapter(base, 1)
    assert_same(forward(base), alone(kind))


def test_the_scale_of_one_adapter_leaves_the_others(loaded, base, alone):
    loaded("cracks", "rust")
    scale_adapter(base, 0.5, "rust")
    assert_same(forward(base), alone("cracks"))
    set_adapter(base, "rust")
    assert differs(forward(base), alone("rust"))


def test_all_that_is_wrong_with_scales_comes_at_once(loaded, base, alone):
    loaded("words")
    with pytest.raises(ConfigError) as raised:
        scale_adapter(base, {"text_encodr": 1, "scoring": 0.5, "text_encoder": "much"})
    assert str(raised.value) == (
        "3 problems:\n  no component 'text_encodr'; did you mean 'text_encoder'?\n"
        "  adapter 'words' is not on scoring, only on text_encoder\n"
        "  the scale of text_encoder must be a number, got 'much'"
    )
    assert_same(forward(base), alone("words"))


# --- Hot swap ---


@pytest.mark.parametrize("prepared", [False, True])
def test_a_hot_swap_gives_the_outputs_of_the_other_adapter_in_the_same_tensors(
    loaded, base, folder, alone, prepared
):
    loaded("cracks", "words")
    if prepared:
        prepare_hotswap(base, 20)
    places = [p.data_ptr() for p in base.parameters()]
    for kind in ("rust", "thin", "cracks"):
        hotswap_adapter(base, folder(kind), "cracks")
        assert_close(forward(base), alone(kind))
    assert [p.data_ptr() for p in base.parameters()] == places
    set_adapter(base, "words")
    assert_close(forward(base), alone("words"))


def test_a_hot_swap_leaves_adapters_whose_names_contain_its_own(base, folder, alone):
    load_adapter(base, folder("words"), "x")
    load_adapter(base, folder("cracks"), "x_large")
    load_adapter(base, folder("thin"), "extra")
    hotswap_adapter(base, folder("words"), "x")
    set_adapter(base, "x_large")
    assert_same(forward(base), alone("cracks"))
    set_adapter(base, "extra")
    assert_same(forward(base), alone("thin"))


def test_a_hot_swap_brings_the_ranks_and_alphas_of_each_module(loaded, base, folder, alone, tmp_path):
    adapted = loaded("plain")
    hotswap_adapter(base, folder("steep"), "plain")
    assert_close(forward(base), alone("steep"))
    hotswap_adapter(base, folder("plain"), "plain")
    assert_same(forward(base), alone("plain"))
    save_adapter(adapted, tmp_path / "again", adapter_name="plain")
    first, again = (
        json.loads((f / "sam3_lora.json").read_text()) for f in (folder("plain"), tmp_path / "again")
    )
    assert first == again


def test_a_padded_adapter_is_not_saved(loaded, base, folder, tmp_path):
    loaded("cracks")
    prepare_hotswap(base, 20)
    with pytest.raises(AdapterError, match="padded to a higher rank"):
        save_adapter(base, tmp_path / "padded", adapter_name="cracks")
    assert not (tmp_path / "padded").exists()


def test_a_prepared_adapter_is_scaled_in_place(loaded, base, alone):
    loaded("cracks")
    prepare_hotswap(base, 16)
    layer = base.get_submodule(adapted_modules(base)[0])
    scaling = layer.scaling["cracks"]
    before = forward(base)
    scale_adapter(base, 0.5)
    assert layer.scaling["cracks"] is scaling
    assert differs(forward(base), before)
    scale_adapter(base, 1)
    assert_same(forward(base), before)


@pytest.mark.parametrize(
    ("there", "new", "problem"),
    [
        pytest.param(
            "cracks", "words", "60 modules are only in the model, such as backbone.vision", id="other modules"
        ),
        pytest.param(
            "thin", "cracks", "r is 8, and there is room for 2; see prepare_hotswap", id="higher rank"
        ),
        pytest.param("plain", "dora", "use_dora is False there and True in the file", id="DoRA"),
        pytest.param("cracks", "biased", "bias='lora_only' changes weights of the base in place", id="bias"),
    ],
)
def test_what_cannot_take_the_place_is_refused_and_leaves_no_trace(loaded, base, folder, there, new, problem):
    loaded(there)
    before = state_of(base)
    with pytest.raises(AdapterError, match=re.escape(problem)):
        hotswap_adapter(base, folder(new), there)
    assert_unchanged(base, before)


def test_preparing_for_a_rank_below_those_there_is_refused(loaded, base):
    loaded("cracks")
    with pytest.raises(
        AdapterError, match=re.escape("below the rank of adapters that are there: {'cracks': 16}")
    ):
        prepare_hotswap(base, 4)


@pytest.mark.parametrize("part", ["backbone.language_backbone.encoder.transformer", "dot_prod_scoring"])
def test_compiled_code_is_not_compiled_again_for_a_hot_swap(part, pristine, tmp_path):
    model = fresh_copy(pristine)
    components = {"components": ["text_encoder", "scoring"], "kinds": ["attention", "mlp"]}
    folders = []
    for seed, r in enumerate((4, 8)):
        torch.manual_seed(seed)
        made = get_peft_sam3(
            fresh_copy(pristine), "full", **components, r=r, lora_alpha=3, init_lora_weights=False
        )
        folders.append(save_adapter(made, tmp_path / str(r)))
    load_adapter(model, folders[0])
    prepare_hotswap(model, 8)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    piece = model.get_submodule(part)
    compiled = torch.compile(piece, backend="eager")
    inputs = inputs_of(part)
    with torch.no_grad():
        compiled(*inputs)
        graphs = counters["stats"]["unique_graphs"]
        assert graphs
        for folder in (folders[1], folders[0], folders[1]):
            hotswap_adapter(model, folder)
            torch.testing.assert_close(compiled(*inputs), piece(*inputs), rtol=1e-5, atol=1e-6)
        assert counters["stats"]["unique_graphs"] == graphs
        fresh = load_adapter(fresh_copy(pristine), folders[1]).get_base_model().get_submodule(part)
        torch.testing.assert_close(compiled(*inputs), fresh(*inputs), rtol=1e-5, atol=1e-6)


def inputs_of(part):
    torch.manual_seed(2)
    width = 64
    if part == "dot_prod_scoring":
        return torch.randn(1, 1, 5, width), torch.randn(4, 1, width), torch.zeros(1, 4, dtype=torch.bool)
    return (torch.randn(1, 8, width),)


def test_peft_has_no_batch_with_several_adapters_for_this_model(loaded, base):
    adapted = loaded("cracks", "rust")
    image = torch.rand(2, 3, 112, 112)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="Length of `adapter_names` should be the same"),
        adapted.base_model._enable_peft_forward_hooks(adapter_names=["cracks", "rust"]),
    ):
        base.backbone.forward_image(image)
