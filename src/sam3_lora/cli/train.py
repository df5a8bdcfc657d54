"""The verb ``train``."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3_lora.cli import arguments

if TYPE_CHECKING:
    from sam3_lora.training.launch import TrainResult

HELP: dict[str, Any] = {
    "help": "train an adapter on your images",
    "description": "Train a LoRA adapter with the official SAM3 trainer. The data are checked first.",
    "epilog": """\
examples:
  sam3-lora train --data my_dataset --output runs/first
  sam3-lora train --data my_dataset --output runs/wide --preset full --set r=32 --set lora_dropout=0.1
  sam3-lora train --data my_dataset --output runs/try --base tiny --max-epochs 3

my_dataset holds train/ and valid/, each with its images and _annotations.coco.json; category names are the prompts.""",
}


def add_options(parser: arguments.Parser) -> None:
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="dataset folder with train/ and valid/")
    add("--output", type=Path, required=True, metavar="DIR", help="run folder: new, or empty")
    add(
        "--preset",
        type=arguments.preset,
        default="balanced",
        metavar="NAME",
        help="what to adapt; 'sam3-lora presets' lists them (default: balanced)",
    )
    add(
        "--base",
        default="facebook/sam3",
        help="facebook/sam3, tiny (a small model for trials on any machine) or the path of a sam3.pt "
        "(default: facebook/sam3)",
    )
    add("--max-epochs", type=arguments.count, metavar="N", help="times to go through the training images")
    add("--batch-size", type=arguments.count, metavar="N", help="images per step on each GPU")
    add("--lr", type=arguments.rate, metavar="X", help="highest learning rate")
    add("--seed", type=arguments.seed, default=0, metavar="N", help="seed of all random choices (default: 0)")
    add(
        "--num-gpus",
        type=arguments.count,
        default=1,
        metavar="N",
        help="GPUs, or processes without (default: 1)",
    )
    add("--overwrite", action="store_true", help="replace an earlier run in --output")
    add(
        "--set",
        type=arguments.setting,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one thing of the preset (r=16, use_dora=true) or of the config by its dotted name "
        "(training.weight_decay=0.01); may be repeated",
    )
    add("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> None:
    from sam3_lora.cli.progress import progress_on_stderr
    from sam3_lora.training.launch import TrainSettings, train

    settings = TrainSettings(
        data=args.data,
        output=args.output,
        preset=args.preset,
        base=args.base,
        max_epochs=args.max_epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        num_gpus=args.num_gpus,
        overwrite=args.overwrite,
        overrides={key: value for key, value in args.set if "." not in key},
        config={key: value for key, value in args.set if "." in key},
    )
    with progress_on_stderr() as show:
        result = train(settings, on_progress=show)
    _print_result(result, args.base, as_json=args.json)


def _print_result(result: TrainResult, base: str, as_json: bool) -> None:
    from sam3_lora.cli import tables

    if as_json:
        tables.print_json(
            {
                "output": str(result.output),
                "adapter": str(result.adapter),
                "metrics": dict(result.metrics),
                "trainable_parameters": result.trainable_parameters,
                "total_parameters": result.total_parameters,
            }
        )
        return
    adapter, logs = tables.short_path(result.adapter), tables.short_path(result.output / "tensorboard")
    tables.print_metrics("Best adapter on valid/", {"adapter": result.metrics})
    tables.print_facts(
        {
            "Trained": tables.share_of_parameters(result.trainable_parameters, result.total_parameters),
            "Adapter": adapter,
            "Curves": f"tensorboard --logdir {shlex.quote(logs)}",
            "Python": f"sam3_lora.load_adapter(sam3_lora.load_base({base!r}), {adapter!r})",
        }
    )
