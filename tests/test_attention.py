import copy
import io

import pytest
import torch
from tiny_forward import forward
from torch import Tensor, nn

from sam3_lora.attention import SplitAttention, fuse_attention, split_attention
from sam3_lora.base.official import build_meta_sam3
from sam3_lora.base.tiny import build_tiny_sam3
from sam3_lora.errors import TargetError

from sam3.model.model_misc import MultiheadAttentionWrapper  # isort: skip, after the stand-in for triton

torch.set_num_threads(1)

BATCH, QUERIES, KEYS, WIDTH, HEADS = 3, 5, 7, 32, 4
BOUND = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2}
CLASSES = [nn.MultiheadAttention, MultiheadAttentionWrapper]


class AttentionOfAnotherClass(nn.Module):
    """Fused attention known by its structure alone, as a later sam3 may have it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.in_proj_weight = nn.Parameter(torch.randn(3 * WIDTH, WIDTH))
        self.in_proj_bias = None
        self.out_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (
            (x.transpose(0, 1) @ w.T).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for x, w in zip((query, key, value), self.in_proj_weight.chunk(3), strict=True)
        )
        scores = (q @ k.transpose(-2, -1) / (WIDTH / HEADS) ** 0.5).softmax(-1)
        return self.out_proj((scores @ v).transpose(1, 2).flatten(-2)).transpose(0, 1)


def make_attention(cls=nn.MultiheadAttention, **options) -> nn.Module:
    torch.manual_seed(0)
    attention = cls(WIDTH, HEADS, **options)
    for bias in (attention.in_proj_bias, attention.out_proj.bias):
        nn.init.normal_(bias)  # torch starts them at zero, which would hide a mix-up
    return attention


def split(attention: nn.Module) -> SplitAttention:
    """Return the split form of a copy."""
    return split_attention(nn.ModuleDict({"attn": copy.deepcopy(attention)}))["attn"]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masks(name: str, queries: int) -> dict[str, Tensor]:
    causal = torch.ones(queries, KEYS).triu(1).bool()
    per_head = random(BATCH * HEADS, queries, KEYS, seed=1)
    padding = random(BATCH, KEYS, seed=2)
    some_keys = padding > 0.3
    some_keys[:, 0] = False
    bool_per_head = per_head > 0.5
    bool_per_head[..., 0] = False
    return {
        "none": {},
        "2-d bool": {"attn_mask": causal},
        "2-d float": {"attn_mask": random(queries, KEYS, seed=3)},
        "2-d minus infinity": {"attn_mask": torch.zeros(queries, KEYS).masked_fill(causal, -torch.inf)},
        "3-d bool": {"attn_mask": bool_per_head},
        "3-d float": {"attn_mask": per_head},
        "padding bool": {"key_padding_mask": some_keys},
        "padding float": {"key_padding_mask": padding},
        "3-d float and padding bool": {"attn_mask": per_head, "key_padding_mask": some_keys},
        "2-d bool and padding bool": {"attn_mask": causal, "key_padding_mask": some_keys},
    }[name]


MASKS = [
    "none",
    "2-d bool",
    "2-d float",
    "2-d minus infinity",
    "3-d bool",
    "3-d float",
    "padding bool",
    "padding float",
    "3-d float and padding bool",
    "2-d bool and padding bool",
]


def output_and_gradients(
    attention: nn.Module,
    dtype: torch.dtype,
    mask: dict[str, Tensor],
    cross: bool,
    batch_first: bool,
    **options,
) -> tuple[Tensor, Tensor]:
    """Return the output, and in one vector the gradients of inputs, float mask and fused parameters."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().clone().to(dtype).requires_grad_()

    def layout(length: int, seed: int) -> Tensor:
        x = random(BATCH, length, WIDTH, seed=seed)
        return leaf(x if batch_first else x.transpose(0, 1))

    query = layout(QUERIES if cross else KEYS, seed=4)
    key, value = (layout(KEYS, seed=5), layout(KEYS, seed=6)) if cross else (query, query)
    mask = {n: m if m.dtype == torch.bool else leaf(m) for n, m in mask.items()}
    output = attention(query, key, value, **mask, **options)[0]
    output.backward(random(*output.shape, seed=7).to(dtype))

    parameters = {name: p.grad for name, p in attention.named_parameters()}
    for kind in ("weight", "bias"):
        if f"q_proj.{kind}" in parameters:
            parameters[f"in_proj_{kind}"] = torch.cat([parameters.pop(f"{c}_proj.{kind}") for c in "qkv"])
    gradients = [x.grad for x in (query, key, value)] + [parameters[name] for name in sorted(parameters)]
    if "attn_mask" in mask and mask["attn_mask"].requires_grad:
        gradients.append(mask["attn_mask"].grad)
    return output.detach(), torch.cat([g.flatten() for g in gradients])


def relative_difference(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
@pytest.mark.parametrize("cross", [True, False], ids=["cross", "self"])
@pytest.mark.parametrize("mask", MASKS)
def test_split_attention_gives_the_official_output_and_gradients(dtype, cls, batch_first, cross, mask):
    official = make_attention(cls, batch_first=batch_first).to(dtype)
    case = {
        "dtype": dtype,
        "mask": masks(mask, QUERIES if cross else KEYS),
        "cross": cross,
        "batch_first": batch_first,
    }
    expected = output_and_gradients(official, **case)
    found = output_and_gradients(split(official), **case)
    assert relative_difference(found[0], expected[0]) <= BOUND[dtype]
    assert relative_difference(found[1], expected[1]) <= BOUND[dtype]


@pytest.mark.parametrize("mask", MASKS)
def test_split_attention_gives_the_official_output_in_eval_mode_without_gradients(mask):
    official = make_attention(batch_first=True).eval()  # self-attention in torch's fast path
    x = random(BATCH, KEYS, WIDTH, seed=4)
    with torch.no_grad():
        expected = official(x, x, x, **masks(mask, KEYS))[0]
        assert relative_difference(split(official)(x, x, x, **masks(mask, KEYS))[0], expected) <= 1e-6


def test_the_causal_hint_changes_nothing_about_a_causal_mask():
    attention = split(make_attention())
    x = random(KEYS, BATCH, WIDTH, seed=4)
    mask = torch.ones(KEYS, KEYS).triu(1).bool()
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    expected = attention(x, x, x, attn_mask=mask)[0]
    torch.testing.assert_close(attention(x, x, x, attn_mask=mask, is_causal=True)[0], expected)
    hinted = attention(x, x, x, attn_mask=mask, is_causal=True, key_padding_mask=padding)[0]
    torch.testing.assert_close(hinted, expected)


def test_attention_dropout_acts_in_training_and_draws_the_same_numbers_as_the_official_one():
    official = make_attention(dropout=0.5)
    attention = split(official)
    x = random(KEYS, BATCH, WIDTH, seed=4)
    torch.manual_seed(1)
    expected = official(x, x, x, need_weights=False)[0]
    torch.manual_seed(1)
    assert relative_difference(attention(x, x, x)[0], expected) <= 1e-6
    assert not torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])
    attention.eval()
    assert torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])


def test_a_query_without_any_key_gives_the_bias_of_out_proj_as_the_official_call_without_weights():
    official = make_attention(batch_first=True)
    x = random(BATCH, KEYS, WIDTH, seed=4)
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[1] = True
    expected = official(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    found = split(official)(x, x, x, key_padding_mask=padding)[0]
    assert torch.equal(found[1], official.out_proj.bias.expand(KEYS, WIDTH))
    assert relative_difference(found, expected) <= 1e-6


def test_a_query_without_any_key_leaves_the_gradients_finite():
    attention = split(make_attention(batch_first=True))
    x = random(BATCH, KEYS, WIDTH, seed=4).requires_grad_()
    attention(x, x, x, key_padding_mask=torch.ones(BATCH, KEYS, dtype=torch.bool))[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in [x, *attention.parameters()])


def test_under_bf16_autocast_split_attention_stays_as_close_as_the_official_one():
    official = make_attention()
    x = random(KEYS, BATCH, WIDTH, seed=4)
    mask = masks("3-d float and padding bool", KEYS)
    exact = official(x, x, x, **mask)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = split(official)(x, x, x, **mask)[0]
    assert found.dtype == torch.bfloat16
    assert relative_difference(found, exact) <= 1e-2


def test_no_attention_weights_are_returned():
    x = random(KEYS, BATCH, WIDTH, seed=4)
    assert split(make_attention())(x, x, x, need_weights=True)[1] is None


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        pytest.param(
            {"attn_mask": torch.zeros(3, 3)}, r"attn_mask has shape \(3, 3\), expected \(7, 7\)", id="2-d"
        ),
        pytest.param(
            {"attn_mask": torch.zeros(3, 7, 7)}, r"expected \(12, 7, 7\)", id="one plane per batch entry"
        ),
        pytest.param({"key_padding_mask": torch.zeros(7, 3)}, r"expected \(3, 7\)", id="transposed padding"),
        pytest.param({"is_causal": True}, "attn_mask, which was not given", id="hint without its mask"),
    ],
)
def test_a_mask_of_the_wrong_shape_is_refused(arguments, problem):
    x = random(KEYS, BATCH, WIDTH, seed=4)
    with pytest.raises(ValueError, match=problem):
        split(make_attention())(x, x, x, **arguments)


def test_input_without_a_batch_axis_is_refused():
    x = random(KEYS, WIDTH, seed=4)
    with pytest.raises(ValueError, match=r"query has shape \(7, 32\), expected 3 axes"):
        split(make_attention())(x, x, x)


@pytest.mark.parametrize("cls", CLASSES)
def test_q_k_v_are_views_of_the_fused_storage_and_out_proj_is_the_same_parameter(cls):
    official = make_attention(cls)
    fused = {"weight": official.in_proj_weight, "bias": official.in_proj_bias}
    out_proj = official.out_proj
    attention = split_attention(nn.ModuleDict({"attn": official}))["attn"]
    for kind, whole in fused.items():
        for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
            third = getattr(attention.get_submodule(name), kind)
            assert third.data_ptr() == whole.chunk(3)[index].data_ptr()
    assert attention.out_proj is out_proj
    assert all(type(attention.get_submodule(f"{name}_proj")) is nn.Linear for name in "qkv")


@pytest.mark.parametrize("frozen", ["in_proj_weight", "in_proj_bias", "out_proj.weight"])
def test_what_was_frozen_stays_frozen_there_and_back(frozen):
    model = nn.ModuleDict({"attn": make_attention()})
    model.get_parameter(f"attn.{frozen}").requires_grad_(False)
    expected = {name: p.requires_grad for name, p in model.named_parameters()}
    kind = frozen.rpartition("_")[2]
    split_attention(model)
    halves = [f"attn.{c}_proj.{kind}" for c in "qkv"] if "in_proj" in frozen else [f"attn.{frozen}"]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == halves
    fuse_attention(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == expected


@pytest.mark.parametrize("cls", [*CLASSES, AttentionOfAnotherClass])
def test_fusing_gives_the_official_class_keys_and_bits_again(cls):
    attention = (
        cls() if cls is AttentionOfAnotherClass else make_attention(cls, batch_first=True, dropout=0.1)
    )
    model = nn.ModuleDict({"attn": attention, "after": nn.Linear(2, 2)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = fuse_attention(split_attention(model)).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model["attn"] is attention


def test_fusing_keeps_the_mode():
    model = nn.ModuleDict({"attn": make_attention(dropout=0.5)})
    assert not fuse_attention(split_attention(model).eval())["attn"].training
    assert fuse_attention(split_attention(model).train())["attn"].training


def test_fusing_keeps_what_was_trained_while_split():
    model = nn.ModuleDict({"attn": make_attention()})
    x = random(KEYS, BATCH, WIDTH, seed=4)
    optimizer = torch.optim.SGD(split_attention(model).parameters(), lr=0.1)
    model["attn"](x, x, x)[0].square().sum().backward()
    optimizer.step()
    trained = model["attn"](x, x, x)[0]
    assert relative_difference(fuse_attention(model)["attn"](x, x, x)[0], trained) <= 1e-6


def test_attention_is_found_by_structure():
    official = AttentionOfAnotherClass()
    q, k = random(QUERIES, BATCH, WIDTH, seed=4), random(KEYS, BATCH, WIDTH, seed=5)
    attention = split(official)
    assert isinstance(attention, SplitAttention)
    assert relative_difference(attention(q, k, k)[0], official(q, k, k)) <= 1e-6


def test_splitting_and_fusing_twice_changes_nothing_more():
    model = split_attention(nn.ModuleDict({"attn": make_attention()}))
    attention = model["attn"]
    assert split_attention(model)["attn"] is attention
    fused = fuse_attention(model)["attn"]
    assert fuse_attention(model)["attn"] is fused


def test_attention_shared_by_two_parents_stays_shared():
    shared = make_attention()
    model = nn.ModuleDict({"a": nn.ModuleDict({"attn": shared}), "b": nn.ModuleDict({"attn": shared})})
    split_attention(model)
    assert isinstance(model["a"]["attn"], SplitAttention)
    assert model["a"]["attn"] is model["b"]["attn"]


def test_official_fused_weights_load_into_a_split_model():
    official = nn.ModuleDict({"attn": make_attention()})
    nn.init.normal_(official["attn"].in_proj_weight)
    state = {name: tensor.clone() for name, tensor in official.state_dict().items()}
    model = split_attention(nn.ModuleDict({"attn": make_attention()}))
    assert str(model.load_state_dict(state)) == "<All keys matched successfully>"
    assert list(state) == list(official.state_dict())
    fused = fuse_attention(model).state_dict()
    assert all(torch.equal(fused[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda m: torch.load(pickled(m), weights_only=False), id="pickle"),
        pytest.param(lambda m: copy.deepcopy(m).to(torch.float64).to(torch.float32), id="dtype and back"),
        pytest.param(
            lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True) and m, id="assign"
        ),
    ],
)
def test_a_split_model_survives(change):
    model = split_attention(nn.ModuleDict({"attn": make_attention()}))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    official = {name: t.clone() for name, t in nn.ModuleDict({"attn": make_attention()}).state_dict().items()}
    changed = change(model)
    assert all(torch.equal(changed.state_dict()[name], tensor) for name, tensor in state.items())
    changed.load_state_dict(official)  # the copy translates official keys for itself, not for the original
    fused = fuse_attention(changed).state_dict()
    assert all(torch.equal(fused[name], tensor) for name, tensor in official.items())


def pickled(model: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


def test_a_copy_shares_no_weight_with_the_original():
    model = split_attention(nn.ModuleDict({"attn": make_attention()}))
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert model["attn"].q_proj.weight.abs().sum() > 0
    assert fuse_attention(clone)["attn"].in_proj_weight.abs().sum() == 0
    assert fuse_attention(model)["attn"].in_proj_weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        pytest.param({"add_bias_kv": True}, "add_bias_kv=True is not supported", id="bias_k"),
        pytest.param({"add_zero_attn": True}, "add_zero_attn=True is not supported", id="zero attention"),
        pytest.param({"kdim": 16}, "kdim or vdim differs from embed_dim", id="other key width"),
    ],
)
def test_attention_that_sam3_does_not_use_is_refused_by_name_and_nothing_is_changed(options, problem):
    model = nn.ModuleDict({"good": make_attention(), "bad": nn.MultiheadAttention(WIDTH, HEADS, **options)})
    with pytest.raises(TargetError, match=f"bad: {problem}"):
        split_attention(model)
    assert type(model["good"]) is nn.MultiheadAttention


def test_a_lone_attention_cannot_be_replaced_in_place():
    with pytest.raises(TargetError, match="pass the module that holds it"):
        split_attention(make_attention())


def test_the_full_size_model_has_61_attention_modules_and_keeps_its_parameters():
    model = build_meta_sam3()
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    total = sum(p.numel() for p in model.parameters())
    split_attention(model)
    assert sum(isinstance(m, SplitAttention) for m in model.modules()) == 61
    assert not any(isinstance(m, nn.MultiheadAttention) for m in model.modules())
    assert total == sum(p.numel() for p in model.parameters()) == 840_509_750
    assert {name: tensor.shape for name, tensor in fuse_attention(model).state_dict().items()} == before


def test_the_split_model_gives_the_official_outputs():
    model = build_tiny_sam3(eval_mode=True)
    before = forward(model)
    after = forward(split_attention(model))
    for name, expected in before.items():
        assert (after[name] - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


def test_the_tiny_model_is_bit_identical_after_splitting_and_fusing():
    model = build_tiny_sam3()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = fuse_attention(split_attention(model)).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
