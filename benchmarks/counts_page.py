"""From counted steps to the formulas of `sam3-lora estimate` and the page with the tables."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sam3_lora.base.checkpoint import FULL_SIZE
from sam3_lora.estimation.coefficients import features
from sam3_lora.output import write_json_atomic, write_text_atomic
from sam3_lora.presets import PRESETS
from sam3_lora.training.composition import shipped_config

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/reference/counts.md"
COEFFICIENTS = ROOT / "src/sam3_lora/estimation/coefficients.json"

_NEAR_THE_PEAK = 0.75  # phases that never come as close can be left out
_COMPARED = [(1, 5, 1), (4, 5, 1), (16, 5, 1), (1, 50, 1), (1, 5, 2)]

Counts = Sequence[Mapping[str, Any]]


def write_results(found: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the coefficients and the page."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for count in found["counts"]:
        groups.setdefault((count["preset"], count["setting"]), []).append(count)
    formulas: dict[str, dict[str, Any]] = {}
    for (preset, setting), counts in groups.items():
        if preset in PRESETS and len(counts) > len(features(1, 1, 1)):
            formulas.setdefault(preset, {})[setting] = fitted(counts)
    levers = {name: levers_of(settings[name]) for name in settings}
    document = {
        "made_by": "python benchmarks/count.py",
        "made_with": found["made_with"],
        "levers": levers,
        "formulas": formulas,
    }
    write_json_atomic(COEFFICIENTS, document)
    write_text_atomic(PAGE, page(found, groups, formulas))


def levers_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `memory` block of a setting, as the shipped configs have it otherwise."""
    return {**shipped_config(config).memory}


def fitted(counts: Counts) -> dict[str, Any]:
    """Return the formula of one preset and setting, by least squares of the relative error."""
    rows = np.array([features(c["prompts"], c["objects"], c["batch"]) for c in counts], dtype=float)
    peaks = np.array([c["peak_bytes"] for c in counts], dtype=float)
    phases = {}
    for part, direction in itertools.product(counts[0]["parts"], ("forward", "backward")):
        highest = np.array([c["parts"][part][f"highest_in_{direction}"] for c in counts], dtype=float)
        if (highest > _NEAR_THE_PEAK * peaks).any():
            phases[f"{part} {direction}"] = solve(rows, highest)
    found = np.max([rows @ weights for weights in phases.values()], axis=0)
    weights_bytes = counts[0]["parts"]["given"]["forward_bytes"] - batch_bytes(counts[0])
    return {
        "flops": solve(rows, np.array([c["flops"] for c in counts], dtype=float)),
        "phases": phases,
        "weights_bytes": weights_bytes,
        "gradient_bytes": counts[0]["gradient_bytes"],
        "trainable_parameters": counts[0]["trainable_parameters"],
        "worst_error": round(float(np.abs(found / peaks - 1).max()), 5),
        "counted": sorted([c["prompts"], c["objects"], c["batch"]] for c in counts),
    }


def batch_bytes(count: Mapping[str, Any]) -> int:
    """Return what images in fp32 and masks of one byte a pixel take."""
    pixels = FULL_SIZE.resolution**2
    return pixels * count["batch"] * (3 * 4 + count["objects"])


def solve(rows: Any, values: Any) -> list[float]:
    scale = 1 / np.maximum(values, 1)
    weights, *_ = np.linalg.lstsq(rows * scale[:, None], values * scale, rcond=None)
    return [round(float(weight)) for weight in weights]


def page(found: Mapping[str, Any], groups: Mapping[Any, Counts], formulas: Mapping[str, Any]) -> str:
    made = ", ".join(f"{name} {number}" for name, number in found["made_with"].items())
    by_key = {(c["preset"], c["setting"], c["prompts"], c["objects"], c["batch"]): c for c in found["counts"]}
    presets = [preset for preset in PRESETS if (preset, "shipped") in groups]
    return "\n".join(
        [
            _HEAD.format(made=made),
            "## Before and after\n",
            _compared(by_key),
            "\n## Every counted step, as the configs are shipped\n",
            _all_counted(by_key, presets),
            "\n## Where the work and the bytes are\n",
            _parts_table(by_key),
            "\n## What each lever does\n",
            _levers_table(by_key),
            "\n## How good the formulas are\n",
            _errors(formulas),
            _FOOT,
        ]
    )


_HEAD = """\
# Counted costs of a training step

One training step of the full-size model, forward, recomputation and backward, with the official losses and batch at 1008
pixels, bfloat16 autocast and masks. **Counted, not measured**: the step runs on tensors without memory (torch's
`FakeTensorMode`), every matrix product, convolution and attention is counted (2 FLOPs for a multiply-add), and every
tensor from when it is made to when it is freed. The numbers are the same on every machine.

```bash
OMP_NUM_THREADS=1 python -W ignore benchmarks/count.py
```

makes this page again, with `benchmarks/counts.json`, which holds all that was counted ({made}).
`--presets`, `--settings` and `--points P,N,B` count more of it, `--again` counts anew.

Not in the numbers: the optimizer (8 bytes for each trainable parameter), what CUDA takes for itself (about 0.8 GB), what
its allocator rounds up and what kernels take while they run. GB = 10^9 bytes. Objects are those of one image, spread
evenly over its prompts; each has one mask for the one-to-one loss and four for the one-to-many, the most that can match.
Nothing here was compared with a GPU yet.
"""

_FOOT = """
Each phase of a step (a part of the model, forward or backward) is fitted by itself with the number of images, prompts and
objects and their products; the peak is the highest phase. `tests/test_costs.py` counts points that are not in the fit.
"""


def _compared(by_key: Mapping[Any, Any]) -> str:
    rows = []
    order = [
        ("full fine-tuning", "official"),
        ("plain LoRA", "official"),
        *itertools.product(("balanced", "minimal", "full"), ("official", "shipped", "sampled")),
    ]
    words = {
        ("full fine-tuning", "official"): "full fine-tuning, official recipe",
        ("plain LoRA", "official"): "attention LoRA (r 8) by PEFT alone, official recipe",
    }
    described = {
        "official": "official recipe (all `memory` levers off)",
        "shipped": "as shipped",
        "sampled": "and mask loss at 12544 points",
    }
    for preset, setting in order:
        counts = [by_key.get((preset, setting, *point)) for point in _COMPARED]
        if not counts[0]:
            continue
        name = words.get((preset, setting), f"{preset}, {described[setting]}")
        peaks = [f"{c['peak_bytes'] / 1e9:.2f}" if c else "" for c in counts]
        first = counts[0]
        rows.append(
            [name, f"{first['trainable_parameters'] / 1e6:.2f} M", *peaks, f"{first['flops'] / 1e12:.2f}"]
        )
    header = [
        "trained",
        "parameters",
        *(f"P {p}, N {n}, B {b}" for p, n, b in _COMPARED),
        "TFLOP at P 1, N 5, B 1",
    ]
    return "Peak in GB, for P prompts and N objects in each of B images.\n\n" + _table(header, rows)


def _all_counted(by_key: Mapping[Any, Any], presets: Sequence[str]) -> str:
    points = sorted({key[2:] for key in by_key if key[1] == "shipped"}, key=lambda p: (p[2], p[0], p[1]))
    rows = []
    for point in points:
        cells = []
        for preset in presets:
            count = by_key.get((preset, "shipped", *point))
            cells.append(f"{count['peak_bytes'] / 1e9:.2f} / {count['flops'] / 1e12:.1f}" if count else "")
        rows.append([*map(str, point), *cells])
    return "GB / TFLOP.\n\n" + _table(["prompts", "objects", "images", *presets], rows)


def _parts_table(by_key: Mapping[Any, Any]) -> str:
    texts = []
    for setting, point in itertools.product(("official", "shipped"), ((1, 5, 1), (16, 5, 1))):
        count = by_key.get(("balanced", setting, *point))
        if not count:
            continue
        rows = [
            [
                part.replace("_", " ").replace("given", "weights and batch"),
                f"{values['flops'] / 1e12:.2f}",
                f"{values['forward_bytes'] / 1e9:.3f}",
                f"{values['peak_bytes'] / 1e9:.3f}",
            ]
            for part, values in count["parts"].items()
        ]
        rows.append(
            [
                "**all**",
                f"{count['flops'] / 1e12:.2f}",
                f"{count['forward_bytes'] / 1e9:.3f}",
                f"{count['peak_bytes'] / 1e9:.3f}",
            ]
        )
        kept = (
            f"Autograd keeps {count['saved_bytes'] / 1e9:.2f} GB for the backward; {count['launches']:,} operations "
            "start work."
        )
        title = (
            f"### balanced, {setting}, {point[0]} prompt{'s' if point[0] > 1 else ''}, 5 objects, 1 image\n"
        )
        texts.append(
            f"{title}\n"
            + _table(["part", "TFLOP", "GB it holds after the forward", "GB at the peak"], rows)
            + f"\n\n{kept}\n"
        )
    return "\n".join(texts)


def _levers_table(by_key: Mapping[Any, Any]) -> str:
    rows = []
    settings = sorted({key[1] for key in by_key if key[1].startswith("without")})
    for preset, setting in itertools.product(("minimal", "balanced"), ("shipped", *settings, "sampled")):
        counts = [by_key.get((preset, setting, *point)) for point in _COMPARED]
        if any(counts):
            cells = [f"{c['peak_bytes'] / 1e9:.2f} / {c['flops'] / 1e12:.1f}" if c else "" for c in counts]
            rows.append([preset, setting.replace("_", "\\_"), *cells])
    header = ["preset", "setting", *(f"P {p}, N {n}, B {b}" for p, n, b in _COMPARED)]
    return "GB / TFLOP with one lever of the `memory` block off and all others on.\n\n" + _table(header, rows)


def _errors(formulas: Mapping[str, Any]) -> str:
    rows = [
        [preset, setting, str(len(values["counted"])), f"{values['worst_error']:.2%}"]
        for preset, by_setting in formulas.items()
        for setting, values in by_setting.items()
    ]
    return _table(["preset", "setting", "counted steps", "largest difference of the peak"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
