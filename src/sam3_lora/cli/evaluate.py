"""The verb ``evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3_lora.cli import arguments

if TYPE_CHECKING:
    from sam3_lora.evaluation.compare import Evaluation

HELP: dict[str, Any] = {
    "help": "measure the base and adapters side by side",
    "description": "Measure the base and adapters on a split: AP, mean IoU and cgF1, of each class too.",
    "epilog": """\
examples:
  sam3-lora evaluate --data my_dataset --adapter runs/first/adapters/best
  sam3-lora evaluate --data my_dataset --split test --adapter runs/a/adapters/best --adapter runs/b/adapters/best
  sam3-lora evaluate --data my_dataset --adapter runs/a/adapters/best --output runs/compared --report
  sam3-lora evaluate --data my_dataset --adapter runs/a/adapters/best --guard --general coco_sample
  sam3-lora evaluate --data my_dataset --base tiny --json""",
}


def add_options(parser: arguments.Parser) -> None:
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="dataset folder")
    add(
        "--split",
        default="valid",
        metavar="NAME|PATH",
        help="a split of the dataset, or any folder with _annotations.coco.json (default: valid)",
    )
    add(
        "--adapter",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder of an adapter; may be repeated",
    )
    add(
        "--base", metavar="NAME", help="facebook/sam3, tiny or the path of a sam3.pt (default: the adapters')"
    )
    add(
        "--guard",
        action="store_true",
        help="also ask for things that are not there: does an adapter fire on every prompt?",
    )
    add(
        "--general",
        type=Path,
        metavar="DIR",
        help="with --guard: a dataset of what the base knows, to see what is kept",
    )
    add(
        "--save-thresholds",
        action="store_true",
        help="write the best score threshold of each class into the adapter, for predict to use",
    )
    add("--batch-size", type=arguments.count, default=4, metavar="N", help="images at a time (default: 4)")
    add("--output", type=Path, metavar="DIR", help="also write metrics.json and all predictions there")
    add("--report", action="store_true", help="also write report.html into --output: numbers and pictures")
    add("--overwrite", action="store_true", help="replace an earlier evaluation in --output")
    add("--json", action="store_true", help="print the numbers as JSON")
    parser.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    from sam3_lora.cli import tables
    from sam3_lora.cli.progress import count_on_stderr
    from sam3_lora.output import check_output

    if args.general is not None and not args.guard:
        args.parser.error("--general is for the guard: add --guard")
    if args.save_thresholds and not args.adapter:
        args.parser.error("--save-thresholds needs an adapter to write them into: add --adapter DIR")
    if args.report and args.output is None:
        args.parser.error("--report needs a folder for report.html: add --output DIR")
    if args.output is not None:
        check_output(args.output, made_by="evaluate", overwrite=args.overwrite)
    from sam3_lora.evaluation.compare import evaluate, save_evaluation

    with count_on_stderr("images") as show:
        result = evaluate(
            args.data,
            adapters=args.adapter,
            split=args.split,
            base=args.base,
            batch_size=args.batch_size,
            guard=args.guard,
            general=args.general,
            on_progress=show,
        )
    if args.output is not None:
        save_evaluation(result, args.output, overwrite=args.overwrite)
    report = _write_report(result, args.output) if args.report else None
    if args.save_thresholds:
        _save_thresholds(result)
    if args.json:
        tables.print_json(result.as_dict())
        return
    _print_tables(result)
    if args.output is not None:
        written = {"Written to": tables.short_path(args.output)}
        tables.print_facts(written if report is None else {**written, "Report": tables.short_path(report)})


def _write_report(result: Evaluation, output: Path) -> Path:
    from sam3_lora.report import REPORT_FILE, report_of_evaluation

    return report_of_evaluation(result, output / REPORT_FILE)


def _print_tables(result: Evaluation) -> None:
    from sam3_lora.cli import tables
    from sam3_lora.evaluation.scores import CLASS_METRICS

    models = {"base": result.base, **result.adapters}
    title = f"{tables.short_path(result.split)}, base {result.base_name}"
    tables.print_metrics(title, {name: model.overall.defined() for name, model in models.items()})
    rows = [
        [
            prompt,
            "\n".join(name.replace("_", " ") for name in CLASS_METRICS),
            *(
                "\n".join(_number(model.per_class[prompt].as_dict()[name]) for name in CLASS_METRICS)
                for model in models.values()
            ),
        ]
        for prompt in result.base.per_class
    ]
    tables.print_table("By class", ["class", "metric", *models], rows)
    _print_guards(result)


def _save_thresholds(result: Evaluation) -> None:
    from sam3_lora.data.coco import ANNOTATION_FILE
    from sam3_lora.evaluation.compare import common_prompts
    from sam3_lora.evaluation.thresholds import best_thresholds
    from sam3_lora.record import record_thresholds

    asked = common_prompts(result.folders)
    for adapter, folder in result.folders.items():
        found = best_thresholds(result.split / ANNOTATION_FILE, result.adapters[adapter].predictions)
        record_thresholds(folder, {asked.get(name, name): best.threshold for name, best in found.items()})


def _print_guards(result: Evaluation) -> None:
    from sam3_lora.cli import tables

    for name, report in result.guards.items():
        rows = [
            [
                measure.replace("_", " "),
                f"{change.base:.3f}",
                f"{change.adapter:.3f}",
                f"{change.change:+.3f} [{change.low:+.3f}, {change.high:+.3f}]",
            ]
            for measure, change in report.measures.items()
        ]
        tables.print_table("Guard", ["measure", "base", name, "change, 95 % interval"], rows)
        facts = {
            "Verdict": f"{name}: {report.verdict}",
            "Asked": f"{report.images} images for {report.phrases} things that they do not show",
        }
        most = [
            f"{phrase} {before:.0%} -> {after:.0%}" for phrase, (before, after) in report.fires_most.items()
        ]
        tables.print_facts({**facts, "Fires most": ", ".join(most)} if most else facts)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
