"""The verb ``estimate``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3_lora.cli import arguments

if TYPE_CHECKING:
    from sam3_lora.estimation.estimate import Estimate

HELP: dict[str, Any] = {
    "help": "say what a training step will cost, before it runs",
    "description": "Estimate memory and work of a training step of the full-size model, from counted steps, in a second.",
    "epilog": """\
examples:
  sam3-lora estimate --data my_dataset --gpu-memory 16
  sam3-lora estimate --preset minimal --prompts 20 --objects 10
  sam3-lora estimate --prompts 4 --batch 2 --set memory.segmentation_chunk=null --json""",
}


def add_options(parser: arguments.Parser) -> None:
    add = parser.add_argument
    add(
        "--preset",
        type=arguments.preset,
        default="balanced",
        metavar="NAME",
        help="what is adapted; 'sam3-lora presets' lists them (default: balanced)",
    )
    add("--data", type=Path, metavar="DIR", help="dataset folder to take prompts and objects from")
    add(
        "--prompts",
        type=arguments.count,
        metavar="N",
        help="prompts asked of an image (default: the most of any in --data, else 1)",
    )
    add(
        "--objects",
        type=arguments.seed,
        metavar="N",
        help="objects annotated in an image (default: those of --data, else 5)",
    )
    add("--batch", type=arguments.count, default=1, metavar="N", help="images in a forward pass (default: 1)")
    add("--gpu-memory", type=arguments.gigabytes, metavar="GB", help="say whether it fits into so much")
    parser.add_settings(
        "a key of the config's memory or prompts block that is not as shipped, such as memory.mask_points=12544"
    )
    add("--json", action="store_true", help="print the estimate as JSON")
    parser.set_defaults(run=_estimate)


def _estimate(args: argparse.Namespace) -> None:
    from sam3_lora.cli import tables
    from sam3_lora.estimation.estimate import estimate

    strangers = [key for key, _ in args.set if not key.startswith(("memory.", "prompts."))]
    if strangers:
        args.parser.error(
            f"--set takes keys of the blocks memory and prompts here, such as memory.mask_points, got {', '.join(strangers)}; only "
            "presets as they are shipped were counted"
        )
    found = estimate(
        args.preset,
        prompts=args.prompts,
        objects=args.objects,
        batch=args.batch,
        data=args.data,
        gpu_memory=args.gpu_memory,
        memory=_block("memory.", args.set),
        asking=_block("prompts.", args.set),
    )
    if args.json:
        tables.print_json(found.as_dict())
        return
    tables.print_facts(_facts(found))


def _block(prefix: str, settings: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in settings if key.startswith(prefix)}


def _facts(found: Estimate) -> dict[str, str]:
    parts = [f"{name.replace('_', ' ')} {value / 1e9:.3f}" for name, value in found.breakdown.items()]
    part, _, direction = found.peak_phase.rpartition(" ")
    where = "between the parts" if part == "rest" else part.replace("_", " ")
    facts = {
        "Step": f"preset {found.preset}, {_size(found)}",
        "Memory": f"{found.device_bytes / 1e9:.2f} GB: {', '.join(parts)}",
        "Peak": f"{found.peak_bytes / 1e9:.2f} GB of tensors, in the {direction} pass, {where}",
        "Work": f"{found.step_flops / 1e12:.1f} TFLOP a step",
        "Trains": f"{found.trainable_parameters:,} parameters",
    }
    if found.worst_image is not None:
        worst = found.worst_image
        facts["Worst image"] = f"{worst.device_bytes / 1e9:.2f} GB with {worst.objects} objects"
    if found.gpu_memory_bytes is not None:
        fits = "fits" if found.fits else "does not fit"
        facts["GPU"] = f"{fits} into {found.gpu_memory_bytes / 1e9:g} GB"
    if found.advice:
        facts["Cheaper"] = "\n".join(f"-{a.saves_bytes / 1e9:.2f} GB: {a.change}" for a in found.advice)
    return facts


def _size(found: Estimate) -> str:
    amounts = ((found.batch, "image"), (found.prompts, "prompt"), (found.objects, "object"))
    images, prompts, objects = (f"{n} {word}" if n == 1 else f"{n} {word}s" for n, word in amounts)
    return f"{images} with {prompts} and {objects}" + (" each" if found.batch > 1 else "")
