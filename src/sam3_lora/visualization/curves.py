"""Line charts in a PNG, one above the other, with PIL only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw

from sam3_lora.visualization.drawing import INK, PAPER, Colour, font_of_size

_WIDTH, _HEIGHT = 900, 300  # of one chart, in pixels of the result
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 24, 44, 46
_FINER = 2  # drawn so many times larger, so that lines come out smooth
_GRID: Colour = (226, 228, 232)
_FAINT: Colour = (110, 113, 120)


@dataclass(frozen=True)
class Line:
    """Points in the units of the axes; one that is no number makes a gap. ``weight`` is the width in pixels."""

    name: str
    colour: Colour
    points: Sequence[tuple[float, float]]
    weight: float = 2.0


@dataclass(frozen=True)
class Chart:
    """Lines on axes that begin at 0. ``top`` is the end of the upright one, by default above the highest point."""

    title: str
    lines: Sequence[Line]
    top: float | None = None


def ticks(top: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers from 0 to the first of them that is not below ``top``."""
    if not top > 0:
        return [0.0, 1.0]
    raw = top / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * (1 - 1e-9))
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


def draw_charts(charts: Sequence[Chart], x_top: float, x_name: str) -> Image.Image:
    """Return the charts one above the other, on one sideways axis from 0 to ``x_top``.

    Raises:
        ValueError: If there is no chart.
    """
    if not charts:
        raise ValueError("draw_charts needs at least one chart")
    picture = Image.new("RGB", (_WIDTH, _HEIGHT * len(charts)), PAPER)
    for place, chart in enumerate(charts):
        picture.paste(_draw(chart, x_top, x_name), (0, place * _HEIGHT))
    return picture


def _draw(chart: Chart, x_top: float, x_name: str) -> Image.Image:
    heights = [y for line in chart.lines for _, y in line.points if math.isfinite(y)]
    y_ticks = ticks(max(heights, default=0.0) if chart.top is None else chart.top)
    axes = _Axes(x_top, y_ticks[-1])
    canvas = Image.new("RGB", (_WIDTH * _FINER, _HEIGHT * _FINER), PAPER)
    pen = ImageDraw.Draw(canvas)
    _draw_axes(pen, axes, [tick for tick in ticks(x_top, count=10) if tick <= x_top], y_ticks, x_name)
    for line in chart.lines:
        _draw_line(pen, line, axes)
    _draw_title(pen, chart)
    return canvas.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class _Axes:
    """From the units of the axes to pixels of the canvas."""

    x_top: float
    y_top: float

    def x(self, value: float) -> float:
        return (_LEFT + value / self.x_top * (_WIDTH - _LEFT - _RIGHT)) * _FINER

    def y(self, value: float) -> float:
        return (_HEIGHT - _BOTTOM - value / self.y_top * (_HEIGHT - _TOP - _BOTTOM)) * _FINER


def _draw_axes(
    pen: ImageDraw.ImageDraw, axes: _Axes, x_ticks: Sequence[float], y_ticks: Sequence[float], x_name: str
) -> None:
    font = font_of_size(13 * _FINER)
    for tick in y_ticks:
        place = (axes.x(0), axes.y(tick), axes.x(axes.x_top), axes.y(tick))
        pen.line(place, fill=_FAINT if tick == 0 else _GRID, width=_FINER)
        pen.text((place[0] - 8 * _FINER, place[1]), f"{tick:.4g}", fill=INK, font=font, anchor="rm")
    for tick in x_ticks:
        x, y = axes.x(tick), axes.y(0)
        pen.line((x, y, x, y + 4 * _FINER), fill=_FAINT, width=_FINER)
        pen.text((x, y + 7 * _FINER), f"{tick:g}", fill=INK, font=font, anchor="mt")
    pen.text((axes.x(axes.x_top / 2), (_HEIGHT - 6) * _FINER), x_name, fill=_FAINT, font=font, anchor="mb")


def _draw_line(pen: ImageDraw.ImageDraw, line: Line, axes: _Axes) -> None:
    places = [(axes.x(x), axes.y(y)) if math.isfinite(y) else None for x, y in line.points]
    width = max(1, round(line.weight * _FINER))
    for before, here in pairwise(places):
        if before and here:
            pen.line((*before, *here), fill=line.colour, width=width)
    if len(places) <= 60:  # more dots than that are a thick line
        for place in filter(None, places):
            pen.circle(place, 1.3 * width, fill=line.colour)


def _draw_title(pen: ImageDraw.ImageDraw, chart: Chart) -> None:
    """The title, and behind it the names of the lines, each with a piece of its line."""
    x, y = _LEFT * _FINER, 20 * _FINER
    title, font = font_of_size(16 * _FINER), font_of_size(13 * _FINER)
    pen.text((x, y), chart.title, fill=INK, font=title, anchor="lm")
    x += round(title.getlength(chart.title)) + 24 * _FINER
    for line in chart.lines:
        pen.line((x, y, x + 22 * _FINER, y), fill=line.colour, width=max(1, round(line.weight * _FINER)))
        pen.text((x + 28 * _FINER, y), line.name, fill=_FAINT, font=font, anchor="lm")
        x += (28 + 18) * _FINER + round(font.getlength(line.name))
