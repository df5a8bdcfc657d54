"""A loss or an adapter that is not finite any more: found at once, and explained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sam3_lora.errors import DivergenceError

#: No value of an adapter that learns comes near; larger ones overflow in products of a few of them.
_LARGE = 1e3
_SHOWN_IMAGES = 8
# What the matcher of the official trainer works out first, and the loss that is the same.
_COSTS = {"cost_bbox": "loss_bbox", "cost_giou": "loss_giou", "cost_class": "loss_ce"}


@dataclass(frozen=True)
class Place:
    """Where a run is: epoch and step count from 1; ``images`` are the names of those in this pass."""

    epoch: int
    step: int
    steps: int
    images: Sequence[str]

    def __str__(self) -> str:
        return f"epoch {self.epoch}, step {self.step} of {self.steps}"


@dataclass(frozen=True)
class Settings:
    """What can be changed about it, as it is in force."""

    rates: Sequence[float]
    clip: float | None
    amp: str | None  # dtype of the autocast


def bad_terms(terms: Mapping[str, float]) -> dict[str, float]:
    """Return the terms that are not finite, in their order."""
    return {name: value for name, value in terms.items() if not math.isfinite(value)}


def bad_cost(error: BaseException) -> str | None:
    """Return the loss term for which the official matcher got no number, or ``None`` if that is not what ``error`` is.

    The matcher runs in the model's forward, so predictions that are no numbers end there, before there is a loss: scipy
    refuses the matrix of costs. It is still in the frame of the matcher.
    """
    trace = error.__traceback__
    while isinstance(error, ValueError) and trace is not None:
        costs = trace.tb_frame.f_locals
        for cost, term in _COSTS.items():
            value = costs.get(cost)
            if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
                return term
        trace = trace.tb_next
    return None


def loss_diverged(
    place: Place, bad: Mapping[str, float], terms: int, model: nn.Module, settings: Settings, saved: str
) -> DivergenceError:
    """Return the error for a loss with terms that are not finite.

    Args:
        place: Where it happened.
        bad: Those terms, in the order in which they are worked out.
        terms: Number of all terms.
        model: To look at its trained values.
        settings: In force.
        saved: What there is to go back to.
    """
    name, value = next(iter(bad.items()))
    others = f", the first of {len(bad)} bad terms of {terms}" if len(bad) > 1 else ""
    what = f"the loss is not finite in {place}: {name} is {value}{others}"
    return _diverged(what, place, model, settings, saved)


def matching_diverged(
    place: Place, term: str, model: nn.Module, settings: Settings, saved: str
) -> DivergenceError:
    """Return the error for predictions that are no numbers, found when they were matched with the objects."""
    what = f"the predictions are not finite in {place}: {term} is nan already where they are matched with the objects"
    return _diverged(what, place, model, settings, saved)


def adapter_diverged(
    place: Place, name: str, model: nn.Module, settings: Settings, saved: str
) -> DivergenceError:
    """Return the error for trained values that are not finite when they are to be saved."""
    what = f"the adapter is not finite after {place}, so it was not saved: {name} is the first bad tensor"
    return _diverged(what, place, model, settings, saved)


def first_bad_tensor(model: nn.Module) -> str | None:
    """Return the name of the first trained tensor with a value that is not finite, or ``None``; one look at the device."""
    trained = _trained(model)
    if not trained:
        return None
    finite = torch.stack([torch.isfinite(p.detach()).all() for p in trained.values()]).tolist()
    return next((name for name, good in zip(trained, finite, strict=True) if not good), None)


def _diverged(what: str, place: Place, model: nn.Module, settings: Settings, saved: str) -> DivergenceError:
    name, largest = _largest(model)
    facts = [
        what,
        f"  images: {_listed(place.images)}",
        f"  adapter: largest value {largest:.3g}, in {name}",
        f"  in force: learning rate {_rates(settings.rates)}, gradients clipped at {settings.clip or 'nothing'}, "
        f"{settings.amp or 'float32'}",
        f"  {saved}",
        f"  -> {_advice(largest, settings)}",
    ]
    return DivergenceError("\n".join(facts))


def _advice(largest: float, settings: Settings) -> str:
    rate = max(settings.rates, default=0.0)
    lower = f"a lower training.lr, such as {min(rate / 10, 2e-4):.0e}"
    if not largest < _LARGE:
        return f"the steps before were too large: start again with {lower}, or a lower training.gradient_clip_max_norm"
    if settings.amp == "float16":
        return f"float16 ends at 65504: start again with training.amp_dtype=bfloat16, or training.amp_enabled=false; else with {lower}"
    return (
        f"look at these images and their annotations; then start again with {lower}"
        f"{', or training.amp_enabled=false' if settings.amp else ''}"
    )


def _largest(model: nn.Module) -> tuple[str, float]:
    """Return the trained tensor with the largest absolute value, and that value; NaN counts as the largest."""
    sizes = {name: float(p.detach().abs().max()) for name, p in _trained(model).items() if p.numel()}
    if not sizes:
        return "nothing", 0.0
    name = max(sizes, key=lambda name: math.inf if math.isnan(sizes[name]) else sizes[name])
    return name, sizes[name]


def _trained(model: nn.Module) -> dict[str, Tensor]:
    names = ((name.removeprefix("module."), p) for name, p in model.named_parameters())  # of DDP
    return {name: p for name, p in names if p.requires_grad}


def _rates(rates: Iterable[float]) -> str:
    return ", ".join(f"{rate:.3g}" for rate in dict.fromkeys(rates)) or "none"


def _listed(images: Sequence[str]) -> str:
    more = len(images) - _SHOWN_IMAGES
    return ", ".join(images[:_SHOWN_IMAGES]) + (f" and {more} more" if more > 0 else "")
