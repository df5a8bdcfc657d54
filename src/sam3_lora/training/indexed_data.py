"""The official COCO loader with its annotations in an index on disk, which all loader processes share."""

from __future__ import annotations

import json
import tempfile
from typing import Any

from sam3_lora.base.cpu import provide_triton
from sam3_lora.data.index import open_index

provide_triton()

from sam3.train.data.coco_json_loaders import COCO_FROM_JSON  # noqa: E402


class IndexedCoco(COCO_FROM_JSON):
    """The official ``COCO_FROM_JSON`` for ``coco_json_loader``, with the same queries and annotations.

    The official one holds the whole file in each process, and reads it again in each epoch; this one an index
    (:class:`~sam3_lora.data.index.CocoIndex`) that is built once for a file.

    Args:
        annotation_file: COCO JSON that passed the check of datasets.
        options: Of ``COCO_FROM_JSON``.

    Raises:
        DataError: If the file cannot be read, or its entries are not those of a checked dataset.
    """

    def __init__(self, annotation_file: str, **options: Any) -> None:
        index = open_index(annotation_file)
        categories = [{"id": key, "name": name} for key, name in index.categories.items()]
        with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
            # It reads all of a file at once, so it gets one without images.
            json.dump({"images": [], "annotations": [], "categories": categories}, file)
            file.flush()
            super().__init__(file.name, **options)
        self._raw_data: Any = index

    @property
    def index(self) -> Any:
        """The :class:`~sam3_lora.data.index.CocoIndex`: rows by the number of the image, in the official order."""
        return self._raw_data
