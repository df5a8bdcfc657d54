"""What several adapters on one full-size base cost: switches against a reload, and memory. Needs 5 GB of memory.

OMP_NUM_THREADS=1 python -W ignore benchmarks/adapters.py
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import torch

import sam3_lora
from sam3_lora.adapter import WEIGHTS_FILE

T = TypeVar("T")

COUNT = 50
SWITCHES = 1000
NAMES = ("first", "second")


def main() -> None:
    build, model = timed(lambda: sam3_lora.load_base("random", device="cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = full_adapter(model, Path(scratch) / "adapter")
        for name in NAMES:
            load, _ = timed(lambda name=name: sam3_lora.load_adapter(model, folder, name))  # type: ignore[misc]
            print(f"load of {name}: {load:.2f} s")
        print_switches(model, reload=build + load)
        print_swap(model, folder, reload=build + load)
        print_memory(model, folder)
        print_switches(model, reload=build + load)


def full_adapter(model: torch.nn.Module, folder: Path) -> Path:
    """Save an adapter of the full preset with random weights, and leave the model without it."""
    adapted = sam3_lora.get_peft_sam3(model, "full", init_lora_weights=False)
    sam3_lora.save_adapter(adapted, folder)
    sam3_lora.unload(adapted)
    return folder


def print_switches(model: torch.nn.Module, reload: float) -> None:
    """Print the median time of a switch and its share of a reload of base and adapter."""
    before = resident_bytes()
    times = [
        timed(lambda n=n: sam3_lora.set_adapter(model, NAMES[n % 2]))[0]  # type: ignore[misc]
        for n in range(SWITCHES)
    ]
    switch = statistics.median(times)
    print(
        f"switch, {len(sam3_lora.adapter_names(model))} adapters: {switch * 1e3:.1f} ms, at most {max(times) * 1e3:.1f}; "
        f"a reload takes {reload:.1f} s, {reload / switch:,.0f} times as long; "
        f"{SWITCHES} switches: {(resident_bytes() - before) / 1e6:+.1f} MB"
    )


def print_swap(model: torch.nn.Module, folder: Path, reload: float) -> None:
    """Print the time of a hot swap, with all of its checks."""
    swap, _ = timed(lambda: sam3_lora.hotswap_adapter(model, folder, NAMES[0]))
    print(f"hot swap from a folder: {swap:.2f} s, {swap / reload:.1%} of a reload")


def print_memory(model: torch.nn.Module, folder: Path) -> None:
    """Print how memory grows up to 50 adapters, as a ratio to their own bytes."""
    before, there = resident_bytes(), len(sam3_lora.adapter_names(model))
    for number in range(there, COUNT):
        sam3_lora.load_adapter(model, folder, f"number{number}")
    own = (COUNT - there) * (folder / WEIGHTS_FILE).stat().st_size
    grown = resident_bytes() - before
    print(
        f"{COUNT} adapters: memory grew by {grown / 1e6:,.0f} MB for {own / 1e6:,.0f} MB of files, {grown / own:.3f} times"
    )


def resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def timed(action: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
