"""Lists of phrases that an image may be asked though it shows no such thing, and which of them go with given prompts.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

from sam3_lora.errors import DataError

# Words that say nothing about what a thing is.
_SMALL_WORDS = frozenset("a an the of on in at with and or for to".split())


def negative_phrases() -> tuple[str, ...]:
    """Return the phrases of the package that training may use as negatives."""
    return _packaged("negative_phrases.txt")


def held_out_phrases() -> tuple[str, ...]:
    """Return the phrases of the package that training never uses, for measuring. They share no word with the others."""
    return _packaged("held_out_phrases.txt")


def read_phrases(path: Path) -> tuple[str, ...]:
    """Return the phrases of a file, one a line, each once; empty lines and those that begin with ``#`` are passed over.

    Raises:
        DataError: If the file cannot be read, or has no phrase.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(f"the phrases in {str(path)!r} cannot be read: {reason}") from error
    phrases = _phrases(text)
    if not phrases:
        raise DataError(f"{str(path)!r} has no phrase; write one a line")
    return phrases


def normal_form(phrase: str) -> str:
    """Return all that SAM3's tokenizer sees of a phrase: lower case, single spaces."""
    return " ".join(phrase.lower().split())


def apart_from(phrases: Iterable[str], prompts: Iterable[str]) -> list[str]:
    """Return the phrases that have no word in common with any of the prompts.

    Such a phrase may well name what a prompt names, "sports car" beside "car", and an image may show it without anybody
    having looked. Plurals count as the same word.
    """
    taken = {word for prompt in prompts for word in words_of(prompt)}
    return [phrase for phrase in phrases if taken.isdisjoint(words_of(phrase))]


def words_of(phrase: str) -> set[str]:
    """Return the words of a phrase that say what it is, without a plural s."""
    words = normal_form(phrase).replace("-", " ").replace("_", " ").split()
    return {_singular(word) for word in words if word not in _SMALL_WORDS}


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _packaged(name: str) -> tuple[str, ...]:
    return _phrases((files("sam3_lora.data") / name).read_text(encoding="utf-8"))


def _phrases(text: str) -> tuple[str, ...]:
    lines: Sequence[str] = [normal_form(line) for line in text.splitlines()]
    return tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
