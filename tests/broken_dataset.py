"""A good dataset, and ways to break it."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sam3_lora.data.check import check_dataset
from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.shapes import Concept, write_coco
from sam3_lora.errors import DataError

CONCEPTS = [Concept("red", "circle"), Concept("blue", "star")]


@dataclass
class Dataset:
    """A good dataset of three training images, to be broken."""

    folder: Path

    def file(self, split: str = "train") -> Path:
        return self.folder / split / ANNOTATION_FILE

    def edit(self, change: Callable[[dict], object], split: str = "train") -> None:
        document = json.loads(self.file(split).read_text())
        change(document)
        self.file(split).write_text(json.dumps(document))

    def report(self) -> str:
        with pytest.raises(DataError) as caught:
            check_dataset(self.folder)
        return str(caught.value)


def good_dataset(folder: Path) -> Dataset:
    """Write a dataset in which nothing is wrong."""
    write_coco(folder / "train", CONCEPTS, 3, seed=0)
    write_coco(folder / "valid", CONCEPTS, 2, seed=1)
    return Dataset(folder)


def first(key: str, **values: object) -> Callable[[dict], object]:
    """Change the first entry of a list of the document."""
    return lambda document: document[key][0].update(values)


def without(key: str, field: str) -> Callable[[dict], object]:
    return lambda document: document[key][0].pop(field)


def repeated(key: str, **values: object) -> Callable[[dict], object]:
    """Add a copy of the first entry of a list of the document."""
    return lambda document: document[key].append({**copy.deepcopy(document[key][0]), **values})
