"""Count what a training step does and holds: FLOPs, live and saved bytes, launched operations. No clock, no GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_ATEN = torch.ops.aten
# torch counts only the attention kernels of the GPU; those of the CPU do the same products.
_FLOPS: dict[Any, Any] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        _ATEN._scaled_dot_product_flash_attention
    ],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}


@dataclass(frozen=True)
class StepCount:
    """What one step did, forward and backward together.

    Attributes:
        flops: Of matrix products, convolutions and attention, 2 for each multiply-add; with recomputation.
        peak_bytes: Most bytes alive at once: the tensors given, activations and gradients, whatever the device.
        forward_bytes: Alive when the forward ended, of the same.
        saved_bytes: Kept by autograd for the backward, each storage once, without the tensors given; inside an
            activation checkpoint nothing is kept but its inputs.
        gradient_bytes: Of the gradients that the step left on the tensors given.
        launches: Operations of torch itself that are no views.
    """

    flops: int
    peak_bytes: int
    forward_bytes: int
    saved_bytes: int
    gradient_bytes: int
    launches: int


def count_step(forward: Callable[[], Tensor], held: Iterable[Tensor]) -> StepCount:
    """Run a forward and its backward once, and count.

    Real tensors and those of a ``FakeTensorMode`` will do. Memory that a kernel takes for itself, and what an
    allocator rounds up, is not seen.

    Args:
        forward: Returns the loss, a scalar.
        held: Parameters, buffers and the batch, alive all the time. Gradients of earlier steps must be gone.
    """
    held = list(held)
    given = {id(tensor.untyped_storage()) for tensor in held}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept = tensor.detach()  # the tensor itself would hold its own graph
        if id(storage := kept.untyped_storage()) not in given:
            saved[id(storage)] = kept
        return kept

    with _Counter(held) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
            loss = forward()
        forward_bytes = counter.live_bytes
        saved_bytes = sum(kept.untyped_storage().nbytes() for kept in saved.values())
        saved.clear()
        loss.backward()
    gradients = [tensor.grad for tensor in held if tensor.is_leaf and tensor.grad is not None]
    return StepCount(
        flops=counter.flops,
        peak_bytes=counter.peak_bytes,
        forward_bytes=forward_bytes,
        saved_bytes=saved_bytes,
        gradient_bytes=sum(gradient.nbytes for gradient in gradients),
        launches=counter.launches,
    )


class _Counter(TorchDispatchMode):
    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.flops = self.launches = self.live_bytes = self.peak_bytes = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        for tensor in held:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # A fake tensor asks for its device by an operation, of the namespace prim.
        self.launches += not func.is_view and func.namespace == "aten"
        if (flops_of := _FLOPS.get(func._overloadpacket)) is not None:
            self.flops += flops_of(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._forget(key, size))
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int, size: int) -> None:
        del self._alive[key]
        self.live_bytes -= size
