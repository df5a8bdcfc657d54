"""Tables of metrics: a column for each model, and after each later one its difference from the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

#: Metric -> value, 0 to 1; ``None`` where it is not defined.
Metrics = Mapping[str, float | None]

_KINDS = {"segm": "Masks", "bbox": "Boxes"}


def metric_name(metric: str) -> str:
    """Return the name of a metric for people: ``segm_AP50`` is "Masks, AP50"."""
    kind, _, rest = metric.partition("_")
    return (
        f"{_KINDS[kind]}, {rest.replace('_', ' ')}" if kind in _KINDS and rest else metric.replace("_", " ")
    )


def metrics_table(metrics: Mapping[str, Metrics]) -> str:
    """Return a table with a row for each metric of any column."""
    return _table("Metrics", list(metrics), f"<tbody>{_metric_rows(metrics)}</tbody>")


def classes_table(classes: Mapping[str, Mapping[str, Metrics]]) -> str:
    """Return a table with the rows of :func:`metrics_table` below the name of each class.

    Args:
        classes: Class -> column -> metric -> value, with the same columns for each class.
    """
    columns = list(next(iter(classes.values())))
    width = 2 * len(columns)  # the metric, the columns, and a difference for all but the first
    bodies = "".join(
        f'<tbody><tr><th class="group" scope="rowgroup" colspan="{width}"><span>{escape(name)}</span></th></tr>'
        f"{_metric_rows(metrics)}</tbody>"
        for name, metrics in classes.items()
    )
    return _table("Metrics of each class", columns, bodies)


def _table(label: str, columns: Sequence[str], bodies: str) -> str:
    head = "".join(
        f'<th scope="col">{_breakable(column)}</th>' + ('<th scope="col">difference</th>' if index else "")
        for index, column in enumerate(columns)
    )
    return (
        f"<div class='scroll' tabindex='0' role='region' aria-label='{label}'><table><thead><tr>"
        f'<th scope="col">metric</th>{head}</tr></thead>{bodies}</table></div>'
    )


def _breakable(name: str) -> str:
    """Return a name as HTML that may go on in a new line behind each slash: adapters are named by their paths."""
    return escape(name).replace("/", "/<wbr>")


def _metric_rows(metrics: Mapping[str, Metrics]) -> str:
    names = dict.fromkeys(name for values in metrics.values() for name in values)
    return "".join(_metric_row(name, metrics) for name in names)


def _metric_row(name: str, metrics: Mapping[str, Metrics]) -> str:
    first = next(iter(metrics.values())).get(name)
    cells = []
    for index, values in enumerate(metrics.values()):
        value = values.get(name)
        cells.append(_value_cell(value))
        if index:
            cells.append(_difference_cell(first, value))
    return f'<tr><th scope="row"><span title="{escape(name)}">{escape(metric_name(name))}</span></th>{"".join(cells)}</tr>'


def _value_cell(value: float | None) -> str:
    if value is None:
        return "<td>–</td>"
    shown = f"{value:.3f}".replace("-", "−")
    share = min(max(value, 0.0), 1.0)
    return f'<td><span class="bar" style="--share:{share:.3f}">{shown}</span></td>'


def _difference_cell(first: float | None, value: float | None) -> str:
    if first is None or value is None:
        return "<td>–</td>"
    difference = round(value, 3) - round(first, 3)  # of the numbers that are shown
    if abs(difference) < 0.0005:
        return "<td>±0.000</td>"
    sign, kind = ("+", "up") if difference > 0 else ("−", "down")
    return f'<td class="{kind}">{sign}{abs(difference):.3f}</td>'
