"""Adapters whose start changed the base (PiSSA, OLoRA, LoRA-GA, CorDA), as plain LoRA of the base as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor

from sam3_lora.plan import Strength

# They take a part out of the base's weights, and start the adapter with that part.
_CHANGE_BASE = ("pissa", "olora", "lora_ga", "corda")


def start_changes_base(config: PeftConfig) -> bool:
    """Whether the initialisation of such an adapter changes weights of the base."""
    return isinstance(config, LoraConfig) and str(config.init_lora_weights).startswith(_CHANGE_BASE)


def as_plain_lora(
    config: LoraConfig, trained: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return config and tensors of the plain LoRA that does to the original base what an adapter does to a changed one.

    The base is W - s B0 A0 and the model W - s B0 A0 + s B A, so the difference to W is s [B, -B0] [A; A0]: twice the
    rank at the same scale. PEFT's ``path_initial_model_for_weight_conversion`` does the same, but for ``alpha_pattern``
    with rank-stabilised scaling, which it doubles (``PeftModel.save_pretrained`` in 0.21.2).

    Args:
        config: Of the adapter; stays as it is.
        trained: Its tensors under PEFT's keys.
        initial: The same as they were before the training.
    """
    plain: Any = copy.deepcopy(config)
    rs = config.use_rslora
    plain.r, plain.lora_alpha = plain_strength(Strength(plain.r, plain.lora_alpha), rs)
    plain.rank_pattern = {key: plain_strength(Strength(r, 1), rs).r for key, r in plain.rank_pattern.items()}
    plain.alpha_pattern = {
        key: plain_strength(Strength(1, alpha), rs).lora_alpha for key, alpha in plain.alpha_pattern.items()
    }
    plain.init_lora_weights = True
    return plain, {name: _joined(name, tensor, initial) for name, tensor in trained.items()}


def plain_strength(strength: Strength, use_rslora: bool) -> Strength:
    """Return twice the rank with the alpha that keeps the scale: alpha / r, or alpha / sqrt(r) if rank-stabilised."""
    return Strength(2 * strength.r, strength.lora_alpha * (math.sqrt(2) if use_rslora else 2))


def _joined(name: str, tensor: Tensor, initial: Mapping[str, Tensor]) -> Tensor:
    if ".lora_A." in name:
        return torch.cat([tensor, initial[name]], dim=0)
    if ".lora_B." in name:
        return torch.cat([tensor, -initial[name]], dim=1)
    return tensor
