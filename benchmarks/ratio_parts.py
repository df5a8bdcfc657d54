"""What ratios.py compares: the tiny model, and blocks and the text encoder of the full size, each in several variants."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from sam3_lora import adapted_modules, get_peft_sam3, load_base, split_attention
from sam3_lora.adapter.copies import copy_model, in_same_memory
from sam3_lora.base.cpu import enable_cpu_training
from sam3_lora.base.official import on_meta
from sam3_lora.base.text import fill_uninitialised
from sam3_lora.base.vocabulary import bpe_path
from sam3_lora.evaluation.batches import sized_batch
from sam3_lora.inference import resolution_of
from sam3_lora.training.composition import shipped_config
from sam3_lora.training.losses import configured_losses, training_loss

from sam3.model_builder import _create_text_encoder, _create_vit_backbone  # isort: skip  (after the stand-in for triton)

FULL, FROZEN = "full fine-tuning", "frozen, no LoRA"
OFFICIAL, BARE = "official attention, no LoRA", "split attention, no LoRA"
SPLIT, PEFT_OWN = "split attention, LoRA", "PEFT's MHA, LoRA"
BASE, UNMERGED, MERGED = "base", "LoRA unmerged", "LoRA merged"

_R = 8
_ATTENTION = r"(.*\.)?attn\.(qkv|proj|[qkv]_proj|out_proj)"
_ATTENTION_AND_MLP = rf"{_ATTENTION}|(.*\.)?mlp\.(fc1|fc2|c_fc|c_proj)"
_OWN = r"(.*\.)?attn"  # the whole module, which PEFT wraps in a layer of its own


@dataclass(frozen=True)
class Variant:
    """A way to run a part. ``forward`` returns the loss; without ``trains`` it is run without gradients."""

    model: nn.Module
    forward: Callable[[], Tensor]
    trains: bool = True


@dataclass(frozen=True)
class Part:
    """Variants that do the same work, and which of them to compare: pairs of their names."""

    name: str
    variants: Mapping[str, Variant]
    ratios: Sequence[tuple[str, str]]


def tiny() -> Iterator[Part]:
    """Training steps of the tiny model with the official losses, and its inference."""
    presets = ("minimal", "balanced", "full")
    models: dict[str, nn.Module] = {FULL: _tiny_base()}
    for preset in presets:
        models[f"LoRA, {preset}"] = get_peft_sam3(_tiny_base(), preset).get_base_model()
    uniform = get_peft_sam3(_tiny_base(), "balanced", r=_R).get_base_model()
    models[f"{SPLIT}, r = {_R}"] = uniform
    models[f"{PEFT_OWN}, r = {_R}"] = _with_peft_attention(_tiny_base(), adapted_modules(uniform))
    batch = sized_batch(1, 2, 5, resolution=resolution_of(uniform))
    yield Part(
        "tiny model, 2 prompts, 5 objects",
        {name: Variant(model, _tiny_step(model, batch)) for name, model in models.items()},
        [
            *((f"LoRA, {preset}", FULL) for preset in presets),
            (f"{SPLIT}, r = {_R}", f"{PEFT_OWN}, r = {_R}"),
        ],
    )
    yield _tiny_inference(batch)


def _tiny_base() -> Any:
    enable_cpu_training()
    return load_base("tiny", device="cpu", eval_mode=False)


def _with_peft_attention(model: nn.Module, split_names: Iterable[str]) -> nn.Module:
    """Adapt what the names of a split model stand for, with PEFT's own layer for attention."""
    names = dict.fromkeys(re.sub(r"\.([qkv]|out)_proj$", "", name) for name in split_names)
    return _with_lora(model, "|".join(map(re.escape, names)))


def _tiny_step(model: Any, batch: Any) -> Callable[[], Tensor]:
    losses = configured_losses(shipped_config({"base.num_queries": model.transformer.decoder.num_queries}))
    return lambda: training_loss(model, losses, batch)


def _tiny_inference(batch: Any) -> Part:
    models = {
        BASE: _tiny_base(),
        UNMERGED: get_peft_sam3(_tiny_base(), init_lora_weights=False).get_base_model(),
        MERGED: get_peft_sam3(_tiny_base(), init_lora_weights=False).merge_and_unload(),
    }
    variants = {
        name: Variant(model.eval(), functools.partial(model, batch), trains=False)
        for name, model in models.items()
    }
    return Part("tiny model, inference, balanced", variants, [(UNMERGED, MERGED), (MERGED, BASE)])


def vit_block() -> Iterator[Part]:
    """A block of the ViT on one of its 9 windows, and a text block: a step in the middle of a network, and inference."""
    with on_meta():
        trunk = _create_vit_backbone()
    block: Any = trunk.blocks[0].to_empty(device="cpu")
    block.apply(trunk._init_weights)
    block.attn._setup_rope_freqs()
    side = block.window_size
    yield from _block_parts("full-size ViT block, one window", block, torch.randn(1, side, side, 1024))


def text_block() -> Iterator[Part]:
    """A block of the text encoder, on 8 prompts: a step in the middle of the network, and inference."""
    encoder: Any = _text_encoder().encoder
    block = copy.deepcopy(encoder.transformer.resblocks[0]).requires_grad_()
    mask = {"attn_mask": encoder.attn_mask}
    yield from _block_parts("full-size text block, 8 prompts", block, torch.randn(8, 32, 1024), **mask)


def _block_parts(name: str, block: nn.Module, x: Tensor, **keywords: Any) -> Iterator[Part]:
    attention, both = "LoRA, attention r = 8", "LoRA, attention and MLP r = 8"
    models = {
        FULL: _another(block),
        FROZEN: _another(block).requires_grad_(False),
        attention: _with_lora(split_attention(_another(block)), _ATTENTION),
        both: _with_lora(split_attention(_another(block)), _ATTENTION_AND_MLP),
    }
    steps = {
        key: Variant(model, functools.partial(_block_step, model, x, **keywords))
        for key, model in models.items()
    }
    yield Part(name, steps, [(attention, FULL), (both, FULL), (both, FROZEN)])
    yield _block_inference(name, models[both], _another(block), x, **keywords)


def _block_step(block: nn.Module, x: Tensor, **keywords: Any) -> Tensor:
    # In the middle of a network the gradient always goes on to what is below.
    output: Tensor = block(x.clone().requires_grad_(), **keywords)
    return output.square().mean()


def _block_inference(name: str, adapted: nn.Module, block: nn.Module, x: Tensor, **keywords: Any) -> Part:
    models = {BASE: block, UNMERGED: adapted, MERGED: _merged(adapted)}
    variants = {
        key: Variant(model, functools.partial(model, x, **keywords), trains=False)
        for key, model in models.items()
    }
    return Part(f"{name}, inference", variants, [(UNMERGED, MERGED), (MERGED, BASE)])


def text_encoder() -> Iterator[Part]:
    """The whole text encoder with each kind of attention, for 1 and 8 prompts, checkpointed as in training and not."""
    official = _text_encoder().requires_grad_(False)
    models: dict[str, Any] = {
        OFFICIAL: official,
        BARE: split_attention(_another(official)),
        SPLIT: _with_lora(split_attention(_another(official)), _ATTENTION),
        PEFT_OWN: _with_lora(_another(official), _OWN),
    }
    for name in (OFFICIAL, BARE):  # nothing is trained in them; this lets the backward run through all blocks
        models[name].encoder.positional_embedding.requires_grad_()
    for prompts in (1, 8):
        for checkpointed in (True, False):
            for model in models.values():
                model.train().encoder.transformer.grad_checkpointing = checkpointed
            texts = [f"kind {n + 1}" for n in range(prompts)]
            yield Part(
                f"full-size text encoder, B = {prompts}{', checkpointed' if checkpointed else ''}",
                {name: Variant(m, functools.partial(_text_step, m, texts)) for name, m in models.items()},
                [(SPLIT, PEFT_OWN), (SPLIT, OFFICIAL), (BARE, OFFICIAL)],
            )


def _text_step(encoder: nn.Module, texts: list[str]) -> Tensor:
    features: Tensor = encoder(texts, device="cpu")[1]
    return features.square().mean()


@functools.cache
def _text_encoder() -> Any:
    encoder = _create_text_encoder(str(bpe_path()))
    fill_uninitialised(encoder.encoder)
    return encoder


def _another(module: Any) -> Any:
    """Return a copy around the same weights."""
    return copy_model(module, in_same_memory)


def _with_lora(model: nn.Module, target_modules: str) -> nn.Module:
    config = LoraConfig(r=_R, lora_alpha=2 * _R, target_modules=target_modules)
    return inject_adapter_in_model(config, model)


def _merged(adapted: nn.Module) -> nn.Module:
    """Return a copy whose layers are merged and without an adapter."""
    merged = copy.deepcopy(adapted)
    for name, module in list(merged.named_modules()):
        if hasattr(module, "merge") and hasattr(module, "base_layer"):
            module.merge()
            merged.set_submodule(name, module.base_layer)
    return merged


PARTS: dict[str, Callable[[], Iterator[Part]]] = {
    "tiny": tiny,
    "vit-block": vit_block,
    "text-block": text_block,
    "text-encoder": text_encoder,
}
