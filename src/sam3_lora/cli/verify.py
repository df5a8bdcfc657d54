"""The verb ``verify``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3_lora.cli import arguments
from sam3_lora.errors import ConfigError, TargetError, as_report

if TYPE_CHECKING:
    from torch import nn

    from sam3_lora.verification import Verification

HELP: dict[str, Any] = {
    "help": "prove that every adapted module acts",
    "description": """\
Prove that every adapted module acts: changed alone it moves an output, and the training losses give it a gradient.
Takes one forward for each module: seconds with --base tiny, minutes with a GPU, hours without one.""",
    "epilog": """\
examples:
  sam3-lora verify --base tiny --preset full
  sam3-lora verify --adapter runs/first/adapters/best""",
}

_SHOWN = 5  # live modules: those that move the outputs least


def add_options(parser: arguments.Parser) -> None:
    add = parser.add_argument
    add("--preset", type=arguments.preset, metavar="NAME", help="what to adapt (default: balanced)")
    add("--adapter", type=Path, metavar="DIR", help="verify a saved adapter instead")
    parser.add_settings("override the preset, as in get_peft_sam3")
    add(
        "--base", metavar="NAME", help="facebook/sam3, tiny or the path of a sam3.pt (default: the adapter's)"
    )
    add("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> None:
    if args.adapter is not None and (args.preset is not None or args.set):
        raise ConfigError("--adapter says what is adapted; leave out --preset and --set")
    from sam3_lora.cli import tables
    from sam3_lora.cli.progress import count_on_stderr
    from sam3_lora.verification import verify_adapter

    with count_on_stderr("modules") as show:
        result = verify_adapter(_model(args), on_progress=show)
    if args.json:
        tables.print_json(result.as_dict())
    else:
        _print_result(result)
    if result.dead:
        dead = [f"{name}: {result.modules[name].dead_because}" for name in result.dead]
        raise TargetError(
            f"the adapter is without effect on {len(dead)} of {result.checked} modules: {as_report(dead)}"
        )


def _model(args: argparse.Namespace) -> nn.Module:
    from sam3_lora.adapter import get_peft_sam3, load_adapter, recorded_base
    from sam3_lora.base.checkpoint import DEFAULT
    from sam3_lora.base.loading import load_base

    if args.adapter is None:
        return get_peft_sam3(load_base(args.base or DEFAULT), args.preset or "balanced", **dict(args.set))
    return load_adapter(load_base(args.base or recorded_base(args.adapter)), args.adapter)


def _print_result(result: Verification) -> None:
    from sam3_lora.cli import tables

    live = [item for item in result.modules.items() if not item[1].dead_because]
    weakest = sorted(live, key=lambda item: item[1].moved)[:_SHOWN]
    rows = [[name, f"{proof.moved:,.0f} x", proof.output, f"{proof.gradient:.1e}"] for name, proof in weakest]
    if rows:
        tables.print_table(
            "Live modules, weakest first", ["module", "moves, x noise", "output", "gradient"], rows
        )
    tables.print_facts({"Checked": f"{result.checked} modules", "Dead": str(len(result.dead) or "none")})
