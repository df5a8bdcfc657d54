"""Line charts as inline SVG: axes, ticks, and a title on every point that shows when the mouse rests on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

from sam3_lora.training.history import MOST_POINTS, History, mean_losses, thinned
from sam3_lora.visualization.curves import ticks

_WIDTH, _HEIGHT = 520, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 24, 46
_METRIC_CURVES = (  # metric, its name, class in the style sheet
    ("segm_AP50", "masks, AP50", "masks"),
    ("segm_AP", "masks, AP", "masks dashed"),
    ("bbox_AP50", "boxes, AP50", "boxes"),
    ("bbox_AP", "boxes, AP", "boxes dashed"),
)


@dataclass(frozen=True)
class Curve:
    """Points in the units of the axes, each with its text; a point that is no number makes a gap."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]
    texts: Sequence[str] = field(repr=False)


def loss_chart(history: History) -> str:
    """Return a chart of the loss of each step and of its mean over each epoch."""
    steps = thinned(history.steps)
    means = mean_losses(history.steps)
    averaged = len(steps) < len(history.steps)
    curves = [
        Curve(
            f"mean of {math.ceil(len(history.steps) / MOST_POINTS)} steps" if averaged else "each step",
            "step",
            [(step.epochs_done, step.loss) for step in steps],
            [f"epoch {step.epoch}, step {step.step}: loss {step.loss:.4g}" for step in steps],
        ),
        Curve(
            "mean of the epoch",
            "mean",
            [(epoch - 0.5, mean) for epoch, mean in means.items()],
            [f"epoch {epoch}: mean loss {mean:.4g}" for epoch, mean in means.items()],
        ),
    ]
    return _chart("Training loss", curves, _epochs(history), best_epoch=history.best_epoch)


def metrics_chart(history: History) -> str:
    """Return a chart of AP on the validation images after each epoch."""
    curves = []
    for metric, name, style in _METRIC_CURVES:
        values = {epoch: row[metric] for epoch, row in history.metrics.items() if metric in row}
        if values:
            texts = [f"epoch {epoch}: {name} {value:.3f}" for epoch, value in values.items()]
            curves.append(Curve(name, style, list(values.items()), texts))
    title = "AP on the validation images"
    return _chart(title, curves, _epochs(history), y_top=1.0, best_epoch=history.best_epoch)


def _epochs(history: History) -> int:
    done = [math.ceil(step.epochs_done) for step in history.steps] + list(history.metrics)
    return max(done, default=1)


def _chart(
    title: str,
    curves: Sequence[Curve],
    epochs: int,
    y_top: float | None = None,
    best_epoch: int | None = None,
) -> str:
    """Return a ``figure`` with the chart and its legend."""
    highest = max((y for curve in curves for _, y in curve.points if math.isfinite(y)), default=0.0)
    y_ticks = ticks(highest if y_top is None else y_top)
    scale = _Scale(x_top=epochs, y_top=y_ticks[-1])
    x_ticks = [tick for tick in ticks(epochs, count=8) if tick == int(tick) and tick <= epochs]
    parts = [_grid(scale, x_ticks, y_ticks)]
    if best_epoch is not None:
        parts.append(_best_line(scale, best_epoch))
    parts += [_curve(curve, scale) for curve in curves]
    legend = "".join(
        f'<li><svg class="key {curve.style}" viewBox="0 0 28 10" aria-hidden="true"><path d="M1 5H27"/></svg>'
        f"{escape(curve.name)}</li>"
        for curve in curves
    )
    return (
        f"<figure class='chart'><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(_in_words(title, curves))}">'
        f"{''.join(parts)}</svg><ul class='keys'>{legend}</ul></figure>"
    )


@dataclass(frozen=True)
class _Scale:
    x_top: float
    y_top: float

    def x(self, value: float) -> float:
        return _LEFT + value / self.x_top * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - value / self.y_top * (_HEIGHT - _TOP - _BOTTOM)


def _grid(scale: _Scale, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> str:
    left, right, bottom = _LEFT, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for tick in y_ticks:
        y = scale.y(tick)
        parts.append(f'<path class="{"axis" if tick == 0 else "grid"}" d="M{left} {y:.1f}H{right}"/>')
        parts.append(f'<text class="y" x="{left - 8}" y="{y:.1f}" dy=".35em">{tick:g}</text>')
    for tick in x_ticks:
        x = scale.x(tick)
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
        parts.append(f'<text class="x" x="{x:.1f}" y="{bottom + 19}">{tick:g}</text>')
    parts.append(f'<text class="x" x="{(left + right) / 2}" y="{_HEIGHT - 6}">epoch</text>')
    return "".join(parts)


def _best_line(scale: _Scale, epoch: int) -> str:
    x = scale.x(epoch)
    anchor = "end" if epoch > scale.x_top / 2 else "start"
    return (
        f'<path class="best" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>'
        f'<text class="note" x="{x:.1f}" y="{_TOP - 8}" text-anchor="{anchor}">best adapter</text>'
    )


def _curve(curve: Curve, scale: _Scale) -> str:
    """A line through the numbers, and a dot with its text on each."""
    places = [(scale.x(x), scale.y(y)) if math.isfinite(y) else None for x, y in curve.points]
    line = "".join(
        f"{'L' if before else 'M'}{here[0]:.1f} {here[1]:.1f}"
        for before, here in pairwise([None, *places])
        if here
    )
    dots = "".join(
        f'<circle cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="3.5"><title>{escape(text)}</title></circle>'
        for place, text in zip(places, curve.texts, strict=True)
        if place
    )
    return f'<g class="curve {curve.style}" data-name="{escape(curve.name)}"><path d="{line}"/>{dots}</g>'


def _in_words(title: str, curves: Sequence[Curve]) -> str:
    """Return what a reader who cannot see the chart needs: where each curve begins, ends and is highest."""
    sentences = []
    for curve in curves:
        values = [y for _, y in curve.points if math.isfinite(y)]
        if values:
            sentences.append(
                f"{curve.name}: from {values[0]:.3g} to {values[-1]:.3g}, highest {max(values):.3g}"
            )
    return f"{title}. {'; '.join(sentences) or 'no values'}."
