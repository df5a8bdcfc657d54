"""How much memory a run has in use, and what to say when there is no more of it."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Mapping
from typing import Any

import psutil
import torch

from sam3_lora.errors import MemoryShortage
from sam3_lora.estimation.advice import cheapest
from sam3_lora.estimation.estimate import Estimate
from sam3_lora.training.memory_check import BatchSize, estimated_for

_CHANGES = 3  # of the advice


class MemoryUse:
    """Memory in use now and at the peak since the start, of the GPU or, without one, of this process."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._peak = 0

    def read(self) -> dict[str, Any]:
        """Return the fields of a progress event. Call it before the official trainer resets the peak."""
        if self._on_cuda:
            self._peak = max(self._peak, torch.cuda.max_memory_allocated())
            return {
                "memory_of": "GPU memory",
                "memory_bytes": torch.cuda.memory_allocated(),
                "peak_bytes": self._peak,
            }
        used, unit = psutil.Process().memory_info().rss, 1 if sys.platform == "darwin" else 1024
        peak = (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        )  # which the kernel brings up to date late
        return {"memory_of": "process memory", "memory_bytes": used, "peak_bytes": max(used, peak)}


def is_memory_error(error: BaseException) -> bool:
    """Whether an exception says that memory has run out: of CUDA, of torch's CPU allocator, or of Python."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch has no class of its own for its CPU allocator (c10/core/impl/alloc_cpu.cpp).
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def memory_shortage(
    error: BaseException, where: str, device: torch.device, size: BatchSize | None, model: Mapping[str, Any]
) -> MemoryShortage:
    """Return the error that explains one of :func:`is_memory_error`.

    Args:
        error: What torch said.
        where: What was going on, such as ``"epoch 1, step 2 of 3"``.
        device: That the model is on.
        size: Of the batch; ``None`` if it was not there yet.
        model: The ``trainer.model`` block of the config.
    """
    lines = [f"out of {_of(device)} in {where}: {_asked(error)}", f"  in use: {_in_use(device)}"]
    if size is not None:
        lines.append(
            f"  the batch: {size.images} images a pass, {size.prompts} prompts and {size.objects} objects an image"
        )
        found = estimated_for(model, size)
        lines += _from_estimate(found) if isinstance(found, Estimate) else _without_estimate(found, size)
    return MemoryShortage("\n".join(lines))


def _of(device: torch.device) -> str:
    return "GPU memory" if device.type == "cuda" else "memory"


def _asked(error: BaseException) -> str:
    """Return what could not be had, as torch puts it for the CPU or for CUDA."""
    amount = re.search(r"[Tt]ried to allocate ([\d.]+) (\w+)", str(error))
    if amount is None:
        return f"{type(error).__name__} {error}".strip()
    unit = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}.get(amount[2])
    return f"it asked for {_gb(float(amount[1]) * unit)} more" if unit else f"it asked for {amount[0]}"


def _in_use(device: torch.device) -> str:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        ours = torch.cuda.memory_reserved(device)
        return (
            f"{_gb(ours)} by this run, {_gb(total - free - ours)} by others and CUDA itself, of {_gb(total)}"
        )
    machine = psutil.virtual_memory()
    used = psutil.Process().memory_info().rss
    return (
        f"{_gb(used)} by this process; the machine has {_gb(machine.available)} of {_gb(machine.total)} left"
    )


def _from_estimate(found: Estimate) -> list[str]:
    parts = {name: size for name, size in found.breakdown.items() if name != "cuda_context"}
    shares = sorted(parts.items(), key=lambda part: -part[1])
    return [
        f"  estimated for it: {_gb(found.device_bytes)} on a GPU, {_gb(found.peak_bytes)} of it tensors at the peak, which is in "
        f"{found.peak_phase}",
        f"  most of it: {', '.join(f'{name} {_gb(size)}' for name, size in shares[:3])}",
        *_numbered(
            f"{advice.change} (-{_gb(advice.saves_bytes)})" for advice in cheapest(found.advice, _CHANGES)
        ),
    ]


def _without_estimate(reason: str, size: BatchSize) -> list[str]:
    """Say what decides the memory where nothing was counted: the activations, for every prompt of every image."""
    changes = []
    if size.images > 1:
        changes.append(f"training.batch_size=1 with training.gradient_accumulation_steps={size.images}")
    if size.prompts > 1:
        changes.append(
            f"fewer categories in the dataset: each of the {size.prompts} is a prompt of every image"
        )
    if size.objects > 1:
        changes.append(
            f"fewer objects in an image than {size.objects}: cut images up, or lower training.max_objects"
        )
    changes.append("a smaller preset: sam3-lora presets")
    return [
        f"  no estimate ({reason}); most of it is what is kept for the backward pass, {size.images} x {size.prompts} prompts",
        *_numbered(changes[:_CHANGES]),
    ]


def _numbered(changes: Any) -> list[str]:
    return [f"  {number}. {change}" for number, change in enumerate(changes, 1)]


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
