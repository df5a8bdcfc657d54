"""Training data that come out the same when an epoch goes on in its middle, with any number of loader processes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, SequentialSampler

RandomState = dict[str, Any]  # plain numbers and tensors, as torch.load reads them with weights_only


def random_state() -> RandomState:
    """Return the states of python's, numpy's and torch's generators, and of the current GPU's."""
    numpy_state: Any = np.random.get_state(legacy=False)
    state = {
        "python": random.getstate(),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "numpy_place": [numpy_state["state"]["pos"], numpy_state["has_gauss"], numpy_state["gauss"]],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: RandomState) -> None:
    """Go on as after :func:`random_state`."""
    random.setstate(state["python"])
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), *state["numpy_place"]))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class SeededItems(Dataset[Any]):
    """A dataset whose random augmentation of an item is decided by seed, epoch and index alone.

    In a loader's worker it would depend on what the worker did before, and without workers on the model's dropout.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed
        self._epoch = 0

    @property
    def dataset(self) -> Any:
        """The dataset itself."""
        return self._dataset

    def set_epoch(self, epoch: int) -> None:
        """Take the epoch, and hand it to the dataset as the official loader would."""
        self._epoch = epoch
        if hasattr(self._dataset, "set_curr_epoch"):
            self._dataset.set_curr_epoch(epoch)  # for its transforms; sam3 0.1.4 leaves it at 0
        if hasattr(self._dataset, "epoch"):
            self._dataset.epoch = epoch
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        with seeded((self._seed * 100_003 + self._epoch) * 1_000_003 + index):
            return self._dataset[index]


class StartingSampler(Sampler[int]):
    """A sampler that leaves out its first ``skip`` indices, once, and has the length of the whole.

    Attributes:
        taken: The indices that were asked of it since it began, so that a step can tell its images; a loader with workers
            asks for some more than the step has.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.skip = 0
        self.taken: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch on."""
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        skip, self.skip = self.skip, 0
        self.taken = []
        for index in islice(iter(self._sampler), skip, None):
            self.taken.append(index)
            yield index


def make_resumable(data: Any, seed: int) -> StartingSampler:
    """Seed the items of an official ``TorchDataset`` and return the sampler that it uses from now on."""
    data.dataset = SeededItems(data.dataset, seed)
    data.sampler = StartingSampler(data.sampler or SequentialSampler(data.dataset))
    return data.sampler


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let a block draw from a random state of its own: Python's, numpy's, and torch's on the CPU."""
    # Not torch.manual_seed: that one reaches for the GPU, which a worker must not touch.
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed % 2**63)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
