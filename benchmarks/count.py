"""Count one real training step of the full-size model: FLOPs, bytes and operations, without a GPU or weights.

Writes benchmarks/counts.json (all that was counted), docs/reference/counts.md (the tables) and
src/sam3_lora/estimation/coefficients.json (what `sam3-lora estimate` computes with). Steps that counts.json has already
are not counted again, unless --again is given. A step takes 5 to 20 s and 1 GB.

OMP_NUM_THREADS=1 python -W ignore benchmarks/count.py
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from counts_page import write_results
from peft import LoraConfig, get_peft_model
from torch import nn

from sam3_lora.costs.step import FullSizeStep, Prepare
from sam3_lora.memory import MemorySettings
from sam3_lora.output import write_text_atomic
from sam3_lora.presets import PRESETS

COUNTS = Path(__file__).with_name("counts.json")
OFFICIAL = {f"memory.{name}": value for name, value in vars(MemorySettings()).items()}
#: Setting -> keys of the training config that it changes.
SETTINGS: dict[str, dict[str, Any]] = {
    "shipped": {},
    "official": OFFICIAL,
    "sampled": {"memory.mask_points": 12544},
    **{
        f"without {key.removeprefix('memory.')}": {key: value}
        for key, value in OFFICIAL.items()
        if key != "memory.mask_points"
    },
}
#: Enough of the grid for the formulas, and something of it to check them with.
POINTS = """
    1,5,1 4,5,1 16,5,1 1,50,1 4,20,1 1,5,2 4,5,2 1,20,4 16,20,2
"""
TABLE = """
    1,20,1 4,50,1 16,20,1 16,50,1 4,20,2 1,5,4 4,5,4 16,5,4
"""


def full_fine_tuning(model: nn.Module) -> nn.Module:
    """Train every parameter."""
    return model.requires_grad_(True)


def plain_lora(model: nn.Module) -> nn.Module:
    """Wrap the attention of both encoders and of the DETR as PEFT does by itself, fused."""
    names = [
        name
        for name, module in model.named_modules()
        if name.startswith(("backbone.", "transformer."))
        and (isinstance(module, nn.MultiheadAttention) or name.endswith(("attn.qkv", "attn.proj")))
    ]
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=names))


#: What is compared with the presets: counted with the official recipe alone.
BASELINES: dict[str, Prepare] = {"full fine-tuning": full_fine_tuning, "plain LoRA": plain_lora}


def main() -> None:
    options = parse()
    found = read_counts()
    versions = {name: version(name) for name in ("sam3", "torch", "peft")}
    wanted = list(wished(options))
    known = set() if options.again else {key_of(count) for count in found["counts"]}
    missing = [key for key in wanted if key not in known]
    for number, (preset, setting, points) in enumerate(by_model(missing), 1):
        print(f"{preset}, {setting} ({number})", file=sys.stderr, flush=True)
        step = FullSizeStep(BASELINES.get(preset, preset), config=SETTINGS[setting])
        for prompts, objects, batch in points:
            start = time.perf_counter()
            count = dataclasses.asdict(step.count(prompts, objects, batch))
            entry = {
                "preset": preset,
                "setting": setting,
                "prompts": prompts,
                "objects": objects,
                "batch": batch,
            }
            entry["trainable_parameters"] = step.trainable_parameters()
            # Read again: another process may count other presets meanwhile.
            others = [c for c in read_counts()["counts"] if key_of(c) != key_of(entry)]
            found = {"made_with": versions, "counts": [*others, {**entry, **count}]}
            write_text_atomic(COUNTS, as_lines(found))
            print(
                f"  {prompts} prompts, {objects} objects, {batch} images: {count['peak_bytes'] / 1e9:.3f} GB, "
                f"{count['flops'] / 1e12:.2f} TFLOP, {time.perf_counter() - start:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    write_results(found, SETTINGS)


def as_lines(found: Mapping[str, Any]) -> str:
    """Return the JSON of all counts, a line each."""
    counts = ",\n".join(json.dumps(count) for count in found["counts"])
    return f'{{"made_with": {json.dumps(found["made_with"])}, "counts": [\n{counts}\n]}}\n'


def read_counts() -> dict[str, Any]:
    return json.loads(COUNTS.read_text("utf-8")) if COUNTS.is_file() else {"counts": []}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--presets", nargs="*", default=["minimal", "balanced", "full"], choices=[*PRESETS, *BASELINES])
    add("--settings", nargs="*", default=["shipped", "official"], choices=[*SETTINGS])
    add("--points", nargs="*", metavar="P,N,B", default=[*POINTS.split(), *TABLE.split()])
    add("--grid", action="store_true", help="all of 1, 4, 16 prompts x 5, 20, 50 objects x 1, 2, 4 images")
    add("--again", action="store_true", help="count also what is counted already")
    return parser.parse_args()


def wished(options: argparse.Namespace) -> Iterator[tuple[str, str, int, int, int]]:
    points = [tuple(map(int, point.split(","))) for point in options.points]
    if options.grid:
        points = list(itertools.product((1, 4, 16), (5, 20, 50), (1, 2, 4)))
    for preset, setting in itertools.product(options.presets, options.settings):
        for prompts, objects, batch in points:
            yield preset, setting, prompts, objects, batch


def by_model(
    keys: list[tuple[str, str, int, int, int]],
) -> Iterator[tuple[str, str, list[tuple[int, int, int]]]]:
    for (preset, setting), group in itertools.groupby(keys, key=lambda key: key[:2]):
        yield preset, setting, [key[2:] for key in group]


def key_of(count: dict[str, Any]) -> tuple[str, str, int, int, int]:
    return count["preset"], count["setting"], count["prompts"], count["objects"], count["batch"]


if __name__ == "__main__":
    main()
