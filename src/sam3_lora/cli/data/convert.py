"""The verb ``data convert``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3_lora.cli import arguments

if TYPE_CHECKING:
    from sam3_lora.data.convert import Conversion

HELP: dict[str, Any] = {
    "help": "bring labels of other tools into the layout for training",
    "description": "Convert a labelled dataset to train/ and valid/, each with its images and _annotations.coco.json.",
    "epilog": """\
formats, which are recognised: COCO in any layout, YOLO, Labelme, VIA, CVAT, Pascal VOC, PNG masks, Hugging Face
datasets; as a folder, a zip archive such as Roboflow's, or one label file.

examples:
  sam3-lora data convert "My project.v1i.yolov8.zip" my_dataset
  sam3-lora data convert labelme_folder my_dataset --valid-share 0.1 --seed 1
  sam3-lora data convert scans my_dataset --from masks-instances --class-name cell""",
}


def add_options(parser: arguments.Parser) -> None:
    add = parser.add_argument
    add("src", type=Path, metavar="SRC", help="folder, zip archive or label file")
    add("dst", type=Path, metavar="DST", help="dataset to make: a new or empty folder")
    add(
        "--from",
        dest="source_format",
        metavar="FORMAT",
        help="format of the labels (default: it is recognised)",
    )
    add(
        "--valid-share",
        type=_share,
        default=0.2,
        metavar="X",
        help="share of the images for valid/, where the source has no such split (default: 0.2; 0: none)",
    )
    add("--seed", type=arguments.seed, default=0, metavar="N", help="seed of that share (default: 0)")
    add("--class-name", metavar="NAME", help="class of labels that have none")
    add(
        "--boxes",
        action="store_true",
        help="boxes stay without a mask, for training without masks (default: the mask is the rectangle)",
    )
    add("--copy", action="store_true", help="copy images, also where a hard link would do")
    add("--overwrite", action="store_true", help="replace a dataset that an earlier conversion made")
    add("--json", action="store_true", help="print what was made as JSON")
    parser.set_defaults(run=_convert)


def _share(text: str) -> float:
    return arguments.number(text, lambda value: 0 <= value < 1, "a share of 1, such as 0.2, or 0")


def _convert(args: argparse.Namespace) -> None:
    from sam3_lora.cli import tables
    from sam3_lora.cli.progress import count_on_stderr
    from sam3_lora.data.convert import convert_dataset

    with count_on_stderr("images") as show:
        made = convert_dataset(
            args.src,
            args.dst,
            source_format=args.source_format,
            valid_share=args.valid_share,
            seed=args.seed,
            class_name=args.class_name,
            boxes=args.boxes,
            copy=args.copy,
            overwrite=args.overwrite,
            on_progress=show,
        )
    if args.json:
        tables.print_json(_as_dict(made))
    else:
        _print(made)


def _as_dict(made: Conversion) -> dict[str, Any]:
    return {
        "folder": str(made.folder),
        "format": made.format,
        "evidence": made.evidence,
        "splits": {s: {"images": made.images[s], "objects": made.objects[s]} for s in made.images},
        "categories": list(made.categories),
        "notes": [
            {"kind": note.kind, "count": note.count, "examples": list(note.examples), "meaning": note.fix}
            for note in made.notes
        ],
    }


def _print(made: Conversion) -> None:
    from sam3_lora.cli import tables
    from sam3_lora.data.convert.report import printable

    for note in made.notes:
        print(f"note: {note}\n")
    counts = {s: f"{made.images[s]:,} images, {made.objects[s]:,} objects" for s in made.images}
    tables.print_facts(
        {
            "Format": f"{made.format} ({made.evidence})",
            **counts,
            "Classes": printable(", ".join(made.categories)),
            "Next": printable(f"sam3-lora data check {tables.short_path(made.folder)}"),
        }
    )
