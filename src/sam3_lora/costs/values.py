"""Answer the official code where it asks for the values of fake tensors, which have none.

Tensors made of Python numbers (targets, spatial shapes) are real and stay real as long as they meet real ones only, so
that what they decide is exact. For values that the model computes a stand-in answers, which makes a step the dearest
one that the batch allows:

================================  ============================================  =======================================
where                             asks for                                      gets
================================  ============================================  =======================================
``BinaryHungarianMatcherV2``      the cost matrix, as numpy                     zeros: one query for each object
``BinaryOneToManyMatcher``        the matches above a score                     ``topk`` queries for each object, the most
                                                                                that can match
the mask losses                   which objects have a mask                     all
``segment_miou``                  whether there is any mask                     yes
``SemanticSegCriterion``          how many prompts have an object              1: it only divides by that
torchmetrics' ``f1_score``        the distinct values of a target               0 and 1
================================  ============================================  =======================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

_FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.linspace)


class StandInValues(TorchFunctionMode):
    """Do what the table of this module says.

    Args:
        objects: Of each prompt of the batch.
        topk: How many queries the one-to-many matcher gives each object.
    """

    def __init__(self, objects: Sequence[int] = (), topk: int = 4) -> None:
        super().__init__()
        self._objects = list(objects)
        self._topk = topk

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if tensors or func in _FROM_NUMBERS:
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
            return func(*args, **kwargs)
        if func is Tensor.numpy:
            return np.zeros(args[0].shape, dtype=np.float32)
        if func is Tensor.item:
            return 1
        if func is Tensor.__bool__:
            return False
        if func is torch.nonzero and kwargs.get("as_tuple"):
            return self._matches(args[0])
        if func in (torch.unique, torch._unique2, Tensor.unique):
            with unset_fake_temporarily():
                return torch.tensor([0, 1])
        if func is Tensor.__getitem__:
            return func(args[0], tree_map(_mask_as_places, args[1]))
        return func(*args, **kwargs)

    def _matches(self, scores: Tensor) -> tuple[Tensor, ...]:
        """Return prompt, query and object of each match."""
        found = [
            (prompt, (number * self._topk + rank) % scores.shape[1], number)
            for prompt, objects in enumerate(self._objects)
            for number in range(objects)
            for rank in range(self._topk)
        ]
        with unset_fake_temporarily():
            return torch.tensor(found, dtype=torch.long).reshape(-1, 3).unbind(1)


def _mask_as_places(index: Any) -> Any:
    """Return the places that a bool mask chooses: how many they are decides the shape."""
    if not isinstance(index, Tensor) or index.dtype != torch.bool:
        return index
    with unset_fake_temporarily():
        if isinstance(index, FakeTensor):
            return torch.arange(len(index)) if index.dim() == 1 else index
        places = index.nonzero(as_tuple=True)
    return places[0] if len(places) == 1 else places
