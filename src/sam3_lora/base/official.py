"""The full-size SAM3 image model: Meta's checkpoint, random weights, or shapes only, by the official builder."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sam3_lora.base.checkpoint import CHECKPOINT_FILE, DEFAULT, existing_checkpoint
from sam3_lora.base.cpu import cuda_calls_on_cpu, enable_cpu, provide_triton
from sam3_lora.base.text import fill_uninitialised
from sam3_lora.base.vocabulary import bpe_path
from sam3_lora.errors import CheckpointError

provide_triton()

from sam3.model.sam3_image import Sam3Image  # noqa: E402
from sam3.model_builder import build_sam3_image_model  # noqa: E402


def load_official_sam3(
    checkpoint: Path, eval_mode: bool = True, enable_segmentation: bool = True
) -> Sam3Image:
    """Build the image model on the CPU and load Meta's checkpoint into it, fp32.

    Args:
        checkpoint: A ``sam3.pt``: tensors under ``detector.``, as Meta ships them, or without the prefix.
        eval_mode: Return the model in eval mode; otherwise in training mode, with the official matcher.
        enable_segmentation: Build the segmentation head; without it the model gives boxes only.

    Raises:
        CheckpointError: If the file is missing, not a checkpoint, or does not fill the whole model.
    """
    tensors = _read_checkpoint(checkpoint)
    model = _build(eval_mode, enable_segmentation)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in shapes if name not in tensors and not name.endswith("freqs_cis")]
    misshaped = [
        f"{name}: {tuple(tensors[name].shape)} in the file, {shape} in the model"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if missing or misshaped:
        raise CheckpointError(
            f"{str(checkpoint)!r} is not a complete SAM3 image checkpoint: "
            f"{len(missing)} of {len(shapes)} tensors missing (first: {missing[:3]}), "
            f"{len(misshaped)} of another shape (first: {misshaped[:3]}). Take {CHECKPOINT_FILE!r} of {DEFAULT!r}."
        )
    model.load_state_dict(tensors, strict=False)  # the rest of the file is the video tracker
    return model


def build_random_sam3(seed: int = 0, eval_mode: bool = True, enable_segmentation: bool = True) -> Sam3Image:
    """Build the full-size image model with seeded random weights on the CPU, for tests and benchmarks.

    The global random state of torch is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build(eval_mode, enable_segmentation)


def build_meta_sam3(enable_segmentation: bool = True, enable_inst_interactivity: bool = False) -> Sam3Image:
    """Build the full-size image model on the meta device: names and shapes without memory, in a few seconds.

    It can be counted and adapted, not run: some tables of the official classes are no buffers.
    """
    with on_meta():
        model = build_sam3_image_model(
            bpe_path=str(bpe_path()),
            device="cpu",
            eval_mode=False,
            load_from_HF=False,
            enable_segmentation=enable_segmentation,
            enable_inst_interactivity=enable_inst_interactivity,
        )
    leave_autocast(model)
    return model


def leave_autocast(model: torch.nn.Module) -> None:
    """Leave the autocast that the official tracker enters for the whole process (sam3_tracking_predictor.py:50).

    Within one, others are inner ones, whose end does not empty the cache of cast weights: a later model under autocast
    would go on with its adapter as it was before a step of the optimizer.
    """
    for module in model.modules():
        context = getattr(module, "bf16_context", None)
        if isinstance(context, torch.autocast):
            context.__exit__(None, None, None)


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Let the official builders make their models without memory, also where they name a device."""
    with torch.device("meta"), _OnMeta():
        yield


def _build(eval_mode: bool, enable_segmentation: bool) -> Sam3Image:
    enable_cpu()
    with cuda_calls_on_cpu():
        model = build_sam3_image_model(
            bpe_path=str(bpe_path()),
            device="cpu",
            eval_mode=eval_mode,
            load_from_HF=False,
            enable_segmentation=enable_segmentation,
        )
    fill_uninitialised(model.backbone.language_backbone.encoder)
    return model


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(existing_checkpoint(path), map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{str(path)!r} is not a readable torch checkpoint, or cut short: {error}"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{str(path)!r} holds no state dict; SAM3's checkpoint is {CHECKPOINT_FILE!r}")
    detector = {n.removeprefix("detector."): t for n, t in content.items() if n.startswith("detector.")}
    return detector or dict(content)


class _OnMeta(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.linspace:
            kwargs = {**kwargs, "device": "cpu"}  # ViT.__init__ reads DropPath rates from it with .item()
        elif kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)
