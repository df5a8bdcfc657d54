"""An exponential moving average of the trained weights, which is often better and steadier than the last of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """The moving average of a model's trainable parameters, in float32 beside them: 4 bytes for each.

    After ``n`` updates the decay is at most ``(1 + n) / (10 + n)``, so that the average of a short run is not that of
    its first steps.

    Args:
        model: Its trainable parameters must stay the same tensors.
        decay: Of each update: the average is of about ``1 / (1 - decay)`` steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().float().clone() for name, p in self._parameters.items()}
        self._updates = 0
        self._in_use = False

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self._updates += 1
        decay = min(self.decay, (1 + self._updates) / (10 + self._updates))
        for name, parameter in self._parameters.items():
            self._average[name].lerp_(parameter.detach().float(), 1 - decay)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the model have the average for a while; within another use of it nothing changes."""
        if self._in_use:
            yield
            return
        trained = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._in_use = True
        self._write(self._average)
        try:
            yield
        finally:
            self._write(trained)
            self._in_use = False

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` takes: the average on the CPU, and the number of updates."""
        return {
            "updates": self._updates,
            "weights": {name: tensor.cpu().clone() for name, tensor in self._average.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as after :meth:`state_dict`."""
        self._updates = state["updates"]
        for name, tensor in self._average.items():
            tensor.copy_(state["weights"][name])

    @torch.no_grad()
    def _write(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name])
