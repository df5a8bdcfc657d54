"""The page: results, facts, curves and pictures as one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from sam3_lora.output import write_text_atomic
from sam3_lora.report.charts import loss_chart, metrics_chart
from sam3_lora.report.history import History
from sam3_lora.report.pictures import Picture, as_data_urls, columns_of
from sam3_lora.visualization import GROUND_TRUTH, Instance, label_colours

_KINDS = {"segm": "Masks", "bbox": "Boxes"}
_HEADLINE = ("segm_AP50", "bbox_AP50", "segm_AP", "bbox_AP")  # the first that is there leads the page

# The policy is the page's own promise to reach for nothing outside itself; browsers hold it to that.
_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
{lead}
</header>
{sections}
<footer>Written by sam3-lora {version}.</footer>
</main>
</body>
</html>
"""


def write_report(
    path: str | Path,
    *,
    title: str,
    facts: Mapping[str, str],
    metrics: Mapping[str, Mapping[str, float]],
    history: History | None = None,
    pictures: Mapping[str, Sequence[Picture]] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write one self-contained HTML file, and return its path.

    Args:
        path: Replaced if it exists.
        title: Heading of the page, as plain text like all other texts here.
        facts: Name -> value of what was trained.
        metrics: Column -> metric -> value, such as ``{"base": {"segm_AP50": 0.1}, "adapter": {...}}``. Each later
            column is compared with the first.
        history: For the curves of loss and AP.
        pictures: Group -> its pictures, as from :func:`choose_pictures`. All together take 1.7 MB at most, unless
            there are hundreds.
        notes: Sentences below the metrics: how they were measured.
    """
    sections = [_results(metrics, notes), _facts(facts)]
    if history is not None and (history.steps or history.metrics):
        sections.append(_curves(history))
    if pictures is not None and any(pictures.values()):
        sections.append(_pictures(pictures))
    text = _PAGE.format(
        title=escape(title),
        style=(files("sam3_lora.report") / "page.css").read_text(encoding="utf-8"),
        lead=_lead(metrics),
        sections="\n".join(sections),
        version=escape(version("sam3-lora")),
    )
    write_text_atomic(Path(path), text)
    return Path(path)


def metric_name(metric: str) -> str:
    """Return the name of a metric for people: ``segm_AP50`` is "Masks, AP50"."""
    kind, _, rest = metric.partition("_")
    return (
        f"{_KINDS[kind]}, {rest.replace('_', ' ')}" if kind in _KINDS and rest else metric.replace("_", " ")
    )


def _lead(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """The one result to remember, as first and last column."""
    columns = list(metrics)
    metric = next((name for name in _HEADLINE if columns and all(name in metrics[c] for c in columns)), None)
    if metric is None:
        return ""
    first, last = metrics[columns[0]][metric], metrics[columns[-1]][metric]
    value = f"<strong>{last:.3f}</strong>"
    if len(columns) > 1:
        value = f"<span>{first:.3f}</span> <span aria-label='to'>→</span> {value}"
    legend = " → ".join(map(escape, dict.fromkeys((columns[0], columns[-1]))))
    return f'<p class="lead">{value} <small>{escape(metric_name(metric))}: {legend}</small></p>'


def _results(metrics: Mapping[str, Mapping[str, float]], notes: Sequence[str]) -> str:
    columns = list(metrics)
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    head = "".join(
        f'<th scope="col">{escape(column)}</th>'
        + ('<th scope="col">difference</th>' if column != columns[0] else "")
        for column in columns
    )
    body = "".join(_metric_row(name, metrics) for name in names)
    said = "".join(f"<p class='note'>{escape(note)}</p>" for note in notes)
    return _section(
        "Results",
        f"<div class='scroll' tabindex='0' role='region' aria-label='Metrics'><table><thead><tr>"
        f'<th scope="col">metric</th>{head}</tr></thead><tbody>{body}</tbody></table></div>{said}',
    )


def _metric_row(name: str, metrics: Mapping[str, Mapping[str, float]]) -> str:
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
    share = min(max(value, 0.0), 1.0)
    return f'<td><span class="bar" style="--share:{share:.3f}">{value:.3f}</span></td>'


def _difference_cell(first: float | None, value: float | None) -> str:
    if first is None or value is None:
        return "<td>–</td>"
    difference = round(value, 3) - round(first, 3)  # of the numbers that are shown
    if abs(difference) < 0.0005:
        return "<td>±0.000</td>"
    sign, kind = ("+", "up") if difference > 0 else ("−", "down")
    return f'<td class="{kind}">{sign}{abs(difference):.3f}</td>'


def _facts(facts: Mapping[str, str]) -> str:
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items()
    )
    return _section("What was trained", f"<dl>{items}</dl>")


def _curves(history: History) -> str:
    charts = [loss_chart(history)] if history.steps else []
    charts += [metrics_chart(history)] if history.metrics else []
    return _section("How it learned", f"<div class='charts'>{''.join(charts)}</div>")


def _pictures(groups: Mapping[str, Sequence[Picture]]) -> str:
    """All groups, below what the colours and the numbers mean."""
    flat = [picture for group in groups.values() for picture in group]
    columns = columns_of(flat)
    colours = label_colours(prompt for picture in flat for prompt in picture.row.prompts)
    shown = {item.category for picture in flat for items in picture.row.objects.values() for item in items}
    keys = "".join(
        f'<li><span class="swatch" style="background:rgb{colours[name]}"></span>{escape(name)}</li>'
        for name in colours
        if name in shown
    )
    urls = iter(as_data_urls(flat, colours))
    parts = [
        f"<h3>{escape(name.capitalize())}</h3>"
        + "".join(_picture(picture, columns, next(urls)) for picture in group)
        for name, group in groups.items()
        if group
    ]
    ranking = (
        f"Images are ranked by their mean IoU with “{escape(columns[-1])}”: for each object of the ground truth the "
        "best IoU of a prediction of its category that scores 0.5 or more (0 without one), averaged over the objects "
        "of the image. A prediction where there is nothing does not lower it; look out for those yourself."
    )
    return _section("Pictures", f"<p>{ranking}</p><ul class='keys'>{keys}</ul>{''.join(parts)}")


def _picture(picture: Picture, columns: Sequence[str], urls: Mapping[str, str]) -> str:
    width, height = picture.row.image.size
    cells = []
    for column in columns:
        items = picture.row.objects.get(column, ())
        iou = f"<span>IoU {picture.ious[column]:.2f}</span>" if column in picture.ious else ""
        alt = f"{picture.row.name}, {column}: {_in_words(items)}"
        cells.append(
            f'<figure><img src="{urls[column]}" width="{width}" height="{height}" alt="{escape(alt)}">'
            f"<figcaption><b>{escape(column)}</b> <span>{_count(column, items)}</span>{iou}</figcaption></figure>"
        )
    return f'<article><h4>{escape(picture.row.name)}</h4><div class="cells">{"".join(cells)}</div></article>'


def _count(column: str, items: Sequence[Instance]) -> str:
    if not items:
        return "no object" if column == GROUND_TRUTH else "nothing found"
    return "1 object" if len(items) == 1 else f"{len(items)} objects"


def _in_words(items: Sequence[Instance]) -> str:
    counts = Counter(item.category for item in items)
    return ", ".join(f"{count} × {category}" for category, count in counts.items()) or "nothing"


def _section(title: str, content: str) -> str:
    name = title.lower().replace(" ", "-")
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{content}</section>'
