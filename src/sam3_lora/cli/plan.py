"""The verb ``plan``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from sam3_lora.cli import arguments

if TYPE_CHECKING:
    from sam3_lora.adapter_plan import AdapterPlan

HELP: dict[str, Any] = {
    "help": "count what an adapter would train, without weights",
    "description": "Count modules, parameters and file size of an adapter on a model without weights, in a few seconds.",
    "epilog": """\
examples:
  sam3-lora plan --preset full
  sam3-lora plan --preset light --set last_n_vision_blocks=8
  sam3-lora plan --set 'components=["detr_decoder", "scoring"]' --set 'kinds=["mlp"]' --json""",
}

_FIND_UNUSED = {
    False: "find_unused_parameters not needed",
    True: "find_unused_parameters needed, and set by itself",
}


def add_options(parser: arguments.Parser) -> None:
    add = parser.add_argument
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
        help="facebook/sam3, tiny or the path of a sam3.pt, which is not read (default: facebook/sam3)",
    )
    parser.add_settings("change one thing of the preset (r=16, use_dora=true)")
    add("--json", action="store_true", help="print the plan as JSON")
    parser.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> None:
    from sam3_lora.adapter_plan import plan_adapter
    from sam3_lora.cli import tables

    plan = plan_adapter(args.preset, args.base, **dict(args.set))
    if args.json:
        tables.print_json(plan.as_dict())
        return
    changes = f", {len(dict(args.set))} changed" if args.set else ""
    tables.print_table(
        f"Adapter on {args.base} (preset {args.preset}{changes})",
        ["component", "kind", "modules", "r", "lora_alpha", "parameters"],
        [
            [
                p.component,
                p.kind,
                str(p.modules),
                str(p.r),
                f"{p.lora_alpha:g}",
                f"{p.trainable_parameters:,}",
            ]
            for p in plan.parts
        ],
    )
    tables.print_facts(_facts(plan))


def _facts(plan: AdapterPlan) -> dict[str, str]:
    from sam3_lora.cli import tables

    besides = plan.trainable_parameters - sum(part.trainable_parameters for part in plan.parts)
    facts = {
        "Trains": tables.share_of_parameters(plan.trainable_parameters, plan.total_parameters)
        + f", in {plan.modules} modules",
        "Besides": f"{besides:,} of these are whole modules or biases" if besides else "",
        "File": f"{plan.adapter_bytes / 1e6:.2f} MB ({plan.adapter_bytes:,} bytes)",
        "DDP": f"{_FIND_UNUSED[plan.find_unused_parameters]}: {plan.ddp_reason}",
        "Note": "\n".join(plan.notes),
        "Left out": tables.names_by_reason(plan.dead_modules),
    }
    return {name: text for name, text in facts.items() if text}
