"""What commands print on standard output: tables for people, JSON for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PLAIN_WIDTH = 120  # columns in a file or pipe, which have no width of their own


def print_json(value: Any) -> None:
    """Print a value as the only JSON document of the command."""
    print(json.dumps(value, indent=2))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows below a header, the width of the terminal; cells may have several lines."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=box.ROUNDED, show_lines=True)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text, because brackets in a plain string would be markup
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else _PLAIN_WIDTH).print(table)


def print_metrics(title: str, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Print one row per metric and one column per model: ``{"base": {"bbox_AP50": 0.1}, "adapter": {...}}``."""
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    rows = [
        [
            name.replace("_", " "),
            *(f"{values[name]:.3f}" if name in values else "" for values in metrics.values()),
        ]
        for name in names
    ]
    print_table(title, ["metric", *metrics], rows)


def print_facts(facts: Mapping[str, str]) -> None:
    """Print names and values in two columns, whatever the width, so that paths and commands can be copied."""
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        print(f"{name:<{width}}" + value.replace("\n", "\n" + " " * width))


def names_by_reason(reasons: Mapping[str, str]) -> str:
    """Return each name on a line of its own, below the reason that they share."""
    lines = []
    for reason in dict.fromkeys(reasons.values()):
        lines += [f"{reason}:", *(f"  {name}" for name, why in reasons.items() if why == reason)]
    return "\n".join(lines)


def share_of_parameters(trainable: int, total: int) -> str:
    return f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})"


def short_path(path: Path) -> str:
    """Return the path relative to the working folder where it lies inside, else as it is."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
