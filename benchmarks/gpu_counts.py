"""Count the peak bytes of cases of gpu.py, without a GPU: a process of its own, because sam3 asks whether there is one.

It reads the cases as JSON from standard input, and prints the bytes of each on a line of its own as soon as they are
known, 10 to 20 s each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

_BYTES_OF_ADAM = 8  # of each trained parameter, its two averages in fp32


def counted_peaks(cases: Sequence[Mapping[str, Any]], seconds: float) -> list[int | None]:
    """Return the peak bytes of each case, ``None`` from where the time was over.

    Args:
        cases: With ``preset``, ``config`` (keys of ``common.yaml`` by dotted name), ``prompts``, ``objects`` and
            ``images``; one after the other if they have the first two in common.
        seconds: When to stop.
    """
    command = [sys.executable, "-W", "ignore", __file__]
    without_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    try:
        run = subprocess.run(
            command,
            input=json.dumps(cases).encode(),
            stdout=subprocess.PIPE,
            env=without_gpu,
            timeout=seconds,
            check=True,
        )
        printed = run.stdout
    except subprocess.TimeoutExpired as late:
        printed = late.stdout or b""
    whole_lines = printed.decode().split("\n")[:-1]
    found = [int(line) for line in whole_lines]
    return [*found, *[None] * (len(cases) - len(found))]


def main() -> None:
    from sam3_lora.costs.step import FullSizeStep

    built, step = None, None
    for case in json.load(sys.stdin):
        if step is None or built != (case["preset"], case["config"]):
            built = (case["preset"], case["config"])
            step = FullSizeStep(case["preset"], config=case["config"])
        count = step.count(case["prompts"], case["objects"], case["images"])
        print(count.peak_bytes + _BYTES_OF_ADAM * step.trainable_parameters(), flush=True)


if __name__ == "__main__":
    main()
