"""A start for what the official text encoder leaves without one."""

from __future__ import annotations

from typing import Any

from torch import nn


def fill_uninitialised(text_encoder: Any) -> None:
    """Draw the two parameters of a ``TextTransformer`` that are ``torch.empty`` in sam3 0.1.4, in place.

    A checkpoint normally fills them; without one they are whatever was in memory, NaN now and then.
    """
    nn.init.normal_(text_encoder.positional_embedding, std=0.01)
    nn.init.normal_(text_encoder.text_projection, std=text_encoder.text_projection.shape[0] ** -0.5)
