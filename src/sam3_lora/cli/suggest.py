"""The verb ``suggest``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sam3_lora.cli import arguments

HELP: dict[str, Any] = {
    "help": "name settings to start with, for your data and GPU",
    "description": "Choose preset, batch, epochs and memory levers for a dataset and a GPU: the memory from counted steps, "
    "the rest by rules of thumb.",
    "epilog": """\
examples:
  sam3-lora suggest --data my_dataset --gpu-memory 16
  sam3-lora suggest --data my_dataset --gpu-memory 8 --output runs/first.yaml""",
}


def add_options(parser: arguments.Parser) -> None:
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="dataset folder with train/ and valid/")
    add("--gpu-memory", type=arguments.gigabytes, required=True, metavar="GB", help="of the GPU to train on")
    add("--output", type=Path, metavar="FILE", help="also write a run file, which must not exist yet")
    add("--json", action="store_true", help="print the suggestion as JSON")
    parser.set_defaults(run=_suggest)


def _suggest(args: argparse.Namespace) -> None:
    from sam3_lora.cli import tables
    from sam3_lora.suggestion import as_command, suggest, write_suggestion

    if args.output is not None and args.output.suffix not in (".yaml", ".yml"):
        args.parser.error(f"--output must be a .yaml file, got '{args.output}'")
    found = suggest(args.data, args.gpu_memory)
    if args.output is not None:
        write_suggestion(found, args.data, args.output)
    if args.json:
        tables.print_json(found.as_dict())
        return
    facts = {"Because": "\n".join(found.reasons), "Room": f"for {found.max_prompts} prompts an image"}
    if args.output is not None:
        facts["Run file"] = (
            f"python -m sam3.train.train -c {args.output.resolve()} --use-cluster 0 --num-gpus 1"
        )
    tables.print_facts({**facts, "Start": as_command(found, args.data)})
