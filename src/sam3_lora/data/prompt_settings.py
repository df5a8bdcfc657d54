"""The ``prompts`` block of a config: what training images are asked. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from sam3_lora.data.phrases import normal_form
from sam3_lora.errors import ConfigError, as_report, did_you_mean

#: In the order of what they ask beyond the objects of an image.
NEGATIVES = ("none", "classes", "list", "verified")
_WITH_PHRASES = NEGATIVES[2:]


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
        cache: Folder of the base's answers; ``None``: ``$SAM3_LORA_CACHE/presence``, else ``~/.cache/sam3-lora/presence``.
    """

    negatives: str = "verified"
    max_prompts_per_image: int | None = 4
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
        return self.negatives in _WITH_PHRASES

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
    if negatives in _WITH_PHRASES and given.get("max_prompts_per_image", 1) is None:
        return [
            f"prompts.max_prompts_per_image: negatives: {negatives} needs a number, of which the list fills what classes leave"
        ]
    if given.get("phrases") is not None and negatives not in _WITH_PHRASES:
        return [f"prompts.phrases: negatives: {negatives} asks no phrases; take list or verified"]
    return []
