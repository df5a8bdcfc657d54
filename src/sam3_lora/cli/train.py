"""The verb ``train``."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3_lora.cli import arguments

if TYPE_CHECKING:
    from sam3_lora.training.launch import TrainResult
    from sam3_lora.training.settings import TrainSettings

HELP: dict[str, Any] = {
    "help": "train an adapter on your images",
    "description": "Train a LoRA adapter with the official SAM3 trainer. The data are checked first.",
    "epilog": """\
examples:
  sam3-lora train --data my_dataset --output runs/first
  sam3-lora train --data my_dataset --output runs/wide --preset full --set r=32 --set lora_dropout=0.1
  sam3-lora train --data my_dataset --output runs/try --base tiny --max-epochs 3
  sam3-lora train --data my_dataset --output runs/flat schedule=constant training.lr_vision_backbone=5e-5
  sam3-lora train --data my_dataset --output runs/many --use-cluster --num-nodes 2 --num-gpus 4 --partition gpu --dry-run
  sam3-lora train --resume runs/first

my_dataset holds train/ and valid/, each with its images and _annotations.coco.json; category names are the prompts.""",
}


def add_options(parser: arguments.Parser) -> None:
    add = parser.add_argument
    add(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="any key of the config, in Hydra's spelling: training.weight_decay=0.01, schedule=constant, "
        "+trainer.adapter_freq=2; --max-epochs is training.max_epochs, and so on",
    )
    add("--data", type=Path, metavar="DIR", help="dataset folder with train/ and valid/")
    add("--output", type=Path, metavar="DIR", help="run folder: new, or empty")
    add(
        "--resume",
        type=Path,
        metavar="DIR",
        help="go on with a run that was stopped; other options must be those that it was started with",
    )
    add(
        "--preset",
        type=arguments.preset,
        metavar="NAME",
        help="what to adapt; 'sam3-lora presets' lists them (default: balanced)",
    )
    add(
        "--base",
        help="facebook/sam3, tiny (a small model for trials on any machine) or the path of a sam3.pt "
        "(default: facebook/sam3)",
    )
    add("--max-epochs", type=arguments.count, metavar="N", help="times to go through the training images")
    add("--batch-size", type=arguments.count, metavar="N", help="images per step on each GPU")
    add("--lr", type=arguments.rate, metavar="X", help="highest learning rate")
    add("--seed", type=arguments.seed, metavar="N", help="seed of all random choices (default: 0)")
    add(
        "--save-every-steps",
        type=arguments.count,
        metavar="N",
        help="also save after every N steps, to go on in the middle of an epoch (default: after each epoch, and on Ctrl-C)",
    )
    add(
        "--num-gpus",
        type=arguments.count,
        metavar="N",
        help="GPUs of each machine, or processes without (default: 1)",
    )
    add(
        "--use-cluster",
        action="store_true",
        default=None,
        help="submit a Slurm job through the official launcher and wait for it; Ctrl-C leaves the job running",
    )
    add("--num-nodes", type=arguments.count, metavar="N", help="machines of the Slurm job (default: 1)")
    add("--partition", metavar="NAME", help="Slurm partition")
    add("--account", metavar="NAME", help="Slurm account")
    add("--qos", metavar="NAME", help="Slurm quality of service")
    add(
        "--dry-run",
        action="store_true",
        help="check all, print the command or the Slurm job's request, and stop",
    )
    add("--overwrite", action="store_true", help="replace an earlier run in --output")
    parser.add_settings(
        "change one thing of the preset (r=16, use_dora=true), which is adapter.overrides.r=16"
    )
    add(
        "--no-report",
        dest="report",
        action="store_false",
        help="end without report.html, for which the base is evaluated once on valid/",
    )
    add("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> None:
    from sam3_lora.cli.progress import run_on_stderr
    from sam3_lora.finetune import resume, train
    from sam3_lora.training.overrides import SETTING_KEYS
    from sam3_lora.training.settings import TrainSettings

    if args.resume is not None:
        _refuse_beside_resume(args)
        expected = {key: value for key, value in _config_keys(args).items() if value is not None}
        with run_on_stderr() as (show, show_report):
            result = resume(
                args.resume, expected, on_progress=show, report=args.report, on_report=show_report
            )
    else:
        missing = [f"--{name}" for name in ("data", "output") if getattr(args, name) is None]
        if missing:
            args.parser.error(f"the following arguments are required: {', '.join(missing)} (or --resume)")
        given = {name: value for name in SETTING_KEYS if (value := getattr(args, name)) is not None}
        settings = TrainSettings(
            **given,
            overwrite=args.overwrite,
            report=args.report,
            overrides={key: value for key, value in args.set if "." not in key},
            config=_config(args),
        )
        if args.dry_run:
            from sam3_lora.training.launch import planned_start

            sys.stdout.write(planned_start(settings))
            return
        _announce_costs(settings)
        with run_on_stderr() as (show, show_report):
            result = train(settings, on_progress=show, on_report=show_report)
    _print_result(result, as_json=args.json)


def _announce_costs(settings: TrainSettings) -> None:
    """Say on standard error what a step will cost; of data that cannot be read the training itself says more."""
    from sam3_lora.errors import ConfigError, DataError
    from sam3_lora.estimation.estimate import MAX_OBJECTS, estimate

    if settings.base == "tiny":
        return
    memory, asking = (
        {key.removeprefix(block): value for key, value in settings.config.items() if key.startswith(block)}
        for block in ("memory.", "prompts.")
    )
    try:
        if settings.config.get("training.enable_segmentation") is False:
            raise ConfigError("steps were counted with masks only; boxes alone need less")
        if settings.overrides or settings.config.get("base.quantization"):
            raise ConfigError("only presets and bases as they are shipped were counted")
        found = estimate(
            settings.preset,
            data=Path(settings.config.get("training.ann_file_train", settings.data)),
            batch=settings.batch_size or _whole(settings.config.get("training.batch_size"), 1),
            memory=memory,
            max_objects=_whole(settings.config.get("training.max_objects"), MAX_OBJECTS),
            asking=asking,
        )
    except DataError:
        return
    except ConfigError as error:
        print(f"No estimate of memory: {error}", file=sys.stderr)
        return
    worst = found.worst_image or found
    print(
        f"Estimated: {found.device_bytes / 1e9:.1f} GB of GPU memory ({found.prompts} prompts, {found.objects} objects an "
        f"image), {worst.device_bytes / 1e9:.1f} GB for the image with the most objects ({worst.objects}), "
        f"{found.step_flops / 1e12:.1f} TFLOP a step. More: sam3-lora estimate --data {shlex.quote(str(settings.data))}",
        file=sys.stderr,
    )


def _whole(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) else otherwise


def _config(args: argparse.Namespace) -> dict[str, Any]:
    """Return the config keys among the words behind the options and those of --set, which may not contradict."""
    from sam3_lora.errors import ConfigError
    from sam3_lora.training.overrides import parse_overrides

    for word in args.overrides:
        if "=" not in word and not word.startswith("~"):
            args.parser.refuse(word)
    config = parse_overrides(args.overrides)
    for key, value in args.set:
        if "." in key and config.setdefault(key, value) != value:
            raise ConfigError(f"{key} is set twice, to {config[key]!r} and with --set to {value!r}")
    return config


#: Options whose config key has another value than the option.
_TRANSLATED = ("data", "output", "preset", "base")


def _config_keys(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the options say as config keys, to be compared with those of a run."""
    from sam3_lora.base.checkpoint import absolute_base
    from sam3_lora.training.overrides import SETTING_KEYS

    return {
        "paths.dataset_root": None if args.data is None else str(args.data.resolve()),
        "adapter.preset": args.preset,
        "base.name": None if args.base is None else absolute_base(args.base),
        **{SETTING_KEYS[name]: getattr(args, name) for name in SETTING_KEYS if name not in _TRANSLATED},
        **{f"adapter.overrides.{key}": value for key, value in args.set if "." not in key},
        **_config(args),
    }


def _refuse_beside_resume(args: argparse.Namespace) -> None:
    given = [
        f"--{name.replace('_', '-')}" for name in ("output", "overwrite", "dry_run") if getattr(args, name)
    ]
    if given:
        args.parser.error(
            f"{' and '.join(given)} cannot go with --resume, which goes on with what is in its folder"
        )


def _print_result(result: TrainResult, as_json: bool) -> None:
    from sam3_lora.cli import tables

    if as_json:
        tables.print_json(
            {
                "output": str(result.output),
                "adapter": str(result.adapter),
                "metrics": dict(result.metrics),
                "trainable_parameters": result.trainable_parameters,
                "total_parameters": result.total_parameters,
                "stopped_early": result.stopped_early,
                "job": result.job,
                "report": None if result.report is None else str(result.report),
            }
        )
        return
    adapter, logs = tables.short_path(result.adapter), tables.short_path(result.output / "tensorboard")
    tables.print_metrics("Best adapter on valid/", {"adapter": result.metrics})
    report = {} if result.report is None else {"Report": tables.short_path(result.report)}
    if result.stopped_early is not None:
        report["Stopped early"] = (
            f"after epoch {result.stopped_early}: no rise of the best metric for long enough"
        )
    tables.print_facts(
        {
            "Trained": tables.share_of_parameters(result.trainable_parameters, result.total_parameters),
            "Adapter": adapter,
            **report,
            "Curves": f"tensorboard --logdir {shlex.quote(logs)}",
            "Python": f"sam3_lora.load_adapter(sam3_lora.load_base({result.base!r}), {adapter!r})",
        }
    )
