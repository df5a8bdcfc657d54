"""The Hydra target of ``trainer.model``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch.nn.parallel import DistributedDataParallel

from sam3_lora.adapter import get_peft_sam3, load_adapter
from sam3_lora.adapter.copies import is_quantised
from sam3_lora.base.checkpoint import DEFAULT
from sam3_lora.base.loading import load_base
from sam3_lora.errors import ConfigError, TargetError, as_report
from sam3_lora.memory import apply_levers, memory_settings
from sam3_lora.training.image_settings import resolution_problems
from sam3_lora.training.monitor import NO_HEAD
from sam3_lora.training.precision import chosen_amp
from sam3_lora.training.starts import dataset_losses

from sam3.model.sam3_image import Sam3Image  # isort: skip  (the modules above stand in for triton)


def build_sam3_lora_model(
    base: str = DEFAULT,
    preset: Any = "balanced",
    overrides: Mapping[str, Any] | None = None,
    adapter_path: str | None = None,
    enable_segmentation: bool = True,
    eval_mode: bool = False,
    quantization: str | None = None,
    init_data: str | None = None,
    memory: Mapping[str, Any] | None = None,
    amp: bool | Literal["auto"] = "auto",
    amp_dtype: Literal["auto", "bfloat16", "float16"] = "auto",
    resolution: int | None = None,
) -> Sam3Image:
    """Return a base with LoRA injected, on the CPU, for the official trainer, which moves it.

    The result is the inner model of the ``PeftModel``: of the official class, with the official parameter names, so
    that the patterns of official optimizer settings match.

    Args:
        base: As for :func:`sam3_lora.load_base`.
        preset: As for :func:`sam3_lora.get_peft_sam3`; in a config, settings of another method name their class with
            ``_target_``.
        overrides: Keywords of :func:`sam3_lora.get_peft_sam3` that replace parts of the preset.
        adapter_path: Folder of a saved adapter to start from; ``preset`` and ``overrides`` are then not used.
        enable_segmentation: Build the segmentation head; without it the losses must be of boxes only.
        eval_mode: Return the model in eval mode.
        quantization: As for :func:`sam3_lora.load_base`. The model is then on the GPU of this process already.
        init_data: Folder of the dataset that an adapter with ``init_lora_weights="eva"`` or ``"lora_ga"`` starts from.
        memory: The ``memory`` block of a config, what :class:`sam3_lora.memory.MemorySettings` holds; ``None`` trains as
            the official recipe does.
        amp: Whether it is trained under autocast; ``"auto"`` where there is CUDA.
        amp_dtype: Of the autocast; ``"auto"``: bfloat16 where the GPU has it.
        resolution: Side in pixels of the images that it will be given; a base takes one only.

    Raises:
        ConfigError: For another resolution, with the reason.
        TargetError: If there is nothing to adapt under a name, such as in a segmentation head that is not built.
    """
    if resolution is not None and (problems := resolution_problems(resolution, base)):
        raise ConfigError(as_report(problems))
    settings = memory_settings(memory)
    # Quantised weights are made where they stay.
    on_gpu = quantization is not None and torch.cuda.is_available()
    model = load_base(
        base,
        device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu",
        eval_mode=eval_mode,
        enable_segmentation=enable_segmentation,
        quantization=quantization,
    )
    if adapter_path is not None:
        adapted = load_adapter(model, adapter_path, is_trainable=not eval_mode)
    else:
        steps = dataset_losses(init_data) if init_data else None
        try:
            adapted = get_peft_sam3(model, preset=preset, init_data=steps, **(overrides or {}))
        except TargetError as error:
            raise error if enable_segmentation else TargetError(f"{error}. {NO_HEAD}") from error
    inner: Sam3Image = adapted.get_base_model()
    autocast, dtype = chosen_amp(amp, amp_dtype)
    apply_levers(inner, settings, autocast and dtype == "bfloat16")
    _keep_from_ddp(inner)
    return inner


def _keep_from_ddp(model: Sam3Image) -> None:
    """Tell DistributedDataParallel what to leave alone.

    Quantised weights, which it would view as plain tensors to compare the processes, which all make the same. Buffers, which
    are tables of constants here (positions, the causal mask): it would send them in every step, at full size 9.4 MB.
    """
    names = [name for name, parameter in model.named_parameters() if is_quantised(parameter)]
    names += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
