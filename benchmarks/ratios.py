"""What LoRA and split attention cost relative to what they replace: CPU time and bytes saved for the backward.

OMP_NUM_THREADS=1 python -W ignore benchmarks/ratios.py --output ratios.json

All variants of a part run in turn, in one process, and the ratio is taken of neighbours: what else the machine does hits
both. Needs 4 GB of memory and about a quarter of an hour; --parts tiny takes seconds. Results: docs/reference/ratios.md
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from ratio_parts import PARTS, Part, Variant

from sam3_lora.counting import count_step
from sam3_lora.output import write_json_atomic


@dataclass(frozen=True)
class Row:
    """One ratio: of the step of one variant to that of another.

    Attributes:
        time: Median of the ratios of CPU time.
        lowest: Of those ratios.
        highest: Of those ratios.
        seconds: Median CPU time of the one step and of the other.
        saved: Ratio of the bytes that autograd keeps for the backward; ``None`` for inference.
        saved_bytes: Those bytes for the one and for the other.
    """

    part: str
    of: str
    to: str
    time: float
    lowest: float
    highest: float
    seconds: tuple[float, float]
    saved: float | None
    saved_bytes: tuple[int, int] | None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--pairs", type=int, default=7, help="turns of each variant; default 7")
    parser.add_argument("--output", type=Path, help="also write the numbers to this JSON file")
    given = parser.parse_args(arguments)
    if given.pairs < 1:
        parser.error(f"--pairs must be 1 or more, got {given.pairs}")
    torch.set_num_threads(1)
    rows = [row for name in given.parts for part in PARTS[name]() for row in measure(part, given.pairs)]
    print(as_markdown(rows))
    if given.output:
        versions = {package: version(package) for package in ("sam3", "torch", "peft")}
        content = {"versions": versions, "pairs": given.pairs, "rows": [asdict(row) for row in rows]}
        write_json_atomic(given.output, content)


def measure(part: Part, pairs: int) -> list[Row]:
    """Run all variants of a part in turn, and return its ratios."""
    # Each counting is a first run too, which is slower than the others and not timed.
    saved = {name: saved_bytes(variant) for name, variant in part.variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in part.variants}
    for turn in range(pairs):
        for name in in_turn(part.variants, turn):
            seconds[name].append(cpu_seconds(part.variants[name]))
        print(f"{part.name}: {turn + 1}/{pairs}", file=sys.stderr, flush=True)
    return [ratio(part.name, of, to, seconds, saved) for of, to in part.ratios]


def in_turn(variants: Mapping[str, Variant], turn: int) -> list[str]:
    """Return the names, every other turn backwards: none always comes after the dearest."""
    return list(variants)[:: 1 if turn % 2 == 0 else -1]


def ratio(
    part: str, of: str, to: str, seconds: Mapping[str, list[float]], saved: Mapping[str, int | None]
) -> Row:
    ratios = [one / other for one, other in zip(seconds[of], seconds[to], strict=True)]
    kept, others = saved[of], saved[to]
    both = None if kept is None or others is None else (kept, others)
    return Row(
        part,
        of,
        to,
        time=statistics.median(ratios),
        lowest=min(ratios),
        highest=max(ratios),
        seconds=(statistics.median(seconds[of]), statistics.median(seconds[to])),
        saved=None if both is None else both[0] / both[1],
        saved_bytes=both,
    )


def cpu_seconds(variant: Variant) -> float:
    """Return the CPU time of one step, or of one forward if it is for inference."""
    with torch.set_grad_enabled(variant.trains):
        start = time.process_time()
        result = variant.forward()
        if variant.trains:
            result.backward()
        took = time.process_time() - start
    variant.model.zero_grad()
    return took


def saved_bytes(variant: Variant) -> int | None:
    """Return what autograd keeps for the backward of one step; ``None`` for inference."""
    if not variant.trains:
        cpu_seconds(variant)
        return None
    count = count_step(variant.forward, [*variant.model.parameters(), *variant.model.buffers()])
    variant.model.zero_grad()
    return count.saved_bytes


def as_markdown(rows: Sequence[Row]) -> str:
    lines = [
        "| part | of | to | CPU time | lowest to highest | saved for backward |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        saved = "-"
        if row.saved is not None and row.saved_bytes is not None:
            saved = f"{row.saved:.2f} ({row.saved_bytes[0] / 1e6:,.1f} of {row.saved_bytes[1] / 1e6:,.1f} MB)"
        spread = f"{row.lowest:.2f} to {row.highest:.2f}"
        lines.append(f"| {row.part} | {row.of} | {row.to} | {row.time:.2f} | {spread} | {saved} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
