"""The page: results, facts, curves and pictures as one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from importlib.resources import files
from itertools import islice
from pathlib import Path

from sam3_lora.evaluation.verdict import GuardReport
from sam3_lora.output import write_text_atomic
from sam3_lora.report.charts import loss_chart, metrics_chart
from sam3_lora.report.guard import guard_section
from sam3_lora.report.pictures import Picture, as_data_urls, columns_of
from sam3_lora.report.tables import Metrics, classes_table, metric_name, metrics_table
from sam3_lora.training.history import History
from sam3_lora.visualization import GROUND_TRUTH, Instance, label_colours

REPORT_FILE = "report.html"

_SHOWN_CLASSES = 100  # of thousands, nobody reads all, and the page must open
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
    metrics: Mapping[str, Metrics],
    classes: Mapping[str, Mapping[str, Metrics]] | None = None,
    history: History | None = None,
    pictures: Mapping[str, Sequence[Picture]] | None = None,
    notes: Sequence[str] = (),
    guards: Mapping[str, GuardReport] | None = None,
    facts_heading: str = "What was trained",
) -> Path:
    """Write one self-contained HTML file, and return its path.

    Args:
        path: Replaced if it exists.
        title: Heading of the page, as plain text like all other texts here.
        facts: Name -> value of what was trained, or measured.
        metrics: Column -> metric -> value, such as ``{"base": {"segm_AP50": 0.1}, "adapter": {...}}``. Each later
            column is compared with the first. ``None`` is a value that is not defined.
        classes: Class -> the same for it alone; at least one metric in each. Only the first hundred are shown.
        history: For the curves of loss and AP.
        pictures: Group -> its pictures, as from :func:`choose_pictures`. All together take 1.7 MB at most, unless
            there are hundreds.
        notes: Sentences below the metrics: how they were measured.
        guards: Adapter -> what it did to the open vocabulary.
        facts_heading: What stands above the facts.
    """
    sections = [_results(metrics, notes), _facts(facts_heading, facts)]
    if guards:
        sections.append(_section("Silent where nothing is", guard_section(guards)))
    if classes:
        sections.append(_classes(classes))
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


def _lead(metrics: Mapping[str, Metrics]) -> str:
    """The one result to remember: the first column, and the best of the later ones."""
    columns = list(metrics)
    common = (name for name in _HEADLINE if all(values.get(name) is not None for values in metrics.values()))
    metric = next(common, None)
    if metric is None or not columns:
        return ""
    values = {column: metrics[column][metric] or 0.0 for column in columns}
    first, *later = columns
    best = max(later or columns, key=values.__getitem__)
    value = f"<strong>{values[best]:.3f}</strong>"
    if later:
        value = f"<span>{values[first]:.3f}</span> <span aria-label='to'>→</span> {value}"
    legend = " → ".join(map(escape, dict.fromkeys((first, best))))
    return f'<p class="lead">{value} <small>{escape(metric_name(metric))}: {legend}</small></p>'


def _results(metrics: Mapping[str, Metrics], notes: Sequence[str]) -> str:
    said = "".join(f"<p class='note'>{escape(note)}</p>" for note in notes)
    return _section("Results", metrics_table(metrics) + said)


def _classes(classes: Mapping[str, Mapping[str, Metrics]]) -> str:
    shown = dict(islice(classes.items(), _SHOWN_CLASSES))
    more = len(classes) - len(shown)
    said = f"<p class='note'>{more:,} more classes are left out here.</p>" if more else ""
    return _section("Results by class", classes_table(shown) + said)


def _facts(heading: str, facts: Mapping[str, str]) -> str:
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items()
    )
    return _section(heading, f"<dl>{items}</dl>")


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
    name = escape(title.lower().replace(" ", "-"))
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>{content}</section>'
