"""Measure the check of a large COCO file, and its index against the official loader, in one run.

    python benchmarks/data.py                      # 100,000 images, 700,000 annotations: about five minutes, 3 GB
    python benchmarks/data.py --images 10000

Each thing runs in a process of its own. CPU seconds do not depend on what else the machine does; memory is the peak of the
resident set, and for an opened loader what is private to its process (``/proc/self/smaps_rollup``).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ANNOTATIONS_PER_IMAGE = 7
POINTS = 26
SIZE = (1920, 1080)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(MEASURES[args.measure](args.folder)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "dataset"
        file = write_dataset(folder / "train", args.images)
        print(
            f"{args.images:,} images, {args.images * ANNOTATIONS_PER_IMAGE:,} annotations, {file.stat().st_size / 1e6:.0f} MB"
        )
        results = {name: measure(name, folder, scratch) for name in MEASURES}
    for name, result in results.items():
        print(f"{name:<16}" + "  ".join(f"{key} {value:,.3f}" for key, value in result.items()))
    ours, official = results["index_opened"], results["official_opened"]
    for key in ours:
        print(f"official / index, {key}: {official[key] / max(ours[key], 1e-3):,.0f}")


def write_dataset(folder: Path, images: int) -> Path:
    """Write an annotation file like those of large exports, without image files."""
    draw = random.Random(0)
    folder.mkdir(parents=True)
    path = folder / "_annotations.coco.json"
    with path.open("w") as file:
        entries = (
            {"id": n, "file_name": f"image{n:06d}.jpg", "width": SIZE[0], "height": SIZE[1]}
            for n in range(images)
        )
        file.write('{"images": [' + ", ".join(map(json.dumps, entries)) + '], "annotations": [')
        for number in range(images * ANNOTATIONS_PER_IMAGE):
            entry = annotation(number, draw)
            file.write(", " * bool(number) + json.dumps(entry))
        names = "red car,bicycle,traffic light,dog,cat,tree,bench,lamp,door,window".split(",")
        categories = [{"id": n, "name": name} for n, name in enumerate(names)]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    return path


def annotation(number: int, draw: random.Random) -> dict[str, object]:
    """Return a star-shaped polygon of 26 points with its box."""
    x, y, radius = draw.uniform(150, 1700), draw.uniform(150, 900), draw.uniform(20, 100)
    polygon = []
    for point in range(POINTS):
        angle, far = 2 * math.pi * point / POINTS, radius * (0.8 + 0.2 * draw.random())
        polygon += [round(x + far * math.cos(angle), 2), round(y + far * math.sin(angle), 2)]
    xs, ys = polygon[0::2], polygon[1::2]
    box = [min(xs), min(ys), round(max(xs) - min(xs), 2), round(max(ys) - min(ys), 2)]
    return {
        "id": number,
        "image_id": number // ANNOTATIONS_PER_IMAGE,
        "category_id": draw.randrange(10),
        "bbox": box,
        "area": round(0.7 * box[2] * box[3], 2),
        "iscrowd": 0,
        "segmentation": [polygon],
    }


def measure(name: str, folder: Path, scratch: str) -> dict[str, float]:
    """Return what a process of its own measures."""
    command = [sys.executable, __file__, "--measure", name, "--folder", str(folder)]
    done = subprocess.run(
        command, env=os.environ | {"SAM3_LORA_CACHE": scratch}, stdout=subprocess.PIPE, check=True, text=True
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def check(folder: Path) -> dict[str, float]:
    from sam3_lora.data.check import examine_dataset

    start = time.process_time()
    report = examine_dataset(folder, ["train"], images="none")
    assert report.ok, report.problems
    return {"CPU seconds": time.process_time() - start, "peak GB": peak_gb()}


def index_built(folder: Path) -> dict[str, float]:
    from sam3_lora.data.index import open_index

    start = time.process_time()
    open_index(folder / "train/_annotations.coco.json")
    return {"CPU seconds": time.process_time() - start, "peak GB": peak_gb()}


def index_opened(folder: Path) -> dict[str, float]:
    from sam3_lora.training import IndexedCoco

    return opened(IndexedCoco, folder)


def official_opened(folder: Path) -> dict[str, float]:
    from sam3_lora.training import IndexedCoco  # imports the same, and what sam3 needs without CUDA

    return opened(IndexedCoco.__mro__[1], folder)


def opened(loader: type, folder: Path) -> dict[str, float]:
    """Return what a loader costs a process that opens it and reads each hundredth image."""
    before, start = private_mb(), time.process_time()
    data = loader(str(folder / "train/_annotations.coco.json"))
    seconds, memory = time.process_time() - start, private_mb() - before
    for number in data.getDatapointIds()[::100]:
        data.loadQueriesAndAnnotationsFromDatapoint(number)
    return {
        "CPU seconds": seconds,
        "private MB": memory,
        "private MB after 1 % of the images": private_mb() - before,
    }


def private_mb() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


MEASURES = {
    "check": check,
    "index_built": index_built,
    "index_opened": index_opened,
    "official_opened": official_opened,
}

if __name__ == "__main__":
    main()
