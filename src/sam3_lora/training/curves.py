"""The curves of a run as a picture, and its numbers as tables, both from what it wrote about itself. Imports no torch."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sam3_lora.output import write_image_atomic, write_text_atomic
from sam3_lora.training.history import History, mean_losses, read_history, thinned
from sam3_lora.visualization.curves import Chart, Line, draw_charts
from sam3_lora.visualization.drawing import Colour

CURVES_FILE = "curves.png"  # in the run folder
STEPS_TABLE, VALIDATIONS_TABLE = "steps.csv", "validations.csv"  # in logs/

_BLUE: Colour = (42, 111, 219)
_PALE: Colour = (170, 197, 240)
_ORANGE: Colour = (226, 112, 20)
_METRICS = (  # metric, its name, colour, width of the line
    ("segm_AP50", "masks, AP50", _BLUE, 2.5),
    ("segm_AP", "masks, AP", _BLUE, 1.0),
    ("bbox_AP50", "boxes, AP50", _ORANGE, 2.5),
    ("bbox_AP", "boxes, AP", _ORANGE, 1.0),
)
_RATES = (_BLUE, _ORANGE, (20, 150, 110), (160, 60, 200))


def write_curves(run_folder: Path) -> Path:
    """Draw loss, validation metrics and learning rate of a run, finished or not, into its folder; return the path."""
    history = read_history(run_folder)
    epochs = max([math.ceil(step.epochs_done) for step in history.steps] + list(history.metrics), default=1)
    charts = [_loss(history)]
    if history.metrics:
        charts.append(_metrics(history))
    if any(step.rates for step in history.steps):
        charts.append(_rates(history))
    path = run_folder / CURVES_FILE
    write_image_atomic(path, draw_charts(charts, epochs, "epoch"))
    return path


def write_tables(run_folder: Path) -> None:
    """Write a CSV with a row for each step, and one with a row for each validation, into ``logs/`` of a run."""
    history = read_history(run_folder)
    steps: list[dict[str, Any]] = []
    for step in history.steps:
        values = {
            name: value for name, value in vars(step).items() if name not in ("terms", "rates", "steps")
        }
        rates = {f"lr_{i}" if i > 1 else "lr": rate for i, rate in enumerate(step.rates, 1)}
        steps.append({**values, **rates, **step.terms})
    validations = [{"epoch": epoch, **values} for epoch, values in history.metrics.items()]
    for name, rows in ((STEPS_TABLE, steps), (VALIDATIONS_TABLE, validations)):
        write_text_atomic(run_folder / "logs" / name, _as_csv(rows))


def _as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _loss(history: History) -> Chart:
    steps = thinned(history.steps)
    name = "each step" if len(steps) == len(history.steps) else "mean of some steps"
    means = [(epoch - 0.5, mean) for epoch, mean in mean_losses(history.steps).items()]
    return Chart(
        "Training loss",
        [
            Line(name, _PALE, [(step.epochs_done, step.loss) for step in steps], 1.0),
            Line("mean of the epoch", _BLUE, means, 2.5),
        ],
    )


def _metrics(history: History) -> Chart:
    lines = []
    for metric, name, colour, weight in _METRICS:
        points = [(float(epoch), row[metric]) for epoch, row in history.metrics.items() if metric in row]
        if points:
            lines.append(Line(name, colour, points, weight))
    return Chart("On the validation images", lines, top=1.0)


def _rates(history: History) -> Chart:
    """Groups with the same rates share a line."""
    steps = thinned([step for step in history.steps if step.rates])
    groups: dict[tuple[float, ...], list[int]] = defaultdict(list)
    for group in range(len(steps[-1].rates)):
        rates = tuple(step.rates[group] if group < len(step.rates) else math.nan for step in steps)
        groups[rates].append(group + 1)
    places = [step.epochs_done for step in steps]
    return Chart(
        "Learning rate",
        [
            Line(
                f"group {', '.join(map(str, numbers))}" if len(groups) > 1 else "of all",
                colour,
                list(zip(places, rates, strict=True)),
            )
            for (rates, numbers), colour in zip(groups.items(), itertools.cycle(_RATES), strict=False)
        ],
    )
