"""The verb ``predict``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3_lora.cli import arguments

if TYPE_CHECKING:
    from sam3_lora.cli.progress import ShowCount
    from sam3_lora.inference import Prediction, Predictor

HELP: dict[str, Any] = {
    "help": "find what prompts name in images",
    "description": "Find what prompts name in images; draw it, and write it as COCO results.",
    "epilog": """\
examples:
  sam3-lora predict photo.jpg --prompt "red circle" --output runs/found --adapter runs/first/adapters/best
  sam3-lora predict photos "more/**/*.png" --prompt cat --prompt dog --output runs/found --threshold 0.3
  sam3-lora predict photo.jpg --prompt visual --box 40,60,180,220 --output runs/found --base facebook/sam3

--output gets a picture for each image, predictions.json (COCO results) and images.json (their images and categories).
Images that cannot be used are left out and listed at the end; the exit code is 1 then.""",
}

PREDICTIONS_FILE = "predictions.json"
IMAGES_FILE = "images.json"


@dataclass
class _Found:
    """What has been found so far, as it goes into the files and onto the screen."""

    images: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, list[float]]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


def add_options(parser: arguments.Parser) -> None:
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="a file, a folder, or a pattern in quotes")
    add(
        "--prompt",
        type=arguments.prompt,
        action="append",
        required=True,
        metavar="WORDS",
        help="what to find, such as 'red circle'; may be repeated",
    )
    add(
        "--box",
        type=arguments.box_xyxy,
        action="append",
        metavar="X0,Y0,X1,Y1",
        help="an example of what to find, in pixels of every image; may be repeated",
    )
    add("--adapter", type=Path, metavar="DIR", help="adapter folder (default: none, the base alone)")
    add(
        "--base",
        help="facebook/sam3, tiny or the path of a sam3.pt (default: the one that the adapter was made for; "
        "without an adapter facebook/sam3)",
    )
    add(
        "--threshold",
        type=arguments.share,
        metavar="X",
        help="leave out objects that score this or less, 0 to 1 (default: the best on the adapter's validation images, as "
        "it records it for its own prompts; else 0.5)",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the results: new, or empty")
    add("--overwrite", action="store_true", help="replace an earlier result in --output")
    add("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_predict)


def _predict(args: argparse.Namespace) -> None:
    from sam3_lora.cli.image_paths import find_images
    from sam3_lora.cli.progress import count_on_stderr
    from sam3_lora.errors import DataError
    from sam3_lora.output import check_output, claim_output

    paths = find_images(args.images)
    prompts = list(dict.fromkeys(args.prompt))
    _refuse_to_delete(args.output, [*paths, *filter(None, [args.adapter, args.base and Path(args.base)])])
    check_output(args.output, made_by="predict", overwrite=args.overwrite)
    with count_on_stderr("images") as show:
        predictor = _predictor(args)
        claim_output(args.output, made_by="predict", overwrite=args.overwrite)
        found = _predict_all(predictor, paths, prompts, args.box, args.output, show)
    _write_files(found, prompts, args.output)
    _print_result(found, args.output, as_json=args.json)
    if found.failures:
        heading = f"{len(found.failures)} of {len(paths)} images could not be used:"
        raise DataError("\n  ".join([heading, *found.failures.values()]))


def _refuse_to_delete(output: Path, inputs: Sequence[Path]) -> None:
    """Raise if a file that is read lies in the output folder, which may be emptied."""
    from sam3_lora.errors import OutputError

    for path in inputs:
        if path.exists() and path.resolve().is_relative_to(output.resolve()) and output.is_dir():
            raise OutputError(f"{path} lies in the output folder {output}; choose another output folder")


def _predictor(args: argparse.Namespace) -> Predictor:
    from sam3_lora.base.checkpoint import DEFAULT
    from sam3_lora.base.loading import load_base
    from sam3_lora.inference import Predictor

    if args.adapter is None:
        return Predictor(load_base(args.base or DEFAULT), threshold=args.threshold)
    return Predictor.from_adapter(args.adapter, args.base, threshold=args.threshold)


def _predict_all(
    predictor: Predictor,
    paths: Sequence[Path],
    prompts: Sequence[str],
    boxes_xyxy: Sequence[tuple[float, ...]] | None,
    output: Path,
    show: ShowCount,
) -> _Found:
    from sam3_lora.cli.image_paths import unique_stems
    from sam3_lora.data.image_files import read_image
    from sam3_lora.errors import ConfigError, DataError

    found = _Found()
    for number, (path, stem) in enumerate(zip(paths, unique_stems(paths), strict=True), 1):
        try:
            image = read_image(path)
            predictions = predictor.predict(image, prompts, boxes_xyxy)
        except DataError as error:
            found.failures[str(path)] = str(error)
        except ConfigError as error:  # a box that leaves this image
            found.failures[str(path)] = f"{path}: {error}"
        else:
            overlay = f"{stem}.png"
            with _writing_to(output):
                _draw(image, predictions).save(output / overlay)
            _add(found, number, path, image.size, overlay, predictions)
        show(number, len(paths))
    return found


def _draw(image: Any, predictions: Sequence[Prediction]) -> Any:
    from sam3_lora.visualization import draw_objects, label_colours

    return draw_objects(
        image,
        masks=[mask for prediction in predictions for mask in prediction.masks],
        boxes_xyxy=[box for prediction in predictions for box in prediction.boxes_xyxy],
        labels=[prediction.prompt for prediction in predictions for _ in prediction.scores],
        scores=[float(score) for prediction in predictions for score in prediction.scores],
        colours=label_colours(prediction.prompt for prediction in predictions),  # the same in every picture
    )


def _add(
    found: _Found,
    image_id: int,
    path: Path,
    size: tuple[int, int],
    overlay: str,
    predictions: Sequence[Prediction],
) -> None:
    width, height = size
    found.images.append(
        {"id": image_id, "file_name": str(path), "width": width, "height": height, "overlay": overlay}
    )
    found.scores.append({prediction.prompt: prediction.scores.tolist() for prediction in predictions})
    for category_id, prediction in enumerate(predictions, 1):
        found.results += prediction.as_coco_results(image_id, category_id)


def _write_files(found: _Found, prompts: Sequence[str], output: Path) -> None:
    from sam3_lora.output import write_json_atomic

    document = {
        "info": {"description": f"What {PREDICTIONS_FILE} refers to"},
        "images": found.images,
        "annotations": [],  # pycocotools asks for the key
        "categories": [{"id": number, "name": prompt} for number, prompt in enumerate(prompts, 1)],
    }
    with _writing_to(output):
        write_json_atomic(output / IMAGES_FILE, document)
        write_json_atomic(output / PREDICTIONS_FILE, found.results)


@contextmanager
def _writing_to(output: Path) -> Iterator[None]:
    from sam3_lora.errors import OutputError

    try:
        yield
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror or error}") from error


def _print_result(found: _Found, output: Path, as_json: bool) -> None:
    from sam3_lora.cli import tables

    if as_json:
        tables.print_json(
            {
                "output": str(output),
                "images": [
                    {**image, "scores": scores}
                    for image, scores in zip(found.images, found.scores, strict=True)
                ],
                "failed": [
                    {"file_name": name, "problem": problem} for name, problem in found.failures.items()
                ],
            }
        )
        return
    rows = [
        [
            tables.short_path(Path(image["file_name"])),
            "\n".join(scores),
            "\n".join(str(len(values)) for values in scores.values()),
            "\n".join(f"{values[0]:.2f}" if values else "" for values in scores.values()),
        ]
        for image, scores in zip(found.images, found.scores, strict=True)
    ]
    if rows:
        tables.print_table("Found", ["image", "prompt", "objects", "best score"], rows)
    files = [tables.short_path(output / name) for name in (PREDICTIONS_FILE, IMAGES_FILE)]
    pictures = f"{tables.short_path(output)}/*.png"
    tables.print_facts({"Pictures": pictures if rows else "none", "Results": "\n".join(files)})
