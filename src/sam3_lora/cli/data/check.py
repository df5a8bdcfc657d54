"""The verb ``data check``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3_lora.cli.arguments import Parser

if TYPE_CHECKING:
    from sam3_lora.data.check import DatasetReport

HELP: dict[str, Any] = {
    "help": "find everything that is wrong with a dataset",
    "description": "Find everything in a dataset that would stop a training or spoil its result.",
    "epilog": """\
examples:
  sam3-lora data check my_dataset
  sam3-lora data check my_dataset --json

The exit code is 1 if there are errors, which stop a training; warnings do not.""",
}


def add_options(parser: Parser) -> None:
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="dataset folder with train/ and valid/")
    add("--json", action="store_true", help="print the problems as JSON")
    parser.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> None:
    from sam3_lora.cli import tables
    from sam3_lora.data.check import examine_dataset

    report = examine_dataset(args.folder)
    if args.json:
        tables.print_json(report.as_dict())
    else:
        _print_report(report)
    if not report.ok:
        raise SystemExit(1)


def _print_report(report: DatasetReport) -> None:
    for problem in report.problems:
        print(f"{problem.level}: {problem}\n")
    print(report.verdict())
