"""What would make a training step cheaper, by how much memory it saves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sam3_lora.estimation.levers import (
    SAMPLED_POINTS,
    formula_of,
    same_levers,
    same_value,
    shipped_levers,
)
from sam3_lora.presets import get_preset

_WORTH_SAYING = 0.01  # of the peak
_SMALLER = ("balanced", "light", "minimal")  # that learn less of the same; the others learn something else

#: Preset, levers, and prompts, objects, images.
Step = tuple[str, Mapping[str, Any], tuple[int, int, int]]


@dataclass(frozen=True)
class Advice:
    """A change, and how much less peak memory and work of one pass it leads to; work may become more.

    ``same_training``: the adapter learns from the same gradients, as far as rounding goes.
    """

    change: str
    saves_bytes: int
    saves_flops: int
    same_training: bool = False


def advice_for(step: Step) -> tuple[Advice, ...]:
    """Return the changes that are worth it, the largest gain first."""
    now_bytes, now_flops = _cost(step)
    advice = []
    for text, other in [*_other_levers(*step), *_smaller_batches(*step), *_smaller_presets(*step)]:
        other_bytes, other_flops = _cost(other)
        same = text.startswith(("leave ", "training.batch_size"))
        advice.append(Advice(text, now_bytes - other_bytes, now_flops - other_flops, same))
    worth = [change for change in advice if change.saves_bytes > _WORTH_SAYING * now_bytes]
    return tuple(sorted(worth, key=lambda change: -change.saves_bytes))


def cheapest(advice: Iterable[Advice], count: int) -> list[Advice]:
    """Return the changes that cost least: those that keep the training as it is, then those that save most."""
    return sorted(advice, key=lambda change: (not change.same_training, -change.saves_bytes))[:count]


def _cost(step: Step) -> tuple[int, int]:
    preset, levers, size = step
    formula = formula_of(preset, levers)
    assert formula is not None
    return formula.peak(*size)[1] + formula.held_besides, formula.step_flops(*size)


def _other_levers(
    preset: str, levers: Mapping[str, Any], size: tuple[int, int, int]
) -> Iterable[tuple[str, Step]]:
    shipped = shipped_levers()
    sampled = {**shipped, "mask_points": SAMPLED_POINTS}
    if not same_levers(levers, shipped) and not same_levers(levers, sampled):
        off = [f"memory.{key}" for key, value in shipped.items() if not same_value(levers[key], value)]
        yield f"leave {', '.join(off)} as shipped", (preset, shipped, size)
    if levers["mask_points"] is None and formula_of(preset, sampled):
        text = f"take the mask loss at sampled points, which is another loss: memory.mask_points={SAMPLED_POINTS}"
        yield text, (preset, sampled, size)


def _smaller_batches(
    preset: str, levers: Mapping[str, Any], size: tuple[int, int, int]
) -> Iterable[tuple[str, Step]]:
    prompts, objects, batch = size
    if batch > 1:
        text = f"training.batch_size=1, and {batch} x as many training.gradient_accumulation_steps"
        yield text, (preset, levers, (prompts, objects, 1))
    if prompts > 1:
        text = f"fewer prompts an image ({prompts // 2} instead of {prompts}): lower prompts.max_prompts_per_image"
        yield text, (preset, levers, (prompts // 2, objects, batch))
    if objects > 1:
        text = f"fewer objects in an image ({objects // 2} instead of {objects}): cut images up, or lower training.max_objects"
        yield text, (preset, levers, (prompts, objects // 2, batch))


def _smaller_presets(
    preset: str, levers: Mapping[str, Any], size: tuple[int, int, int]
) -> Iterable[tuple[str, Step]]:
    for other in _SMALLER:
        if other != preset and formula_of(other, levers):
            yield f"preset {other}: {get_preset(other).reason}", (other, levers, size)
