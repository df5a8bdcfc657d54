"""The verb ``demo``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sam3_lora.cli import arguments

HELP: dict[str, Any] = {
    "help": "see it work in a few minutes, without data, GPU or download",
    "description": "Train the tiny SAM3 on shapes that it has never seen, and compare it before and after.",
    "epilog": """\
examples:
  sam3-lora demo
  sam3-lora demo --seed 1 --output runs/demo1""",
}

_SHOWN_SUFFIXES = (".png", ".html", ".json")


def add_options(parser: arguments.Parser) -> None:
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="folder for the results; an earlier demo in it is replaced (default: runs/demo)",
    )
    add("--seed", type=arguments.seed, default=0, metavar="N", help="seed of data and training (default: 0)")
    add("--json", action="store_true", help="print the metrics as JSON")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    from sam3_lora.cli import tables
    from sam3_lora.cli.progress import progress_on_stderr
    from sam3_lora.demo import run_demo

    with progress_on_stderr() as show:
        metrics = run_demo(args.output, seed=args.seed, on_progress=show)
    if args.json:
        tables.print_json(metrics)
    else:
        _print_comparison(metrics, args.output)


def _print_comparison(metrics: Mapping[str, Any], output: Path) -> None:
    from sam3_lora.cli import tables

    title = "Shapes that the base has never seen"
    tables.print_metrics(title, {"base": metrics["base"], "adapter": metrics["adapter"]})
    tables.print_facts(
        {
            "Trained": tables.share_of_parameters(
                metrics["trainable_parameters"], metrics["total_parameters"]
            ),
            "Adapter": f"{metrics['adapter_bytes'] / 1000:,.0f} kB",
            "CPU time": f"{metrics['cpu_seconds']:,.0f} s",
            "Look at": "\n".join(map(tables.short_path, _results(output))),
        }
    )


def _results(output: Path) -> list[Path]:
    """Return the files that are made for people, pictures first, then the adapter."""
    files = [file for file in output.iterdir() if file.suffix in _SHOWN_SUFFIXES and file.name[0] != "."]
    files.sort(key=lambda file: (_SHOWN_SUFFIXES.index(file.suffix), file.name))
    return files + [folder for folder in (output / "adapters" / "best",) if folder.is_dir()]
