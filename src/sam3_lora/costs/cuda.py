"""Let tensors on the CPU take and save the memory that they would on CUDA: autocast, attention kernels, focal loss.

Fake tensors of the device "cuda" run no backward where there is no CUDA, so a step is counted on fake CPU tensors.
Where the CPU does something else than CUDA, what CUDA does stands in:

==========================  ======================================  ==================================================
what                        on the CPU                              stood in for
==========================  ======================================  ==================================================
autocast, fp32 operations   norms, softmax, ... stay bfloat16       cast to float32 first (torch's CUDA list)
``autocast("cuda", ...)``   no effect                               the autocast of the CPU; the official decoder turns
                                                                    it off for its FFN
attention without a mask    math or the CPU's kernel                flash kernel
attention with a mask       the same                                memory-efficient kernel, mask padded as torch does
focal loss                  plain torch, keeps every step of it     keeps its two inputs, as sam3's triton kernel does
==========================  ======================================  ==================================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ATEN = torch.ops.aten
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

# aten/src/ATen/autocast_mode.h of torch 2.7 to 2.14, AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE: what a SAM3 step
# meets of it and CPU autocast does not have in its own list.
_IN_FLOAT32 = """
    layer_norm group_norm softmax.int log_softmax.int exp log log2 log1p pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar
    softplus cosine_similarity l1_loss binary_cross_entropy_with_logits reciprocal rsqrt
    upsample_bilinear2d.vec upsample_bilinear2d upsample_nearest2d.vec upsample_nearest2d
"""
_SUMMED_IN_FLOAT32 = "sum sum.dim_IntList cumsum"
_MASK_ALIGNMENT = 8  # preprocess_mask in aten/src/ATen/native/transformers/attention.cpp


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Do all that the table of this module says, for the whole process."""
    from sam3.train.loss import loss_fns

    replaced = [
        (F, "scaled_dot_product_attention", _attention),
        (torch.amp, "autocast", _CudaAutocast),
        (loss_fns, "triton_sigmoid_focal_loss", _focal_loss),
        (loss_fns, "triton_sigmoid_focal_loss_reduce", _summed_focal_loss),
    ]
    originals = [(place, name, getattr(place, name)) for place, name, _ in replaced]
    library = torch.library.Library("aten", "IMPL")
    try:
        for place, name, stand_in in replaced:
            setattr(place, name, stand_in)
        for name in _IN_FLOAT32.split():
            library.impl(name, _in_float32(_operation(name)), "AutocastCPU")
        for name in _SUMMED_IN_FLOAT32.split():
            library.impl(name, _summed_in_float32(_operation(name)), "AutocastCPU")
        yield
    finally:
        library._destroy()
        for place, name, original in originals:
            setattr(place, name, original)


def _operation(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(_ATEN, packet), overload or "default")


def _in_float32(operation: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return operation(*map(_to_float32, args), **{k: _to_float32(v) for k, v in kwargs.items()})

    return run


def _summed_in_float32(operation: Any) -> Any:
    def run(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.dtype == torch.bfloat16 and kwargs.get("dtype") is None:
            kwargs["dtype"] = torch.float32
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return operation(tensor, *args, **kwargs)

    return run


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


class _CudaAutocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    if attn_mask is None and query.dtype == torch.bfloat16:
        return _ATEN._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    return _ATEN._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )[0]


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    mask = mask.to(query.dtype)
    if missing := -mask.shape[-1] % _MASK_ALIGNMENT:
        mask = F.pad(mask, (0, missing))[..., :-missing]
    return mask.expand(*query.shape[:3], key.shape[2])


class _FocalLoss(torch.autograd.Function):
    """Of the shape, and with the saved tensors, of ``sam3/train/loss/sigmoid_focal_loss.py``; the numbers are none."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, targets: Tensor, reduced: bool) -> Tensor:
        ctx.save_for_backward(inputs, targets)
        return inputs.new_zeros(32, dtype=torch.float32).sum() if reduced else inputs.float().clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        inputs, _ = ctx.saved_tensors
        return torch.empty_like(inputs), None, None


def _focal_loss(inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2) -> Any:
    return _FocalLoss.apply(inputs, targets, False)


def _summed_focal_loss(inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2) -> Any:
    return _FocalLoss.apply(inputs, targets, True)
