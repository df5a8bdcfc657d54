"""Whether Weights & Biases can be used as a config asks. Imports neither torch nor wandb."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any


def wandb_problems(settings: Any) -> list[str]:
    """Return what is wrong with ``training.wandb``: ``None``, the name of a project, or keywords of ``wandb.init``."""
    if settings is None:
        return []
    if not isinstance(settings, (str, Mapping)) or not settings:
        return [f"training.wandb must be the name of a project, or keywords of wandb.init, got {settings!r}"]
    if find_spec("wandb") is None:
        return [
            f"training.wandb is {settings!r}, but the package wandb is not installed: pip install 'sam3-lora[wandb]', or "
            "leave it null; TensorBoard and training.csv need nothing"
        ]
    return []
