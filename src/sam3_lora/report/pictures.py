"""The best, median and worst images of a split, and their pictures in a file that may not grow without end."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam3_lora.evaluation.images import image_ious
from sam3_lora.visualization import GROUND_TRUTH, SheetRow, rows_from_results
from sam3_lora.visualization.drawing import Colour, draw_instances

GROUPS = ("best", "median", "worst")

_PICTURE_BYTES = 1_300_000  # of all together; base64 makes 1.73 MB of it
_SIZES = ((448, 88), (448, 80), (384, 75), (320, 68), (240, 60), (160, 45))  # side in pixels, JPEG quality
_ALPHA = 0.5


@dataclass(frozen=True)
class Picture:
    """One image with the objects of each column, and for each column of predictions its mean IoU on this image."""

    row: SheetRow
    ious: Mapping[str, float]


def choose_pictures(
    annotation_file: Path,
    images: Path,
    predictions: Mapping[str, Sequence[Mapping[str, Any]]],
    count: int = 3,
    threshold: float = 0.5,
) -> dict[str, list[Picture]]:
    """Return the best, median and worst images by what the last column of predictions found on them.

    Images are ranked by :func:`sam3_lora.evaluation.images.image_ious`; those without objects are left out, and no
    image is in two groups. Best and worst begin with the most extreme one.

    Args:
        annotation_file: COCO JSON.
        images: Folder that its file names are relative to.
        predictions: Column -> COCO results, such as ``{"base": [...], "adapter": [...]}``.
        count: Images in a group; fewer where there are less than three times as many.
        threshold: Predictions that score less are neither ranked nor drawn.
    """
    document = json.loads(annotation_file.read_text(encoding="utf-8"))
    ious = {column: image_ious(document, results, threshold) for column, results in predictions.items()}
    decisive = list(ious.values())[-1]
    groups = _groups(sorted(decisive, key=lambda image_id: (-decisive[image_id], image_id)), count)
    chosen = [image_id for group in groups.values() for image_id in group]
    rows = rows_from_results(annotation_file, images, predictions, image_ids=chosen, threshold=threshold)
    pictures = {
        image_id: Picture(row, {column: values[image_id] for column, values in ious.items()})
        for image_id, row in zip(chosen, rows, strict=True)
    }
    return {name: [pictures[image_id] for image_id in group] for name, group in groups.items()}


def columns_of(pictures: Iterable[Picture]) -> list[str]:
    """Return the columns of the pictures, ground truth first."""
    return list(
        dict.fromkeys([GROUND_TRUTH, *(column for picture in pictures for column in picture.row.objects)])
    )


def as_data_urls(pictures: Sequence[Picture], colours: Mapping[str, Colour]) -> list[dict[str, str]]:
    """Return for each picture and column a JPEG as a ``data:`` URL, the larger the fewer there are."""
    columns = columns_of(pictures)
    drawn: list[dict[str, bytes]] = []
    for side, quality in _SIZES:
        drawn = [
            {column: _jpeg(picture.row, column, colours, side, quality) for column in columns}
            for picture in pictures
        ]
        if sum(len(data) for cells in drawn for data in cells.values()) <= _PICTURE_BYTES:
            break
    return [{column: _data_url(data) for column, data in cells.items()} for cells in drawn]


def _groups(ranked: Sequence[int], count: int) -> dict[str, list[int]]:
    size = min(count, max(1, len(ranked) // len(GROUPS)))
    best, rest = list(ranked[:size]), ranked[size:]
    worst, middle = list(reversed(rest[-size:])), rest[:-size]
    start = (len(middle) - size + 1) // 2
    return dict(zip(GROUPS, (best, list(middle[max(0, start) : start + size]), worst), strict=True))


def _jpeg(row: SheetRow, column: str, colours: Mapping[str, Colour], side: int, quality: int) -> bytes:
    picture = draw_instances(row.image, row.objects.get(column, ()), _ALPHA, colours, side)
    buffer = io.BytesIO()
    picture.save(
        buffer, "JPEG", quality=quality, optimize=True, subsampling=0
    )  # thin coloured lines stay sharp
    return buffer.getvalue()


def _data_url(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
