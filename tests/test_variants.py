"""Variants of LoRA: two training steps, save, reload on an untouched base, merge."""

import importlib
import json
import re
from pathlib import Path

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from tiny_forward import assert_close, forward, two_steps, untouched

from sam3_lora.adapter import get_peft_sam3, load_adapter, save_adapter
from sam3_lora.adapter.methods import REFUSED
from sam3_lora.attention import split_attention
from sam3_lora.components import COMPONENTS

torch.set_num_threads(1)

VARIANTS = [
    pytest.param({}, id="LoRA"),
    pytest.param({"use_rslora": True}, id="rank-stabilised"),
    pytest.param({"use_dora": True}, id="DoRA"),
    pytest.param({"lora_bias": True}, id="bias in B"),
    pytest.param({"lora_dropout": 0.2}, id="dropout"),
    pytest.param({"rank_pattern": {r"layers\.0\.linear1": 2}}, id="rank pattern"),
    pytest.param({"init_lora_weights": "gaussian"}, id="gaussian"),
    pytest.param({"init_lora_weights": "orthogonal"}, id="orthogonal"),
]
CHANGE_BASE = [
    pytest.param({"init_lora_weights": "pissa"}, id="PiSSA"),
    pytest.param({"init_lora_weights": "pissa_niter_4"}, id="PiSSA, fast", marks=pytest.mark.slow),
    pytest.param({"init_lora_weights": "olora"}, id="OLoRA"),
    pytest.param(
        {"init_lora_weights": "pissa", "use_rslora": True},
        id="PiSSA, rank-stabilised",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        {"init_lora_weights": "olora", "use_rslora": True, "rank_pattern": {r"layers\.0\.linear1": 2}},
        id="OLoRA, rank-stabilised, with a pattern",
    ),
    pytest.param({"init_lora_weights": "pissa", "use_dora": True}, id="PiSSA with DoRA"),
    pytest.param({"init_lora_weights": "pissa", "train_also": "box_heads"}, id="PiSSA and whole layers"),
]


def trained(**overrides):
    return two_steps(get_peft_sam3(untouched(), "minimal", **overrides), lr=0.05)


@pytest.mark.parametrize("overrides", [*VARIANTS, *CHANGE_BASE])
def test_a_variant_trains_reloads_on_an_untouched_base_and_merges(overrides, tmp_path):
    adapted = trained(**overrides)
    expected, base = forward(adapted), forward(untouched())
    assert any((expected[name] - base[name]).abs().max() > 1e-3 for name in base)
    folder = save_adapter(adapted, tmp_path / "adapter")
    loaded = load_adapter(untouched(), folder)
    assert_close(forward(loaded), expected)
    assert_close(forward(peft.PeftModel.from_pretrained(split_attention(untouched()), folder)), expected)
    assert_close(forward(loaded.merge_and_unload()), expected)
    assert_close(forward(adapted.merge_and_unload()), expected)


@pytest.mark.parametrize("overrides", CHANGE_BASE)
def test_a_start_that_changes_the_base_keeps_its_outputs_and_is_saved_as_plain_lora(overrides, tmp_path):
    before = forward(split_attention(untouched()))
    adapted = get_peft_sam3(untouched(), "minimal", **overrides)
    assert_close(forward(adapted), before)
    folder = save_adapter(adapted, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"]) == (True, 16)
    tensors = load_file(folder / "adapter_model.safetensors")
    a = tensors["base_model.model.transformer.decoder.layers.1.linear1.lora_A.weight"]
    assert a.shape[0] == 16
    card = (folder / "README.md").read_text()
    assert "| detr_decoder | attention | 36 | 16 |" in card
    assert ("- Preset: minimal" in card) == ("rank_pattern" not in overrides)
    assert_close(forward(load_adapter(untouched(), folder)), before)


def test_our_conversion_is_that_of_peft(tmp_path):
    overrides = {"init_lora_weights": "pissa"}
    adapted = get_peft_sam3(untouched(), "minimal", **overrides)
    adapted.peft_config["default"].init_lora_weights = True  # what PEFT's own recipe asks for
    adapted.save_pretrained(tmp_path / "initial", save_embedding_layers=False)
    adapted.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.01
    save_adapter(adapted, tmp_path / "ours")
    adapted.save_pretrained(
        tmp_path / "peft",
        save_embedding_layers=False,
        path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
    )
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    theirs = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_adapter_that_is_trained_further_keeps_its_conversion(tmp_path):
    folder = save_adapter(trained(init_lora_weights="pissa"), tmp_path / "first")
    again = load_adapter(untouched(), folder, is_trainable=True)
    expected = forward(again.eval())
    assert_close(forward(load_adapter(untouched(), save_adapter(again, tmp_path / "second"))), expected)
    record = json.loads((tmp_path / "second" / "sam3_lora.json").read_text())
    assert record["parameters"] == 2 * 52_224


def documented(page, method):
    """Return the cells of a row of the page as :func:`methods_table.try_out` gives them, with the note for its number."""
    notes = dict(re.findall(r"^(\d+)\. (.*)$", page, flags=re.MULTILINE))
    (row,) = re.findall(rf"^\| {re.escape(method)} \| (.*) \|$", page, flags=re.MULTILINE)
    return [re.sub(r" \((\d+)\)$", lambda found: f": {notes[found[1]]}", cell) for cell in row.split(" | ")]


ROWS = ["LoRA", "DoRA", "PiSSA", "EVA", "LoRA-GA", "LoHa", "LoKr", "OFT", "IA3", "VeRA", "BOFT", "GraLoRA"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ROWS)
def test_a_row_of_the_table_in_the_docs_is_what_trying_gives(method, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    table = importlib.import_module("methods_table")
    page = table.PAGE.read_text(encoding="utf-8")
    tried = [table.try_out(component, (table.LORA | table.OTHERS)[method]) for component in COMPONENTS]
    assert documented(page, method) == tried


def test_the_table_in_the_docs_has_a_row_for_each_method_of_peft(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    table = importlib.import_module("methods_table")
    page = table.PAGE.read_text(encoding="utf-8")
    assert all(len(documented(page, method)) == len(COMPONENTS) for method in table.LORA | table.OTHERS)
    tried = {config.peft_type.value for config in table.OTHERS.values()}
    assert tried | REFUSED.keys() | {"LORA"} == {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
