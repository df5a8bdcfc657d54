"""LoRA+ (arXiv 2402.12354) for the official optimizer: B learns faster than A."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import nn

from sam3_lora.errors import ConfigError

from sam3.train.optim.optimizer import ValueScaler  # isort: skip  (after the modules that stand in for triton)


def lora_plus(
    scheduler_cfgs: Sequence[Sequence[Any]], model: nn.Module, ratio: float | None = None
) -> list[list[Any]]:
    """Return the official optimizer's groups with the B of every adapted module in one of ``ratio`` times the rate.

    A target for ``trainer.optim.param_group_modifiers``. All else about the groups stays, schedules too.

    Args:
        scheduler_cfgs: A list for each option, such as ``lr``, of its groups: ``option``, ``scheduler``,
            ``parameter_names``.
        model: Not needed; the official optimizer gives it.
        ratio: Rate of B over rate of A, 1 or more; ``None`` leaves the groups as they are.

    Raises:
        ConfigError: If the ratio is no such number.
    """
    if ratio is None:
        return [list(groups) for groups in scheduler_cfgs]
    if not isinstance(ratio, Real) or isinstance(ratio, bool) or ratio < 1:
        raise ConfigError(
            f"training.lora_plus_ratio must be a number of 1 or more, got {ratio!r}; 16 is the paper's"
        )
    return [[part for group in groups for part in _split(group, ratio)] for groups in scheduler_cfgs]


def _split(group: Any, ratio: float) -> list[Any]:
    names = set(group["parameter_names"])
    faster = {name for name in names if ".lora_B." in name}
    if group["option"] != "lr" or not faster:
        return [group]
    rest = {"option": "lr", "scheduler": group["scheduler"], "parameter_names": names - faster}
    return [rest, {**rest, "scheduler": ValueScaler(rest["scheduler"], ratio), "parameter_names": faster}]
