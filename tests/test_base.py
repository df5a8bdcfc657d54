"""Base models: the tiny one, the official builder, and the errors on the way to Meta's checkpoint."""

import hashlib
import subprocess
import sys
import types

import pytest
import torch
from sam3.model.sam3_image import Sam3Image
from tiny_forward import forward

from sam3_lora.base import checkpoint, cpu, tiny
from sam3_lora.base.checkpoint import base_info, find_checkpoint
from sam3_lora.base.loading import load_base
from sam3_lora.base.official import build_meta_sam3, load_official_sam3
from sam3_lora.errors import CheckpointError


@pytest.fixture(scope="module")
def tiny_base():
    return load_base("tiny", device="cpu")


def test_building_the_interactive_model_leaves_no_autocast_behind():
    build_meta_sam3(enable_inst_interactivity=True)
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    assert depth == 1


def test_the_tiny_base_is_an_official_class_of_about_five_million_parameters(tiny_base):
    assert type(tiny_base) is Sam3Image
    assert sum(p.numel() for p in tiny_base.parameters()) == 4_905_190
    assert not tiny_base.training
    assert tiny_base.name_or_path == "tiny"


def test_loading_the_tiny_base_twice_gives_the_same_outputs_and_keeps_the_random_state(tiny_base):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = load_base("tiny", device="cpu")
    assert torch.equal(torch.rand(3), expected)
    first, second = forward(tiny_base), forward(again)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_weights_file_is_small_and_its_hash_is_checked(tmp_path, monkeypatch):
    packaged = tiny.packaged_weights()
    assert packaged.stat().st_size <= 5_000_000
    assert hashlib.sha256(packaged.read_bytes()).hexdigest() == tiny.WEIGHTS_SHA256
    damaged = tmp_path / tiny.WEIGHTS_FILE
    damaged.write_bytes(packaged.read_bytes()[:-1] + b"\x00")
    monkeypatch.setattr(tiny, "packaged_weights", lambda: damaged)
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256 is"):
        tiny.load_tiny_sam3()


def test_saved_weights_load_again_as_fp16_rounds_them(tmp_path):
    model = tiny.build_tiny_sam3(seed=1)
    tiny.save_tiny_sam3(model, tmp_path / "weights.safetensors")
    loaded = tiny.load_tiny_sam3(tmp_path / "weights.safetensors")
    for name, parameter in loaded.named_parameters():
        original = model.get_parameter(name)
        expected = original if "token_embedding" in name else original.half().float()
        assert torch.equal(parameter, expected), name


def test_weights_of_another_architecture_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"something": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"is not a tiny SAM3 of this version: missing .*unexpected"):
        tiny.load_tiny_sam3(tmp_path / "weights.safetensors")


def test_the_token_table_has_the_same_bits_everywhere():
    table = tiny.seeded_token_embedding()
    assert table.shape == (49408, 64)
    assert hashlib.sha256(table.numpy().tobytes()).hexdigest() == tiny.EMBEDDING_SHA256


def test_an_untrained_tiny_model_is_the_same_for_the_same_seed():
    first, again, other = (tiny.build_tiny_sam3(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_sizes_are_known_without_loading():
    assert (base_info("tiny").resolution, base_info("tiny").num_queries) == (112, 16)
    assert (base_info("facebook/sam3").resolution, base_info("/some/sam3.pt").num_queries) == (1008, 200)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        pytest.param("tinny", r"unknown base 'tinny'; did you mean 'tiny'\?", id="typing error"),
        pytest.param("/nowhere/sam3.pt", "no checkpoint at '/nowhere/sam3.pt'", id="missing file"),
        pytest.param(
            "facebook/sam3", "not in the local cache and the Hub could not be reached", id="offline"
        ),
    ],
)
def test_a_base_that_cannot_be_had_is_one_error(base, message, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(base)


def test_a_run_records_a_base_file_by_its_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "sam3.pt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("sam3.pt", "./sam3.pt", "~/sam3.pt"):
        assert checkpoint.absolute_base(given) == str(tmp_path / "sam3.pt")
    assert checkpoint.absolute_base("tiny") == "tiny"
    assert checkpoint.absolute_base("facebook/sam3") == "facebook/sam3"


def test_missing_access_says_how_to_get_it(monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    response = types.SimpleNamespace(headers={}, request=None, status_code=403)

    def gated(**kwargs):
        raise GatedRepoError("403", response=response)

    monkeypatch.setattr(checkpoint, "hf_hub_download", gated)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint("facebook/sam3")
    text = str(caught.value)
    assert "this account has no access to it" in text
    for step in (
        "ask for access at",
        "hf auth login",
        "--base /path/to/sam3.pt",
        "'tiny' runs every command",
    ):
        assert step in text


def test_a_checkpoint_cut_short_is_one_error(tmp_path):
    file = tmp_path / "sam3.pt"
    torch.save({"detector.x": torch.zeros(1000)}, file)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="not a readable torch checkpoint, or cut short"):
        load_official_sam3(file)


def test_the_meta_build_has_the_full_size_and_no_memory():
    model = build_meta_sam3()
    assert sum(p.numel() for p in model.parameters()) == 840_509_750
    assert all(p.is_meta for p in model.parameters())


def test_the_focal_loss_on_the_cpu_is_torchvision_s():
    from torchvision.ops import sigmoid_focal_loss

    logits, targets = torch.randn(50), (torch.rand(50) > 0.5).float()
    ours = cpu.sigmoid_focal_loss(logits, targets, 0.25, 2.0)
    torch.testing.assert_close(ours, sigmoid_focal_loss(logits, targets, 0.25, 2.0))


def test_without_triton_the_tiny_base_loads_and_a_kernel_says_what_is_missing():
    code = """
import importlib.machinery, sys
class WithoutTriton(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = WithoutTriton
from sam3_lora import load_base
load_base("tiny", device="cpu")
from sam3.model.edt import edt_kernel
try:
    edt_kernel[(1,)]()
except ImportError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "GPU kernel 'edt_kernel' needs triton, which is not installed" in result.stdout


@pytest.mark.full
def test_a_full_size_checkpoint_loads_with_meta_s_prefix_and_is_refused_when_incomplete(tmp_path):
    model = load_base("random", device="cpu")
    state = {f"detector.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "sam3.pt")
    loaded = load_official_sam3(tmp_path / "sam3.pt")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    del loaded
    state.pop("detector.dot_prod_scoring.hs_proj.weight")
    torch.save(state, tmp_path / "sam3.pt")
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors missing"):
        load_official_sam3(tmp_path / "sam3.pt")
