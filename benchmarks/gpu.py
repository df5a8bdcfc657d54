"""Peak memory and time of training steps on a GPU, beside the estimate; what bfloat16 changes. No downloads.

python -W ignore benchmarks/gpu.py --output gpu.json

The full-size model gets random weights: they take the same memory and time as Meta's. The most informative cases come
first, and what does not fit into the time or the memory is listed as such. --device cpu --size tiny runs the same code
in about a minute anywhere. Results: docs/reference/gpu.md
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpu_step import NO_TIME, SIZES, Cost, Training, attempt, set_cuda_as_the_trainer

from sam3_lora.errors import ConfigError
from sam3_lora.estimation.estimate import estimate
from sam3_lora.memory import MemorySettings
from sam3_lora.output import write_json_atomic

PRESETS, PROMPTS, OBJECTS = ("balanced", "minimal", "full"), (1, 4, 16), 5

SHIPPED, OFFICIAL, POINTS = "as shipped", "all off", "12544 mask_points"

#: Every lever of the ``memory`` block, switched off.
OFF: dict[str, Any] = {f"memory.{field.name}": field.default for field in fields(MemorySettings)}
_SHIPPED = {"memory.bf16_base": True}  # on CUDA the same as the auto of the config; so it runs on a CPU too
#: Name of a setting of that block -> the keys that make it.
LEVERS: dict[str, dict[str, Any]] = {
    SHIPPED: _SHIPPED,
    OFFICIAL: OFF,
    POINTS: {**_SHIPPED, "memory.mask_points": 12544},
    **{f"no {key.partition('.')[2]}": {**_SHIPPED, key: OFF[key]} for key in OFF if "points" not in key},
}


@dataclass(frozen=True)
class Case:
    preset: str
    levers: str = SHIPPED
    prompts: int = 1
    objects: int = OBJECTS
    images: int = 1


def main(arguments: Sequence[str] | None = None) -> None:
    given = _parsed(arguments)
    deadline = time.monotonic() + 60 * given.minutes
    device = torch.device(given.device)
    set_cuda_as_the_trainer()
    chosen = [c for c in cases() if c.preset in given.presets and c.prompts in given.prompts]
    costs = measure(chosen, given.size, device, given.steps, deadline)
    drift = None
    if time.monotonic() < deadline:
        drift = measure_drift(given.size, given.presets[0], device)
    result = {
        **machine(device),
        "size": given.size,
        "cases": [
            {**asdict(case), **asdict(cost), "estimated_bytes": estimated_peak(case, given.size)}
            for case, cost in costs.items()
        ],
        "drift": drift,
    }
    print(as_markdown(result))
    if given.output:
        write_json_atomic(given.output, result)


def cases() -> list[Case]:
    """Return all cases, the most informative first, and those of one model next to each other."""
    shipped = [Case(preset, prompts=prompts) for preset, prompts in product(PRESETS, PROMPTS)]
    first = Case(PRESETS[0])
    shipped[3:3] = [replace(first, objects=50), replace(first, images=2), replace(first, images=4)]
    official = [Case(preset, OFFICIAL, prompts=prompts) for preset, prompts in product(PRESETS, PROMPTS)]
    single = [Case(PRESETS[0], name, prompts=4) for name in LEVERS if name not in (SHIPPED, OFFICIAL)]
    return shipped + official + single


def measure(
    chosen: Sequence[Case], size: str, device: torch.device, steps: int, deadline: float
) -> dict[Case, Cost]:
    """Return what the steps of each case take, or why it is not known."""
    costs: dict[Case, Cost] = {}
    bench = Bench(size, device, steps)
    for number, case in enumerate(chosen, 1):
        late = time.monotonic() > deadline
        costs[case] = Cost(NO_TIME) if late else attempt(functools.partial(bench.cost, case))
        print(f"{number}/{len(chosen)} {case}: {costs[case].outcome}", file=sys.stderr, flush=True)
    return costs


class Bench:
    """Measures cases, and keeps the model of the last one for the next."""

    def __init__(self, size: str, device: torch.device, steps: int) -> None:
        self._size, self._device, self._steps = size, device, steps
        self._built: tuple[str, str] | None = None
        self._training: Training | None = None

    def cost(self, case: Case) -> Cost:
        training = self._training_for(case)
        return training.cost(training.batch(case.images, case.prompts, case.objects), self._steps)

    def _training_for(self, case: Case) -> Training:
        wanted = (case.preset, case.levers)
        if self._training is None or self._built != wanted:
            self._training = None  # before the next is made: two models at once would be in the peak
            self._training = Training(self._size, case.preset, LEVERS[case.levers], self._device)
            self._built = wanted
        return self._training


def estimated_peak(case: Case, size: str) -> int | None:
    """Return the peak that `sam3-lora estimate` gives; there is none for the tiny model and for settings not counted."""
    if size != "full":
        return None
    memory = {key.removeprefix("memory."): value for key, value in LEVERS[case.levers].items()}
    try:
        found = estimate(
            case.preset, prompts=case.prompts, objects=case.objects, batch=case.images, memory=memory
        )
    except ConfigError:
        return None
    return found.peak_bytes


def measure_drift(size: str, preset: str, device: torch.device) -> dict[str, Any]:
    """Return how far bfloat16 moves the outputs, and which frozen weights training steps change: none, or it is wrong.

    The distance of an output is its largest difference to float32, relative to the largest value.
    """
    exact = Training(size, preset, {}, device, amp=False)
    batch = exact.batch(1, 1, OBJECTS)
    expected = exact.outputs(batch)
    distances = {}
    del exact  # each model must be gone before the next is made
    for name in ("no bf16_base", SHIPPED):
        training = Training(size, preset, LEVERS[name], device)
        found = training.outputs(batch)
        distances[name] = {
            output: ((found[output] - value).abs().max() / value.abs().max()).item()
            for output, value in expected.items()
        }
        before = training.frozen()
        for _ in range(3):
            training.step(batch)
        after = training.frozen()
        del training
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    return {
        "preset": preset,
        "outputs": distances,
        "frozen_tensors": len(before),
        "bf16_tensors": sum(tensor.dtype == torch.bfloat16 for tensor in before.values()),
        "frozen_tensors_changed": changed,
    }


def machine(device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "device_bytes": torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
        "versions": {name: version(name) for name in ("sam3", "torch", "peft")}
        | ({"cuda": torch.version.cuda} if on_gpu else {}),
    }


def as_markdown(result: Mapping[str, Any]) -> str:
    lines = [
        f"{result['device']}, {result['size']} size, {', '.join(f'{k} {v}' for k, v in result['versions'].items())}",
        "",
        "| preset | memory | prompts | objects | images | peak | estimate | reserved | a step |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in result["cases"]:
        told: list[Any] = [case[key] for key in ("preset", "levers", "prompts", "objects", "images")]
        if case["seconds"] is None:
            told += [case["outcome"], _gigabytes(case["estimated_bytes"]), "", ""]
        else:
            told += [_gigabytes(case[f"{kind}_bytes"]) for kind in ("peak", "estimated", "reserved")]
            told += [f"{case['seconds'] * 1e3:,.0f} ms"]
        lines.append(f"| {' | '.join(map(str, told))} |")
    if drift := result["drift"]:
        for levers, outputs in drift["outputs"].items():
            distances = ", ".join(f"{name} {value:.1e}" for name, value in outputs.items())
            lines += ["", f"bfloat16 against float32, {drift['preset']}, {levers}: {distances}."]
        changed = len(drift["frozen_tensors_changed"])
        lines += ["", f"Three steps changed {changed} of {drift['frozen_tensors']} frozen tensors."]
    return "\n".join(lines)


def _gigabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e9:.2f} GB"


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", help="default cuda")
    parser.add_argument("--size", choices=SIZES, default="full", help="default full")
    parser.add_argument("--minutes", type=float, default=10, help="no case begins after them; default 10")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a case, at most; default 10")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS), help="default: all")
    parser.add_argument("--prompts", nargs="+", type=int, choices=PROMPTS, default=list(PROMPTS))
    parser.add_argument("--output", type=Path, help="also write the numbers to this JSON file")
    given = parser.parse_args(arguments)
    if torch.device(given.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA here; --device cpu --size tiny runs the same code on a CPU")
    return given


if __name__ == "__main__":
    main()
