"""The group ``data``: verbs for datasets, one module each."""

from __future__ import annotations

from typing import Any

from sam3_lora.cli.arguments import Parser
from sam3_lora.cli.data import check, convert

HELP: dict[str, Any] = {
    "help": "check and convert datasets",
    "description": "Work on datasets: a folder with train/ and valid/, each with its images and _annotations.coco.json.",
}

#: What may follow ``sam3-lora data``.
VERBS = {
    "check": check,
    "convert": convert,
}


def add_options(parser: Parser) -> None:
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", dest="data_command", required=True)
    for name, module in VERBS.items():
        module.add_options(verbs.add_parser(name, **module.HELP))
