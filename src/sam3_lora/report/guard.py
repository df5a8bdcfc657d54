"""The section of a report on what adapters did to the open vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from sam3_lora.evaluation.verdict import CUTOFFS, GuardReport
from sam3_lora.report.tables import metric_name, metrics_table

_MEANING = {
    "kept": "it stays silent where nothing is, as far as this probe can tell",
    "drifted": "it finds more that is not there, or less of what the base finds",
    "lost": "its words no longer decide what it finds, or the concepts of the base are gone",
}


def guard_section(guards: Mapping[str, GuardReport]) -> str:
    """Return HTML for each adapter: the verdict, the numbers with their intervals, and where it fires most."""
    return "".join(_of_adapter(name, report) for name, report in guards.items())


def _of_adapter(name: str, report: GuardReport) -> str:
    columns = {
        "base": {measure: change.base for measure, change in report.measures.items()},
        name: {measure: change.adapter for measure, change in report.measures.items()},
    }
    notes = [
        f"Each of {report.images:,} images was asked for {report.phrases:,} things that it does not show. An object counts "
        f"from score {report.threshold:g} on.",
        "Change, with its 95 % interval over draws of the images: "
        + "; ".join(
            f"{metric_name(measure)} {change.change:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
            for measure, change in report.measures.items()
        )
        + ".",
        *(
            f"{metric_name(cutoff.measure)}: {cutoff.reason}."
            for cutoff in CUTOFFS
            if cutoff.measure in report.measures
        ),
    ]
    if report.fires_most:
        most = (
            f"{phrase} ({before:.0%} → {after:.0%})" for phrase, (before, after) in report.fires_most.items()
        )
        notes.insert(1, "It fires most on " + ", ".join(most) + ".")
    verdict = f"<p><strong>{escape(name)}: {report.verdict}</strong>, {_MEANING[report.verdict]}.</p>"
    return verdict + metrics_table(columns) + "".join(f"<p class='note'>{escape(note)}</p>" for note in notes)
