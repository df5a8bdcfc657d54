"""The splits of a converted dataset on disk: annotations are written as they come, so that any number fits in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.convert.items import Converted
from sam3_lora.data.convert.report import EMPTY_NAME, SAME_PROMPT, Report


class Categories:
    """The classes of a dataset, numbered from 1 in the order of their coming; those with the same prompt are one."""

    def __init__(self, names: Sequence[str], report: Report) -> None:
        self._ids: dict[str, int] = {}
        self._by_prompt: dict[str, int] = {}
        self._report = report
        self.names: list[str] = []
        for name in names:
            self.id_of(name)

    def id_of(self, name: str) -> int:
        """Return the number of a class, a new one if need be."""
        if name in self._ids:
            return self._ids[name]
        prompt = " ".join(name.lower().split())  # all that SAM3's tokenizer sees of it
        if not prompt:
            self._report.problem(EMPTY_NAME, repr(name))
        if prompt in self._by_prompt:
            self._report.note(SAME_PROMPT, f"{name!r} and {self.names[self._by_prompt[prompt] - 1]!r}")
        else:
            self.names.append(" ".join(name.split()))
            self._by_prompt[prompt] = len(self.names)
        self._ids[name] = self._by_prompt[prompt]
        return self._ids[name]

    def entries(self) -> list[dict[str, Any]]:
        return [
            {"id": number, "name": name, "supercategory": ""} for number, name in enumerate(self.names, 1)
        ]


class SplitWriter:
    """Writes the annotation file of one split; :meth:`close` makes it whole."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.images = 0
        self.objects = 0
        self._image_entries: list[str] = []
        self._file: IO[str] = (folder / ANNOTATION_FILE).open("w", encoding="utf-8")
        self._file.write('{"annotations": [')

    def add(self, converted: Converted, categories: Categories) -> None:
        """Add an image and its annotations."""
        self.images += 1
        height, width = converted.size_hw
        entry = {"id": self.images, "file_name": converted.name, "width": width, "height": height}
        self._image_entries.append(json.dumps(entry))
        for name, annotation in converted.annotations:
            ids = f'"id": {self.objects + 1}, "image_id": {self.images}, "category_id": {categories.id_of(name)}'
            self._file.write(f"{',' if self.objects else ''}\n{{{ids}, {annotation[1:]}")
            self.objects += 1

    def close(self, categories: Categories) -> None:
        """Write the rest of the file."""
        images = ",\n".join(self._image_entries)
        self._file.write(f'],\n"images": [\n{images}],\n"categories": {json.dumps(categories.entries())}}}\n')
        self._file.close()

    def abandon(self) -> None:
        self._file.close()
