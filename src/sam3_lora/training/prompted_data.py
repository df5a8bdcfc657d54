"""The official COCO loader with prompts, and negatives, of our choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam3_lora.data.prompt_settings import PromptSettings, prompt_settings
from sam3_lora.data.prompts import Asked, PromptSampler
from sam3_lora.errors import DataError
from sam3_lora.training.indexed_data import IndexedCoco

_NO_CATEGORY = -1  # as the official dataset says of a query without one


class PromptedCoco(IndexedCoco):
    """The official loader for ``coco_json_loader``, its annotations in a shared index; the ``prompts`` block of a config says
    what images are asked.

    In training it draws from Python's random state at each item, which the trainer seeds by seed, epoch and image. Else
    each image is asked every class by its one prompt, so that metrics compare from epoch to epoch, and nothing that has no
    category. With ``verified`` it asks no phrase before it has the answers of the base, which ``LoraTrainer`` gets for it.

    Args:
        annotation_file: COCO JSON.
        prompts: The block.
        training: Whether to draw.

    Raises:
        ConfigError: If the block has problems, or does not go with the classes; all at once.
        DataError: If phrases cannot be read, or no image is left to train on.
    """

    def __init__(
        self, annotation_file: str, prompts: Mapping[str, Any] | None = None, training: bool = True
    ) -> None:
        super().__init__(annotation_file)
        self.settings: PromptSettings = prompt_settings(_plain(prompts or {}))
        self.sampler = PromptSampler(self._cat_idx_to_text, self.settings)
        self._training = training
        self._presence: NDArray[np.float16] | None = None
        self._columns = {asked: column for column, asked in enumerate(self.sampler.negatives())}

    def getDatapointIds(self) -> list[int]:
        ids: list[int] = super().getDatapointIds()
        if not self._training or self.settings.negatives != "none":
            return ids
        if not (shown := [index for index in ids if self.classes_in(index)[0]]):
            raise DataError("no image has an object, so prompts.negatives: none leaves nothing to train on")
        return shown

    def loadQueriesAndAnnotationsFromDatapoint(self, idx: int) -> tuple[list[Any], list[Any]]:
        queries, annotations = super().loadQueriesAndAnnotationsFromDatapoint(idx)
        of_category = {query["original_cat_id"]: query for query in queries}
        nothing = {**queries[0], "original_cat_id": _NO_CATEGORY, "object_ids_output": []}
        asked = [
            {**of_category.get(category, nothing), "id": number, "query_text": prompt}
            for number, (category, prompt) in enumerate(self._asked(idx))
        ]
        return asked, annotations

    def classes_in(self, idx: int) -> tuple[list[int], list[int]]:
        """Return the ids of the classes that an image has objects of, and of those that it has none of.

        A class of which it has only crowds is neither: they are there, and are not trained on.
        """
        categories, crowds = self.index.categories_of(idx)
        labelled = set(categories.tolist())
        present = set(categories[~crowds].tolist())
        return sorted(present), [key for key in self._sorted_cat_ids if key not in labelled]

    def most_prompts(self) -> int:
        """Return the most prompts that an image is asked."""
        if not self._training:
            return len(self._sorted_cat_ids)
        present = (len(self.classes_in(index)[0]) for index in range(len(self._raw_data)))
        return self.settings.most_prompts(len(self._sorted_cat_ids), max(present, default=0))

    def file_names(self) -> list[str]:
        """Return the file of each image, by the number of its datapoint."""
        return [entry["image"]["file_name"] for entry in self._raw_data]

    def set_presence(self, presence: Iterable[Mapping[Asked, float]]) -> None:
        """Take what the base says about each image: presence scores, 0 to 1, of some of the negatives."""
        # A table, since each loader process gets its own copy of it.
        self._presence = np.full((len(self._raw_data), len(self._columns)), np.nan, dtype=np.float16)
        for row, scores in enumerate(presence):
            for asked, score in scores.items():
                self._presence[row, self._columns[asked]] = score

    def _asked(self, idx: int) -> list[Asked]:
        if not self._training:
            return self.sampler.fixed()
        return self.sampler.draw(*self.classes_in(idx), self._scores(idx))

    def _scores(self, idx: int) -> dict[Asked, float] | None:
        if self.settings.negatives != "verified":
            return None
        if self._presence is None:
            return {}
        row = self._presence[idx]
        return {
            asked: float(row[column]) for asked, column in self._columns.items() if not np.isnan(row[column])
        }


def _plain(config: Any) -> Any:
    """Return plain dicts and lists for what OmegaConf hands over: its containers are slow in every item."""
    if isinstance(config, Mapping):
        return {str(key): _plain(value) for key, value in config.items()}
    if hasattr(config, "__iter__") and not isinstance(config, str):
        return [_plain(value) for value in config]
    return config
