"""Running the official sam3 code without CUDA and without triton.

sam3 0.1.4 asks for a GPU in a few places where none is needed. The functions here answer those calls; with CUDA
present every one of them does nothing. Import this module before any module of ``sam3``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _CudaToCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


@contextlib.contextmanager
def cuda_calls_on_cpu() -> Iterator[None]:
    """Create tensors that ask for ``device="cuda"`` on the CPU, where there is no CUDA.

    Needed while an official model is built: ``position_encoding.py:47`` and ``decoder.py:281`` name the device.
    """
    if torch.cuda.is_available():
        yield
    else:
        with _CudaToCpu():
            yield


def enable_cpu() -> None:
    """Let official inference code run where there is no CUDA. Safe to call any number of times."""
    if not torch.cuda.is_available():
        # geometry_encoders.py:659 pins a tensor in every forward; pinning means nothing without a GPU.
        torch.Tensor.pin_memory = _not_pinned  # type: ignore[assignment, method-assign]


def _not_pinned(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    return tensor


def enable_cpu_training() -> None:
    """Let the official losses and trainer run where there is no CUDA. Safe to call any number of times.

    The focal loss of sam3 is a triton kernel: tensors on the CPU get the same formula in plain torch, tensors on a
    GPU still get the kernel.
    """
    enable_cpu()
    if not torch.cuda.is_available():
        # train_utils.MemMeter.update resets the peak without asking whether there is a device.
        torch.cuda.reset_peak_memory_stats = lambda device=None: None
    from sam3.train.loss import loss_fns

    for name, reduce in (("triton_sigmoid_focal_loss", False), ("triton_sigmoid_focal_loss_reduce", True)):
        kernel = getattr(loss_fns, name)
        if not isinstance(kernel, _FocalLoss):
            setattr(loss_fns, name, _FocalLoss(kernel, reduce))


class _FocalLoss:
    """The triton kernel for GPU tensors, :func:`sigmoid_focal_loss` for the rest."""

    def __init__(self, kernel: Any, reduce: bool) -> None:
        self.kernel = kernel
        self.reduce = reduce

    def __call__(
        self, inputs: torch.Tensor, targets: torch.Tensor, alpha: float = 0.25, gamma: float = 2
    ) -> Any:
        if inputs.is_cuda:
            return self.kernel(inputs, targets, alpha, gamma)
        loss = sigmoid_focal_loss(inputs, targets, alpha, gamma)
        return loss.sum() if self.reduce else loss


def sigmoid_focal_loss(
    inputs: torch.Tensor, targets: torch.Tensor, alpha: float, gamma: float
) -> torch.Tensor:
    """Return the focal loss of each element in fp32, the formula of ``sam3/train/loss/sigmoid_focal_loss.py``.

    Args:
        inputs: Logits, any shape.
        targets: 0 or 1, the shape of ``inputs``.
        alpha: Weight of the positive class, 0 to 1.
        gamma: Focusing exponent, 0 or more.
    """
    inputs, targets = inputs.float(), targets.float()
    probability = inputs.sigmoid()
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    hit = probability * targets + (1 - probability) * (1 - targets)
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * cross_entropy * (1 - hit) ** gamma


def provide_triton() -> None:
    """Import the sam3 modules that need triton, with a stand-in for it where it is not installed.

    sam3 imports triton at the top of a few modules. The stand-in lets them load and is gone afterwards, so that
    torch does not take it for the real one; a kernel that is then called raises one clear error. Nothing of it is
    reached by inference or training on the CPU.
    """
    if importlib.util.find_spec("triton") is not None or "sam3" in sys.modules:
        return
    for asks_for_triton in ("torch._dynamo", "torch._inductor.runtime.triton_helpers"):
        importlib.import_module(asks_for_triton)  # while the answer is still the true one
    triton, language = types.ModuleType("triton"), types.ModuleType("triton.language")
    triton.__dict__.update(jit=_MissingKernel, autotune=lambda *a, **k: lambda f: f, Config=_Anything)
    triton.__dict__.update(language=language, __path__=[])
    language.__dict__.update(constexpr=_Anything, dtype=_Anything)
    stand_ins = {"triton": triton, "triton.language": language}
    sys.modules.update(stand_ins)
    try:
        for needs_triton in ("sam3", "sam3.train.loss.sigmoid_focal_loss"):
            importlib.import_module(needs_triton)
    finally:
        for name in stand_ins:
            del sys.modules[name]


class _Anything:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...


class _MissingKernel:
    def __init__(self, function: Any = None, **options: Any) -> None:
        self.name = getattr(function, "__name__", "kernel")

    def __call__(self, *args: Any, **kwargs: Any) -> _MissingKernel:
        return self

    def __getitem__(self, grid: Any) -> Any:
        raise ImportError(
            f"sam3's GPU kernel {self.name!r} needs triton, which is not installed; "
            "install it with 'pip install triton' (Linux), or run on the CPU"
        )
