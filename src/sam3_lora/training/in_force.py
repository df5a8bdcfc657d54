"""What a run does, a line for each thing: what its settings came to with these data on this machine."""

from __future__ import annotations

from typing import Any

import torch

from sam3_lora.adapter import adapted_modules, count_parameters


def in_force(trainer: Any, images: int, prompts: int) -> dict[str, str]:
    """Return the lines by what they are about, in the order to read them.

    Args:
        trainer: The official one, set up.
        images: For training; 0 if not known.
        prompts: Asked of each of them.
    """
    count = count_parameters(trainer.model)
    accumulation, processes = trainer.gradient_accumulation_steps, torch.distributed.get_world_size()
    step = int(trainer.train_dataset.batch_size) * processes
    facts = {
        "Adapter": f"{len(adapted_modules(trainer.model))} modules, {count.trainable:,} of {count.total:,} parameters "
        f"({count.trainable / count.total:.3%})",
        "Precision": _precision(trainer.device, trainer.optim_conf.amp),
        "Batch": f"{_counted(step, 'image')} an optimizer step: {step // accumulation // processes} a pass x {accumulation} "
        f"accumulated x {_counted(processes, 'process', 'processes')}",
    }
    if images:
        facts["Data"] = (
            f"{_counted(images, 'image')}, {_counted(images // step, 'step')} an epoch, {_counted(prompts, 'prompt')} an image"
        )
    return facts | _learning_rates(trainer.optim, images // step * trainer.max_epochs)


def _precision(device: torch.device, amp: Any) -> str:
    if amp is None or not amp.enabled:
        return f"float32 on {device.type}"
    scaled = ", with loss scaling" if amp.amp_dtype == "float16" else ""
    return f"{amp.amp_dtype} autocast on {device.type}{scaled}"


def _learning_rates(optim: Any, steps: int) -> dict[str, str]:
    """Return the rates of each group of parameters in the first, the middle and the last step, as the schedulers will
    set them. Of 0 steps, whose number is not known, schedules that count them show their first one only."""
    rates = []
    for where in (1 - 1e-9, 0.5, 0.0):  # below 1, as fvcore wants it; the first step comes first again
        optim.step_schedulers(where, int(where * steps))
        rates.append([group["lr"] for group in optim.optimizer.param_groups])
    lines: dict[str, str] = {}
    for group, last, middle, first in zip(optim.optimizer.param_groups, *rates, strict=True):
        tensors = [parameter for parameter in group["params"] if parameter.requires_grad]
        if not tensors:
            continue
        ends = f"{first:g}" if first == middle == last else f"{first:g} to {last:g}"
        if not min(first, last) <= middle <= max(first, last):
            ends = f"{first:g}, {middle:g} in the middle, {last:g} at the end"
        lines[f"Learning rate {len(lines) + 1}" if lines else "Learning rate"] = (
            f"{ends}, {type(optim.optimizer).__name__}, weight decay {group['weight_decay']:g}, "
            f"{_counted(len(tensors), 'tensor')}"
        )
    return lines


def _counted(number: int, word: str, plural: str = "") -> str:
    return f"{number} {word if number == 1 else plural or word + 's'}"
