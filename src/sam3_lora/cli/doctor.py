"""The verb ``doctor``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from sam3_lora.cli.arguments import Parser

if TYPE_CHECKING:
    from sam3_lora.installation import Finding

HELP: dict[str, Any] = {
    "help": "examine this installation",
    "description": "Examine Python, packages, GPU, vocabulary, Hub access, checkpoint and disk. Nothing is changed.",
    "epilog": """\
Each line is good, a warning (it works with less) or bad, with what to do. The exit code is 1 if a line is bad.""",
}

_COLOURS = {"good": "green", "warning": "yellow", "bad": "bold red"}


def add_options(parser: Parser) -> None:
    parser.add_argument("--offline", action="store_true", help="ask nothing of the network")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> None:
    from sam3_lora.cli import tables
    from sam3_lora.installation import doctor

    findings = doctor(offline=args.offline)
    if args.json:
        tables.print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        _print_findings(findings)
    if any(finding.status == "bad" for finding in findings):
        raise SystemExit(1)


def _print_findings(findings: list[Finding]) -> None:
    """Print a line for each finding and its fix below it, whatever the width, so that commands can be copied."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, soft_wrap=True)
    width = max(len(finding.name) for finding in findings) + 2
    for finding in findings:
        status = Text(f"{finding.status:<9}", style=_COLOURS[finding.status])
        console.print(status + Text(f"{finding.name:<{width}}{finding.detail}"))
        if finding.fix:
            console.print(Text(f"{'':<{9 + width}}-> {finding.fix}"))
    counts = {status: sum(f.status == status for f in findings) for status in _COLOURS}
    console.print(Text(f"\n{counts['good']} good, {counts['warning']} warnings, {counts['bad']} bad"))
