"""Count what a training step does and holds: FLOPs, live and saved bytes, launched operations. No clock, no GPU."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

GIVEN = "given"  #: The part that the tensors given belong to.
REST = "rest"  #: The part of all that is done outside the modules named.

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
_NO_LAUNCH = {
    *(_ATEN.empty, _ATEN.empty_like, _ATEN.new_empty, _ATEN.empty_strided, _ATEN.new_empty_strided),
    *(_ATEN._unsafe_view, _ATEN._local_scalar_dense),
}


@dataclass(frozen=True)
class PartCount:
    """What one part of the model did.

    Attributes:
        flops: With its backward and recomputation.
        forward_bytes: Made by the part and alive when the forward ended.
        peak_bytes: Made by the part and alive at the peak of the step.
        highest_in_forward: Most bytes alive at once, whoever made them, while the part was at work in the forward.
        highest_in_backward: The same for the backward; the peak of the step is the highest of all.
    """

    flops: int
    forward_bytes: int
    peak_bytes: int
    highest_in_forward: int
    highest_in_backward: int


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
        launches: Operations of torch itself that start work: no views, and no mere allocations.
        parts: FLOPs and bytes by part, with :data:`GIVEN` and :data:`REST`; they add up to the whole.
    """

    flops: int
    peak_bytes: int
    forward_bytes: int
    saved_bytes: int
    gradient_bytes: int
    launches: int
    parts: Mapping[str, PartCount]


def count_step(
    forward: Callable[[], Tensor],
    held: Iterable[Tensor],
    parts: Mapping[str, Iterable[nn.Module]] | None = None,
) -> StepCount:
    """Run a forward and its backward once, and count.

    Real tensors and those of a ``FakeTensorMode`` will do. Memory that a kernel takes for itself, and what an
    allocator rounds up, is not seen.

    Args:
        forward: Returns the loss, a scalar.
        held: Parameters, buffers and the batch, alive all the time. Gradients of earlier steps must be gone.
        parts: Modules to count apart, by the name of the part. What runs inside two of them counts for the inner one.
    """
    held = list(held)
    given = {id(tensor.untyped_storage()) for tensor in held}
    saved: dict[int, weakref.ref[Any]] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept = tensor.detach()  # the tensor itself would hold its own graph
        if id(storage := kept.untyped_storage()) not in given:
            saved[id(storage)] = weakref.ref(storage)
        return kept

    with _Counter(held) as counter, _in_parts(counter, parts or {}):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
            loss = forward()
        forward_bytes, forward_parts = counter.live_bytes, dict(counter.live_by_part)
        storages = [storage for reference in saved.values() if (storage := reference()) is not None]
        saved_bytes = sum(storage.nbytes() for storage in storages)
        del storages
        _backward(loss)
    gradients = [tensor.grad for tensor in held if tensor.is_leaf and tensor.grad is not None]
    peak_parts = counter.at_peak()
    return StepCount(
        flops=sum(counter.flops.values()),
        peak_bytes=counter.peak_bytes,
        forward_bytes=forward_bytes,
        saved_bytes=saved_bytes,
        gradient_bytes=sum(gradient.nbytes for gradient in gradients),
        launches=counter.launches,
        parts={
            part: PartCount(
                flops=counter.flops[part],
                forward_bytes=forward_parts.get(part, 0),
                peak_bytes=peak_parts.get(part, 0),
                highest_in_forward=counter.highest[part, False],
                highest_in_backward=counter.highest[part, True],
            )
            for part in (GIVEN, *(parts or {}), REST)
        },
    )


def _backward(loss: Tensor) -> None:
    """Do what ``loss.backward()`` does, without taking a TorchFunctionMode off meanwhile: recomputation needs it too."""
    torch.autograd.graph._engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


class _Counter(TorchDispatchMode):
    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.launches = self.live_bytes = self.peak_bytes = 0
        self.flops: Counter[str] = Counter()
        self.live_by_part: Counter[str] = Counter()
        self.highest: Counter[tuple[str, bool]] = Counter()  # of part and whether in the backward
        self.running: list[str] = []  # parts whose forward is under way, the inner last
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._peak_parts: dict[str, int] | None = None
        for tensor in held:
            self._see(tensor, GIVEN)

    def part(self) -> str:
        """Return the part at work: that of the forward under way, else that which made the node of the backward."""
        if self.running:
            return self.running[-1]
        node: Any = torch._C._current_autograd_node()
        return REST if node is None else node.metadata.get("part", REST)

    def at_peak(self) -> dict[str, int]:
        """Return the live bytes by part when most were alive."""
        return dict(self.live_by_part) if self._peak_parts is None else self._peak_parts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # A fake tensor asks for its device by an operation, of the namespace prim.
        self.launches += (
            not func.is_view and func.namespace == "aten" and func._overloadpacket not in _NO_LAUNCH
        )
        if (flops_of := _FLOPS.get(func._overloadpacket)) is not None:
            self.flops[self.part()] += flops_of(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor, part: str | None = None) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in self._alive:
            part = part or self.part()
            in_backward = torch._C._current_autograd_node() is not None
            self._alive[key] = weakref.ref(storage, lambda _: self._forget(key, size, part))
            self.live_bytes += size
            self.live_by_part[part] += size
            self.highest[part, in_backward] = max(self.highest[part, in_backward], self.live_bytes)
            if self.live_bytes > self.peak_bytes:
                self.peak_bytes, self._peak_parts = self.live_bytes, None

    def _forget(self, key: int, size: int, part: str) -> None:
        if self._peak_parts is None:
            self._peak_parts = dict(self.live_by_part)
        del self._alive[key]
        self.live_bytes -= size
        self.live_by_part[part] -= size


@contextlib.contextmanager
def _in_parts(counter: _Counter, parts: Mapping[str, Iterable[nn.Module]]) -> Iterator[None]:
    """Tell the counter which part is at work, also in the backward: every node of the graph gets the name of its part."""

    def enter(name: str, inputs: Any) -> None:
        _label(inputs, counter.running[-1] if counter.running else REST)
        counter.running.append(name)

    def leave(name: str, outputs: Any) -> None:
        counter.running.pop()
        _label(outputs, name)

    hooks = []
    for name, modules in parts.items():
        for module in modules:
            hooks += [
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: enter(name, (args, kwargs)), with_kwargs=True
                ),
                # Also when the forward is cut short: a checkpoint stops it by an exception.
                module.register_forward_hook(
                    lambda _, args, outputs, name=name: leave(name, outputs), always_call=True
                ),
            ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _label(values: Any, part: str) -> None:
    """Give all nodes that lead to these values a part, if they have none yet."""
    nodes: list[Any] = [tensor.grad_fn for tensor in _tensors_in(values) if tensor.grad_fn is not None]
    while nodes:
        node = nodes.pop()
        if "part" not in node.metadata:
            node.metadata["part"] = part
            nodes += [before for before, _ in node.next_functions if before is not None]


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors_in(inner)
