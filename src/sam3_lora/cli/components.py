"""The verb ``components``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from sam3_lora.cli.arguments import Parser

if TYPE_CHECKING:
    from sam3_lora.adapter_plan import AdapterPlan

HELP: dict[str, Any] = {
    "help": "list the parts of SAM3 that can be adapted",
    "description": "List the parts of SAM3 that LoRA can adapt, with their size at r = 1, and the modules that are left out "
    "and why.",
    "epilog": "To adapt some of them: --set 'components=[\"detr_decoder\"]' --set 'kinds=[\"mlp\"]', with plan or train.",
}


def add_options(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    parser.set_defaults(run=_components)


def _components(args: argparse.Namespace) -> None:
    from sam3_lora.adapter_plan import plan_adapter
    from sam3_lora.cli import tables
    from sam3_lora.components import COMPONENTS, KINDS
    from sam3_lora.presets import Preset

    everything = plan_adapter(Preset("all that can be adapted", dict.fromkeys(COMPONENTS, 1), KINDS))
    if args.json:
        tables.print_json(_as_json(everything))
        return
    tables.print_table(
        "Components of the full-size model",
        ["component", "kind", "modules", "parameters at r = 1", "for example"],
        [
            [part.component, part.kind, str(part.modules), f"{part.trainable_parameters:,}", part.example]
            for part in everything.parts
        ],
    )
    tables.print_facts({"Left out": tables.names_by_reason(everything.dead_modules)})


def _as_json(everything: AdapterPlan) -> dict[str, Any]:
    from sam3_lora.components import COMPONENT_MAP_VERSION

    components: dict[str, dict[str, Any]] = {}
    for part in everything.parts:
        components.setdefault(part.component, {})[part.kind] = {
            "modules": part.modules,
            "parameters_at_r_1": part.trainable_parameters,
            "example": part.example,
        }
    return {
        "component_map_version": COMPONENT_MAP_VERSION,
        "components": components,
        "dead_modules": dict(everything.dead_modules),
    }
