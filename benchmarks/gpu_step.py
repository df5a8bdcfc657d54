"""One training step as the configs set it up, and what it takes: for gpu.py."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from sam3_lora.base.checkpoint import FULL_SIZE, TINY
from sam3_lora.base.cpu import enable_cpu_training, provide_triton
from sam3_lora.evaluation.batches import sized_batch
from sam3_lora.training.losses import training_loss

provide_triton()

from sam3.train.utils.train_utils import register_omegaconf_resolvers  # noqa: E402

SIZES = {
    "full": ("random", FULL_SIZE),
    "tiny": ("tiny", TINY),
}
MEASURED, OUT_OF_MEMORY, NO_TIME = "measured", "out of memory", "not run: no time left"
OUTPUTS = ("pred_logits", "pred_boxes", "pred_masks", "semantic_seg")

_WARM_UP_STEPS = 2  # the first makes the state of the optimizer, and both choose kernels
_SECONDS_A_CASE = 5.0


@dataclass(frozen=True)
class Cost:
    """What the steps of one case took.

    Attributes:
        outcome: :data:`MEASURED`, :data:`OUT_OF_MEMORY` or :data:`NO_TIME`; the other fields are ``None`` unless measured.
        peak_bytes: Most bytes in tensors at once; ``None`` without CUDA.
        reserved_bytes: Most bytes that torch took from the device; the CUDA context comes on top. ``None`` without CUDA.
        seconds: Median of the steps.
        steps: How many were timed.
    """

    outcome: str
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    seconds: float | None = None
    steps: int | None = None


class Training:
    """A model with its losses and optimizer, made by the targets of our training configs.

    Args:
        size: A key of :data:`SIZES`.
        preset: Name of the config.
        settings: Keys of the config to change, by dotted name.
        device: Where to train.
        amp: bfloat16 autocast.
    """

    def __init__(
        self, size: str, preset: str, settings: Mapping[str, Any], device: torch.device, amp: bool = True
    ) -> None:
        base, shape = SIZES[size]
        self.resolution, self.device, self.amp = shape.resolution, device, amp
        enable_cpu_training()
        config = _config(
            preset,
            {
                "base.name": base,
                "base.resolution": shape.resolution,
                "base.num_queries": shape.num_queries,
                "training.amp_enabled": amp,
                "paths.dataset_root": "none",
                **settings,
            },
        )
        self.model: Any = instantiate(config.trainer.model).to(device).train()
        self.losses = instantiate(config.trainer.loss.all, normalization="local").to(device)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self.trained, lr=config.training.lr)

    def step(self, batch: Any) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = training_loss(self.model, self.losses, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self._optimizer.step()

    def cost(self, batch: Any, most_steps: int) -> Cost:
        """Return what a step takes, from as many steps as fit into some seconds."""
        start_of_peak(self.device)
        for _ in range(_WARM_UP_STEPS):
            self.step(batch)
        seconds: list[float] = []
        while not seconds or (len(seconds) < most_steps and sum(seconds) < _SECONDS_A_CASE):
            synchronise(self.device)
            start = time.perf_counter()
            self.step(batch)
            synchronise(self.device)
            seconds.append(time.perf_counter() - start)
        self._optimizer.zero_grad(set_to_none=True)
        peak, reserved = peaks(self.device)
        return Cost(MEASURED, peak, reserved, statistics.median(seconds), len(seconds))

    def outputs(self, batch: Any) -> dict[str, Tensor]:
        """Return the final outputs of inference, fp32, on the CPU."""
        self.model.eval()
        with torch.no_grad(), self._autocast():
            final = self.model(batch)[0]  # of the last step, in eval mode
        self.model.train()
        return {name: final[name].float().cpu() for name in OUTPUTS if final.get(name) is not None}

    def frozen(self) -> dict[str, Tensor]:
        """Return a copy of all frozen parameters on the CPU."""
        frozen = {name: p for name, p in self.model.named_parameters() if not p.requires_grad}
        return {name: p.detach().to("cpu", copy=True) for name, p in frozen.items()}

    def batch(self, images: int, prompts: int, objects: int) -> Any:
        return sized_batch(images, prompts, objects, resolution=self.resolution, device=self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp)


def attempt(measure: Callable[[], Cost]) -> Cost:
    """Return what a measurement returns, or that memory ran out during it; other errors are raised."""
    try:
        return measure()
    except (torch.OutOfMemoryError, RuntimeError) as error:
        # On the CPU it is a plain RuntimeError.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
    return Cost(OUT_OF_MEMORY)  # not inside `except`, where the traceback still holds the tensors


def set_cuda_as_the_trainer() -> None:
    """Choose what the official trainer does by default (``CudaConf``), and matters for time and for float32."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def start_of_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: torch.device) -> tuple[int | None, int | None]:
    if device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _config(preset: str, settings: Mapping[str, Any]) -> Any:
    if not OmegaConf.has_resolver("get_method"):
        register_omegaconf_resolvers()
    with initialize_config_module("sam3.train", version_base="1.2"):
        return compose(
            f"sam3_lora/{preset}", [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        )
