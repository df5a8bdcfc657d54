"""A sheet of images: one row an image, one column a model, for the demo, reports and predictions."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from sam3_lora.visualization.drawing import (
    INK,
    PAPER,
    Colour,
    Instance,
    draw_instances,
    font_of_size,
    label_colours,
    shorten,
)

GROUND_TRUTH = "ground truth"
COLUMNS = ("image", GROUND_TRUTH, "base", "adapter")

_FAINT_INK = (110, 113, 120)
_RULE = (222, 224, 228)
_CELL = 320
_MARGIN = 28
_GAP = 14
_TEXT_SIZE = 15
_HEADER_SIZE = 18


@dataclass(frozen=True)
class SheetRow:
    """One image of a sheet: what was asked of it, and the objects of each column. A column without an entry shows
    the bare image."""

    image: Image.Image
    name: str
    prompts: Sequence[str]
    objects: Mapping[str, Sequence[Instance]] = field(default_factory=dict)


def comparison_sheet(
    rows: Sequence[SheetRow], columns: Sequence[str] = COLUMNS, alpha: float = 0.5
) -> Image.Image:
    """Lay images out as a grid: a legend, a header with the columns, and for each image its prompts and its cells.

    Args:
        rows: At least one. A prompt or category has one colour in all of them.
        columns: Headings, left to right; each names an entry of ``SheetRow.objects`` or stands for the bare image.
        alpha: Opacity of the masks.

    Raises:
        ValueError: If there is no row.
    """
    if not rows:
        raise ValueError("comparison_sheet needs at least one row")
    categories = _categories(rows)
    colours = label_colours(categories)
    width = 2 * _MARGIN + len(columns) * _CELL + (len(columns) - 1) * _GAP
    parts = [
        _legend(categories, colours, width),
        _header(columns, width),
        *(_row(row, columns, colours, alpha, width) for row in rows),
    ]
    sheet = Image.new("RGB", (width, sum(part.height for part in parts) + 2 * _MARGIN), PAPER)
    top = _MARGIN
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def rows_from_results(
    annotation_file: Path,
    images: Path,
    results_by_column: Mapping[str, Iterable[Mapping[str, Any]]],
    image_ids: Sequence[int] | None = None,
    threshold: float = 0.5,
) -> list[SheetRow]:
    """Turn COCO ground truth and COCO results into the rows of a comparison sheet.

    Args:
        annotation_file: COCO JSON; its objects become the column "ground truth".
        images: Folder that its file names are relative to.
        results_by_column: For each column the results of one model: ``bbox`` in xywh, ``segmentation`` optional.
        image_ids: Which images, in order; by default the six of :func:`choose_images`.
        threshold: Results that score less are left out.
    """
    document = json.loads(annotation_file.read_text(encoding="utf-8"))
    names = {category["id"]: category["name"] for category in document["categories"]}
    entries = {image["id"]: image for image in document["images"]}
    shown = set(choose_images(document) if image_ids is None else image_ids)
    by_column: dict[str, dict[int, list[Instance]]] = {GROUND_TRUTH: defaultdict(list)}
    for annotation in document["annotations"]:
        if annotation["image_id"] in shown:
            by_column[GROUND_TRUTH][annotation["image_id"]].append(_instance(annotation, names))
    for column, results in results_by_column.items():
        by_column[column] = defaultdict(list)
        for result in results:
            if result["image_id"] in shown and result["score"] >= threshold:
                by_column[column][result["image_id"]].append(_instance(result, names))
    rows = []
    for image_id in choose_images(document) if image_ids is None else image_ids:
        with Image.open(images / entries[image_id]["file_name"]) as file:
            image = file.convert("RGB")
        objects = {column: by_column[column][image_id] for column in by_column}
        rows.append(SheetRow(image, entries[image_id]["file_name"], list(names.values()), objects))
    return rows


def choose_images(document: Mapping[str, Any], count: int = 6) -> list[int]:
    """Return the ids of images that together show many objects of all categories, most telling first.

    Each next image is the one with the most objects, an object counting less the more of its category are shown.
    """
    objects: dict[int, Counter[int]] = {image["id"]: Counter() for image in document["images"]}
    for annotation in document["annotations"]:
        objects[annotation["image_id"]][annotation["category_id"]] += 1
    shown: Counter[int] = Counter()
    chosen: list[int] = []

    def worth(image_id: int) -> float:
        return sum(number / (1 + shown[category]) for category, number in objects[image_id].items())

    while len(chosen) < min(count, len(objects)):
        best = max((image_id for image_id in objects if image_id not in chosen), key=worth)
        chosen.append(best)
        shown.update(objects[best])
    return chosen


def _instance(entry: Mapping[str, Any], names: Mapping[int, str]) -> Instance:
    x, y, width, height = entry["bbox"]
    return Instance(
        names[entry["category_id"]],
        (x, y, x + width, y + height),
        entry.get("segmentation"),
        entry.get("score"),
    )


def _categories(rows: Sequence[SheetRow]) -> list[str]:
    asked = (prompt for row in rows for prompt in row.prompts)
    drawn = (item.category for row in rows for objects in row.objects.values() for item in objects)
    return list(dict.fromkeys([*asked, *drawn]))


def _legend(categories: Sequence[str], colours: Mapping[str, Colour], width: int) -> Image.Image:
    """A swatch and a name for each category, in as many lines as they need."""
    font, swatch, line_height = font_of_size(_TEXT_SIZE), 16, 28
    places: list[tuple[int, int, str]] = []
    x, line = _MARGIN, 0
    for category in categories:
        text = shorten(category, font, width - 2 * _MARGIN - swatch - 8)
        needed = swatch + 8 + round(font.getlength(text)) + 24
        if x > _MARGIN and x + needed - 24 > width - _MARGIN:
            x, line = _MARGIN, line + 1
        places.append((x, line, text))
        x += needed
    strip = Image.new("RGB", (width, (line + 1) * line_height + 8), PAPER)
    pen = ImageDraw.Draw(strip)
    for category, (x, line, text) in zip(categories, places, strict=True):
        middle = line * line_height + line_height // 2
        pen.rounded_rectangle(
            (x, middle - swatch // 2, x + swatch, middle + swatch // 2), 4, fill=colours[category]
        )
        pen.text((x + swatch + 8, middle), text, fill=INK, font=font, anchor="lm")
    return strip


def _header(columns: Sequence[str], width: int) -> Image.Image:
    strip = Image.new("RGB", (width, 44), PAPER)
    pen, font = ImageDraw.Draw(strip), font_of_size(_HEADER_SIZE)
    for index, column in enumerate(columns):
        pen.text((_column_x(index), 20), shorten(column, font, _CELL), fill=INK, font=font, anchor="lm")
    return strip


def _row(
    row: SheetRow, columns: Sequence[str], colours: Mapping[str, Colour], alpha: float, width: int
) -> Image.Image:
    """A rule, the name and the prompts of the image, its cells, and under each cell the number of its objects."""
    cells = [
        draw_instances(row.image, row.objects.get(column, ()), alpha, colours, _CELL) for column in columns
    ]
    cell_height, caption_height, note_height = cells[0].height, 36, 34
    strip = Image.new("RGB", (width, caption_height + cell_height + note_height), PAPER)
    pen, font = ImageDraw.Draw(strip), font_of_size(_TEXT_SIZE)
    pen.line((_MARGIN, 0, width - _MARGIN, 0), fill=_RULE)
    caption = shorten(f"{row.name}  ·  asked for {', '.join(row.prompts)}", font, width - 2 * _MARGIN)
    pen.text((_MARGIN, caption_height // 2), caption, fill=_FAINT_INK, font=font, anchor="lm")
    for index, (column, cell) in enumerate(zip(columns, cells, strict=True)):
        x = _column_x(index)
        strip.paste(cell, (x, caption_height))
        note = (
            _count(row.objects[column])
            if column in row.objects
            else f"{row.image.width} x {row.image.height} px"
        )
        pen.text((x, caption_height + cell_height + 14), note, fill=_FAINT_INK, font=font, anchor="lm")
    return strip


def _column_x(index: int) -> int:
    return _MARGIN + index * (_CELL + _GAP)


def _count(objects: Sequence[Instance]) -> str:
    return {0: "nothing found", 1: "1 object"}.get(len(objects), f"{len(objects)} objects")
