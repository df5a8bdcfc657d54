"""Which autocast a run trains under: asked for, or chosen by the hardware."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sam3_lora.errors import ConfigError, did_you_mean

AUTO = "auto"
AMP_DTYPES = (AUTO, "bfloat16", "float16")


def chosen_amp(enabled: Any, amp_dtype: Any) -> tuple[bool, str]:
    """Return whether there is autocast, and its dtype.

    ``auto`` turns it on where there is CUDA. As dtype it is bfloat16, whose range is that of float32, or float16 with the
    official trainer's loss scaling on GPUs that have no bfloat16 (before Ampere). The CPU knows bfloat16 only.

    Args:
        enabled: ``training.amp_enabled``: true, false or ``auto``.
        amp_dtype: ``training.amp_dtype``: one of :data:`AMP_DTYPES`.

    Raises:
        ConfigError: For other values, or float16 on the CPU.
    """
    if enabled not in (True, False, AUTO):
        raise ConfigError(f"training.amp_enabled must be true, false or auto, got {enabled!r}")
    if amp_dtype not in AMP_DTYPES:
        hint = did_you_mean(str(amp_dtype), AMP_DTYPES)
        raise ConfigError(f"training.amp_dtype must be auto, bfloat16 or float16, got {amp_dtype!r}{hint}")
    cuda = torch.cuda.is_available()
    on = cuda if enabled == AUTO else bool(enabled)
    if on and amp_dtype == "float16" and not cuda:
        raise ConfigError("training.amp_dtype: float16 needs CUDA; take auto, or training.amp_enabled: false")
    if amp_dtype != AUTO:
        return on, str(amp_dtype)
    has_bfloat16 = not cuda or torch.cuda.is_bf16_supported(including_emulation=False)
    return on, "bfloat16" if has_bfloat16 else "float16"


def resolved_amp(optim: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the ``optim`` block of a trainer with its ``amp`` as :func:`chosen_amp` chose it."""
    if optim is None:
        return None
    amp = dict(optim.get("amp") or {})
    enabled, dtype = chosen_amp(amp.get("enabled", False), amp.get("amp_dtype", AUTO))
    return {**optim, "amp": {**amp, "enabled": enabled, "amp_dtype": dtype}}
