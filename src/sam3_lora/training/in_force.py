"""What a run does, a line for each thing: what its settings came to with these data on this machine."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from sam3_lora.adapter import adapted_modules, count_parameters
from sam3_lora.training.accumulation import AccumulatedLoss


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
    if processes > 1:
        sent = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
        facts["Exchange"] = f"{sent / 1e6:.2f} MB of gradients an optimizer step; {trainer.exchange}"
    if images:
        facts["Data"] = (
            f"{_counted(images, 'image')}, {_counted(images // step, 'step')} an epoch, {_counted(prompts, 'prompt')} an image"
        )
    rates = learning_rates(trainer, images // step * trainer.max_epochs)
    facts["Image features"] = image_features(trainer.data_conf, prompts)
    return facts | {"Losses": _losses(trainer), "Monitor": _monitor(trainer)} | rates


def image_features(data: Any, prompts: int) -> str:
    """Return how often the vision encoder sees an image in a pass over the data.

    Args:
        data: The ``trainer.data`` block of the config, whose official loader may cut the prompts of an image into chunks.
        prompts: Asked of each image.
    """
    repeated = []
    for phase, block in data.items():
        loader = ((block or {}).get("dataset") or {}).get("coco_json_loader") or {}
        chunk = loader.get("category_chunk_size")
        if chunk and chunk < prompts:
            repeated.append(f"{phase}: {-(-prompts // chunk)} times an image, category_chunk_size is {chunk}")
    if not repeated:
        return "once an image, for all of its prompts"
    return (
        f"{'; '.join(repeated)}. Each time costs 5.6 TFLOP at full size (10 prompts in pairs: 32.5 instead of 10.2): "
        "set it to null"
    )


def _losses(trainer: Any) -> str:
    loss = trainer.loss["all"]
    terms = [*getattr(loss, "loss_fns_find", []), getattr(loss, "loss_fn_semantic_seg", None)]
    weights = {name: weight for term in terms for name, weight in getattr(term, "weight_dict", {}).items()}
    line = ", ".join(f"{name} x {weight:g}" for name, weight in weights.items() if weight)
    if trainer.gradient_accumulation_steps > 1 and not isinstance(loss, AccumulatedLoss):
        line += "; each forward pass by its own counts: accumulation is not the big batch"
    norm = getattr(trainer.gradient_clipper, "max_norm", None)
    return line + ("; gradients not clipped" if norm is None else f"; gradient norm clipped to {norm:g}")


def _monitor(trainer: Any) -> str:
    every = trainer.val_epoch_freq
    first = 1 + every * bool(trainer.skip_first_val)
    if trainer.mode == "train_only" or trainer.best_metric is None:
        line = "no best adapter is kept"
    else:
        line = f"{trainer.best_metric} decides adapters/best, validated "
        line += (
            "after every epoch" if every == 1 else f"after epochs {first}, {first + every}, ... and the last"
        )
    patience, decay = trainer.early_stopping_patience, trainer.ema_decay
    stop = (
        "no early stopping"
        if patience is None
        else f"stops after {_counted(patience, 'validation')} without a rise"
    )
    average = "no average of the weights" if decay is None else f"weights averaged with decay {decay:g}"
    return f"{line}; {stop}; {average}"


def _precision(device: torch.device, amp: Any) -> str:
    if amp is None or not amp.enabled:
        return f"float32 on {device.type}"
    scaled = ", with loss scaling" if amp.amp_dtype == "float16" else ""
    return f"{amp.amp_dtype} autocast on {device.type}{scaled}"


def learning_rates(trainer: Any, steps: int) -> dict[str, str]:
    """Return what the schedulers will set in the first, the middle and the last step, a line for each group of parameters
    or one for all where they do not differ. If the number of steps is not known, it is 0."""
    optim, rates = trainer.optim, []
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    last_one = (steps - 1) / steps if steps else 1 - 1e-9
    for where in (last_one, 0.5, 0.0):  # the first step comes first again
        optim.step_schedulers(where, round(where * steps))
        rates.append([group["lr"] for group in optim.optimizer.param_groups])
    lines: dict[str, list[str]] = {}  # what is set -> the names of all for which it is
    for group, last, middle, first in zip(optim.optimizer.param_groups, *rates, strict=True):
        tensors = [names[p].removeprefix("module.") for p in group["params"] if p.requires_grad]
        line = f"{_course(first, middle, last)}, {type(optim.optimizer).__name__}, weight decay {group['weight_decay']:g}"
        if tensors:
            lines.setdefault(line, []).extend(tensors)
    titled: dict[str, str] = {}
    for line, tensors in lines.items():
        title = "Learning rate" + _common_part(tensors)
        titled[f"{title} {len(titled) + 1}" if title in titled else title] = (
            f"{line}, {_counted(len(tensors), 'tensor')}"
        )
    return titled


def _course(first: float, middle: float, last: float) -> str:
    if first == middle == last:
        return f"{first:g}"
    if min(first, last) <= middle <= max(first, last):
        return f"{first:g} to {last:.3g}"
    return f"{first:g}, {middle:.3g} in the middle, {last:.3g} at the end"


def _common_part(names: Collection[str]) -> str:
    """Return what the parameters of a group have in common, ready to follow a word."""
    parts = {
        " of the vision encoder": "backbone.vision_backbone.",
        " of the text encoder": "backbone.language_backbone.",
    }
    part = next(
        (text for text, prefix in parts.items() if all(name.startswith(prefix) for name in names)), ""
    )
    return part + (", LoRA B" if all(".lora_B." in name for name in names) else "")


def _counted(number: int, word: str, plural: str = "") -> str:
    return f"{number} {word if number == 1 else plural or word + 's'}"
