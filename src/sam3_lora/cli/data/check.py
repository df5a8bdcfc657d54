"""The verb ``data check``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3_lora.cli import arguments

if TYPE_CHECKING:
    from sam3_lora.data.check import DatasetReport
    from sam3_lora.data.repair import Repair

HELP: dict[str, Any] = {
    "help": "find everything that is wrong with a dataset",
    "description": "Find everything in a dataset that would stop a training or spoil its result.",
    "epilog": """\
examples:
  sam3-lora data check my_dataset
  sam3-lora data check my_dataset --fix repaired
  sam3-lora data check my_dataset --no-images --json

The exit code is 1 if there are errors, which stop a training, and no --fix that left none; warnings do not count.""",
}


def add_options(parser: arguments.Parser) -> None:
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="dataset folder with train/ and valid/")
    add("--fix", type=Path, metavar="OUT", help="also write a repaired copy, which must not exist yet")
    add("--boxes", action="store_true", help="masks are not trained: boxes without 'segmentation' are enough")
    add("--no-images", action="store_true", help="look at the annotation files only")
    add(
        "--processes",
        type=arguments.count,
        metavar="N",
        help="to decode images in (default: one for each CPU core)",
    )
    add("--json", action="store_true", help="print the problems as JSON")
    parser.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> None:
    from sam3_lora.cli import tables
    from sam3_lora.cli.progress import stages_on_stderr
    from sam3_lora.data.check import examine_dataset
    from sam3_lora.data.repair import check_repair_output, repair_dataset

    repair = None
    if args.fix is not None:
        check_repair_output(args.folder, args.fix)
    with stages_on_stderr() as show:
        report = examine_dataset(
            args.folder,
            masks=not args.boxes,
            images="none" if args.no_images else "pixels",
            processes=args.processes or len(os.sched_getaffinity(0)),
            on_progress=show,
        )
    if not args.json:
        _print_report(report)
    if args.fix is not None:
        with stages_on_stderr() as show:
            repair = repair_dataset(args.folder, args.fix, masks=not args.boxes, on_progress=show)
    if args.json:
        tables.print_json(report.as_dict() | ({"repaired": repair.as_dict()} if repair else {}))
    elif repair:
        _print_repair(repair)
    if not (report.ok or repair):
        raise SystemExit(1)


def _print_report(report: DatasetReport) -> None:
    for problem in report.problems:
        print(f"{problem.level}: {problem}\n")
    print(report.verdict())


def _print_repair(repair: Repair) -> None:
    print()
    for each in repair.done:
        print(f"done: {each}\n")
    print(repair.report.verdict())
