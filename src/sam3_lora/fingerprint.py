"""What tells one base model from another: a short hash of its shapes and of a sample of its weights."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sam3_lora.components import ROOTS, Component

_SAMPLE = 64  # values of each tensor, evenly spread: enough to see a merged adapter, fast on 840 M parameters
_FUSED = ("in_proj_weight", "in_proj_bias")


def base_fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Return a hash for each component of a base, or none if the weights are not there (meta device).

    Names, shapes and a sample of the values of every parameter count, the values as bfloat16. So a base has the same
    fingerprint in fp32 and bf16, with fused and with split attention, and with further parts such as a tracker.

    Args:
        parameters: Official names, fused or split, with the tensors of a base without adapters.
    """
    parts: dict[Component, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, tensor in _split_names(parameters):
        if tensor.is_meta or isinstance(tensor, FakeTensor):
            return {}
        component = next((c for c, roots in ROOTS.items() if name.startswith(roots)), None)
        if component is not None:
            parts[component].append((name, tensor))
    return {component: _digest(parts[component]) for component in ROOTS if component in parts}


def changed_components(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return the components that two fingerprints both have, and have different."""
    return [c for c, digest in recorded.items() if c in found and found[c] != digest]


def _split_names(parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield fused q, k, v parameters as three, under the names that they have after the split."""
    for name, tensor in parameters:
        parent, _, own = name.rpartition(".")
        if own in _FUSED:
            kind = own.removeprefix("in_proj_")
            for projection, third in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{parent}.{projection}_proj.{kind}", third
        else:
            yield name, tensor


def _digest(parameters: list[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(parameters, key=lambda item: item[0]):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLE)][:_SAMPLE].to(torch.bfloat16).cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
