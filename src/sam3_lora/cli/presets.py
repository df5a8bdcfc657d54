"""The verb ``presets``."""

from __future__ import annotations

import argparse
from typing import Any

from sam3_lora.cli.arguments import Parser

HELP: dict[str, Any] = {
    "help": "list what each preset adapts, and why",
    "description": "List the presets of 'sam3-lora train': adapted components, their rank r, and when to take which.",
}


def add_options(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    parser.set_defaults(run=_presets)


def _presets(args: argparse.Namespace) -> None:
    from sam3_lora.cli import tables
    from sam3_lora.presets import PRESETS, TRAINABLE_PARAMETERS

    if args.json:
        tables.print_json(
            {
                name: {
                    "components": dict(preset.components),
                    "kinds": preset.kinds,
                    "last_n_vision_blocks": preset.last_n_vision_blocks,
                    "trainable_parameters": TRAINABLE_PARAMETERS[name],
                    "reason": preset.reason,
                }
                for name, preset in PRESETS.items()
            }
        )
        return
    rows = [
        [
            name,
            "\n".join(preset.components),
            "\n".join(map(str, preset.components.values())),
            ", ".join(preset.kinds),
            f"{TRAINABLE_PARAMETERS[name]:,}",
            preset.reason,
        ]
        for name, preset in PRESETS.items()
    ]
    tables.print_table("Presets", ["preset", "component", "r", "layers", "parameters", "for"], rows)
