"""What a training image is asked: its classes by one of their names, and things that it does not show.

Plain data and draws from Python's random state, which the trainer seeds for each image. Imports no torch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from sam3_lora.data.phrases import apart_from, negative_phrases, normal_form, read_phrases
from sam3_lora.errors import ConfigError, as_report, did_you_mean

#: In the order of what they ask beyond the objects of an image.
NEGATIVES = ("none", "classes", "list", "verified")

_PHRASE_SHARE = (
    4  # one of so many negatives, rounded up, is a phrase of the list where classes alone would fill the cap
)
_CONFUSABLE = 0.1  # of the threshold: below, a score says no more than that the thing is absent


@dataclass(frozen=True)
class PromptSettings:
    """The ``prompts`` block of a config.

    Attributes:
        negatives: ``none`` asks for what is in the image; ``classes`` for absent classes too; ``list`` also for phrases of
            a list; ``verified`` for those of them that the base does not see in the image, the most confusable first.
        max_prompts_per_image: Negatives are added up to so many prompts; those of the objects in the image stay. ``None``:
            all absent classes, as the official loader asks, and no list.
        names: Class -> the prompt to use instead of its name.
        synonyms: Class -> other prompts for it; training draws one of all.
        templates: Training puts each prompt into one of them, at ``{}``.
        phrases: File with phrases, one a line, instead of the list of the package.
        candidates: Phrases, and classes, of an image that the base is asked for ``verified``.
        absent_below: ``verified`` takes a phrase for absent where the base's presence score, 0 to 1, is below this.
        cache: Folder of the base's answers; ``None``: ``$SAM3_LORA_CACHE/presence``, else ``~/.cache/sam3_lora/presence``.
    """

    negatives: str = "verified"
    max_prompts_per_image: int | None = 6
    names: Mapping[str, str] = field(default_factory=dict)
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict)
    templates: Sequence[str] = ("{}",)
    phrases: str | None = None
    candidates: int = 24
    absent_below: float = 0.3
    cache: str | None = None

    @property
    def takes_phrases(self) -> bool:
        """Whether phrases of a list are asked."""
        return self.negatives in ("list", "verified")

    def most_prompts(self, classes: int, most_present: int) -> int:
        """Return how many prompts an image is asked at most.

        Args:
            classes: Of the dataset.
            most_present: Of them in one image.
        """
        if self.negatives == "none":
            return max(1, most_present)
        if self.max_prompts_per_image is None:
            return classes
        cap = self.max_prompts_per_image if self.takes_phrases else min(self.max_prompts_per_image, classes)
        return max(cap, most_present)


def prompt_settings(config: Mapping[str, Any]) -> PromptSettings:
    """Return the settings of a ``prompts`` block.

    Raises:
        ConfigError: For unknown keys and bad values, all at once.
    """
    if problems := prompt_problems({f"prompts.{key}": value for key, value in config.items()}):
        raise ConfigError(as_report(problems))
    return PromptSettings(**config)


def prompt_problems(config: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the prompt keys among dotted config keys; those that are not there are as shipped."""
    given: dict[str, Any] = {}
    for key, value in config.items():
        block, _, name = key.partition(".")
        if block == "prompts" and name:
            first, _, rest = name.partition(".")
            given[first] = {**given.get(first, {}), rest: value} if rest else value
    known = [item.name for item in fields(PromptSettings)]
    problems = [
        f"prompts: unknown key {name!r}{did_you_mean(name, known)} ({', '.join(known)})"
        for name in given
        if name not in known
    ]
    for name, check in _CHECKS.items():
        if name in given and (problem := check(given[name])):
            problems.append(f"prompts.{name}: {problem}")
    return problems + ([] if problems else _together(given))


def dataset_problems(settings: PromptSettings, classes: Collection[str]) -> list[str]:
    """Return what in the settings does not go with the classes of a dataset."""
    problems = [
        f"prompts.{key}: the dataset has no class {name!r}{did_you_mean(name, classes)} ({', '.join(classes)})"
        for key, given in (("names", settings.names), ("synonyms", settings.synonyms))
        for name in given
        if name not in classes
    ]
    owner: dict[str, str] = {}
    for name in classes:
        for prompt in dict.fromkeys(map(normal_form, names_of(settings, name))):
            if owner.setdefault(prompt, name) != name:
                problems.append(f"prompts: {prompt!r} would stand for {owner[prompt]!r} and for {name!r}")
    return problems


def names_of(settings: PromptSettings, name: str) -> tuple[str, ...]:
    """Return the prompts of a class, first the one that validation and prediction use."""
    return (settings.names.get(name, name), *settings.synonyms.get(name, ()))


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


def _check_negatives(value: Any) -> str:
    if value in NEGATIVES:
        return ""
    return f"unknown {value!r}{did_you_mean(str(value), NEGATIVES)} ({', '.join(NEGATIVES)})"


def _check_cap(value: Any) -> str:
    return "" if value is None else _check_number(value)


def _check_number(value: Any) -> str:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    return "" if whole else f"must be a whole number, 1 or more, got {value!r}"


def _check_threshold(value: Any) -> str:
    inside = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1
    return "" if inside else f"must lie above 0 and not above 1, got {value!r}"


def _check_names(value: Any) -> str:
    if not isinstance(value, Mapping):
        return f"needs a prompt for each class that is named, such as {{crack: thin crack}}, got {value!r}"
    bad = [name for name, prompt in value.items() if not _is_text(prompt)]
    return f"no prompt for {', '.join(map(repr, bad))}" if bad else ""


def _check_synonyms(value: Any) -> str:
    if not isinstance(value, Mapping):
        return f"needs a list of prompts for each class that is named, got {value!r}"
    bad = [name for name, prompts in value.items() if not _is_texts(prompts)]
    return f"no list of prompts for {', '.join(map(repr, bad))}" if bad else ""


def _check_templates(value: Any) -> str:
    if not _is_texts(value) or not len(value):
        return f"needs a list such as ['{{}}', 'a photo of {{}}'], got {value!r}"
    bad = [template for template in value if template.count("{}") != 1]
    return f"must have {{}} once, for the prompt: {', '.join(map(repr, bad))}" if bad else ""


def _check_path(value: Any) -> str:
    return "" if value is None or _is_text(value) else f"needs a path, got {value!r}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(_is_text, value))


_CHECKS = {
    "negatives": _check_negatives,
    "max_prompts_per_image": _check_cap,
    "names": _check_names,
    "synonyms": _check_synonyms,
    "templates": _check_templates,
    "phrases": _check_path,
    "candidates": _check_number,
    "absent_below": _check_threshold,
    "cache": _check_path,
}


def _together(given: Mapping[str, Any]) -> list[str]:
    negatives = given.get("negatives", PromptSettings.negatives)
    if negatives in ("list", "verified") and given.get("max_prompts_per_image", 1) is None:
        return [
            f"prompts.max_prompts_per_image: negatives: {negatives} needs a number, of which the list fills what classes leave"
        ]
    if given.get("phrases") is not None and negatives not in ("list", "verified"):
        return [f"prompts.phrases: negatives: {negatives} asks no phrases; take list or verified"]
    return []
