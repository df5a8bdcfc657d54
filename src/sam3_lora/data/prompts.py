"""What a training image is asked: its classes by one of their names, and things that it does not show.

Plain data and draws from Python's random state, which the trainer seeds for each image. Imports no torch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sam3_lora.data.phrases import apart_from, negative_phrases, read_phrases
from sam3_lora.data.prompt_settings import PromptSettings, dataset_problems, names_of
from sam3_lora.errors import ConfigError, as_report

_PHRASE_SHARE = (
    4  # one of so many negatives, rounded up, is a phrase of the list where classes alone would fill the cap
)
_CONFUSABLE = 0.1  # of the threshold: below, a score says no more than that the thing is absent


class Asked(NamedTuple):
    """A prompt for an image, and the class that it stands for; ``None`` for a phrase of the list."""

    category: int | None
    prompt: str


class PromptSampler:
    """Draws what images are asked. Draws come from Python's global random state.

    Args:
        categories: Category id -> name of the class.
        settings: Of the config.

    Attributes:
        prompts: Category id -> the fixed prompt of the class, in the order of the ids.
        phrases: Of the list, without those that share a word with a prompt of the dataset.

    Raises:
        ConfigError: If the settings do not go with the classes, all at once.
        DataError: If the file with phrases cannot be used.
    """

    def __init__(self, categories: Mapping[int, str], settings: PromptSettings) -> None:
        if problems := dataset_problems(settings, list(categories.values())):
            raise ConfigError(as_report(problems))
        self._settings = settings
        self._names = {key: names_of(settings, categories[key]) for key in sorted(categories)}
        self.prompts = {key: names[0] for key, names in self._names.items()}
        self.phrases: tuple[str, ...] = ()
        if settings.takes_phrases:
            given = read_phrases(Path(settings.phrases)) if settings.phrases else negative_phrases()
            self.phrases = tuple(apart_from(given, [n for names in self._names.values() for n in names]))
        # One object of each, since lists of them are kept for all images.
        self._of_class = {key: Asked(key, prompt) for key, prompt in self.prompts.items()}
        self._of_phrase = {phrase: Asked(None, phrase) for phrase in self.phrases}

    def fixed(self) -> list[Asked]:
        """Return what every image is asked where it must always be the same: each class by its first prompt."""
        return list(self._of_class.values())

    def negatives(self) -> list[Asked]:
        """Return all that an image can be asked in vain: the classes by their first prompts, then the phrases."""
        return [*self._of_class.values(), *self._of_phrase.values()]

    def candidates(self, absent: Sequence[int], seed: int) -> list[Asked]:
        """Return what to ask the base about an image, the same for the same seed."""
        draw = random.Random(seed)
        classes = draw.sample(sorted(absent), min(len(absent), self._settings.candidates))
        phrases = draw.sample(self.phrases, min(len(self.phrases), self._settings.candidates))
        return [self._of_class[key] for key in classes] + [self._of_phrase[phrase] for phrase in phrases]

    def draw(
        self, present: Collection[int], absent: Collection[int], scores: Mapping[Asked, float] | None = None
    ) -> list[Asked]:
        """Return what to ask an image this time, the classes in the order of their ids.

        Args:
            present: Ids of the classes in the image; they are always asked.
            absent: Ids of the classes that are not in it.
            scores: Presence, 0 to 1, by the base; a phrase without one is not taken. ``None``: nobody was asked.
        """
        chosen, phrases = self._negatives(len(present), sorted(absent), scores)
        categories = sorted([*present, *chosen])
        asked = [Asked(key, self._worded(random.choice(self._names[key]))) for key in categories]
        return asked + [Asked(None, self._worded(phrase)) for phrase in phrases]

    def _negatives(
        self, present: int, absent: list[int], scores: Mapping[Asked, float] | None
    ) -> tuple[list[int], list[str]]:
        settings = self._settings
        if settings.negatives == "none":
            return [], []
        if settings.max_prompts_per_image is None:
            return absent, []
        allowed = self._absent_phrases(scores)
        slots = max(0, settings.max_prompts_per_image - present)
        share = math.ceil(slots / _PHRASE_SHARE) if slots > 1 or not absent else 0
        number = min(len(allowed), max(share, slots - len(absent)))
        of_class = {key: self._of_class[key] for key in absent}
        of_phrase = {phrase: self._of_phrase[phrase] for phrase in allowed}
        return self._pick(of_class, slots - number, scores), self._pick(of_phrase, number, scores)

    def _absent_phrases(self, scores: Mapping[Asked, float] | None) -> Sequence[str]:
        if scores is None:
            return self.phrases
        return [
            asked.prompt
            for asked, score in scores.items()
            if asked.category is None and score < self._settings.absent_below
        ]

    def _pick(
        self, things: Mapping[Any, Asked], number: int, scores: Mapping[Asked, float] | None
    ) -> list[Any]:
        """Return so many of the things: up to half of them, rounded up, the most confusable ones, the rest at random."""
        number = min(number, len(things))
        known = scores or {}
        least = _CONFUSABLE * self._settings.absent_below
        confusable = sorted(
            (thing for thing, asked in things.items() if known.get(asked, 0.0) >= least),
            key=lambda thing: -known[things[thing]],
        )
        first = confusable[: math.ceil(number / 2)]
        others = [thing for thing in things if thing not in first]
        return first + random.sample(others, number - len(first))

    def _worded(self, prompt: str) -> str:
        return random.choice(self._settings.templates).replace("{}", prompt)
