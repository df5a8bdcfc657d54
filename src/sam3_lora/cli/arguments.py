"""The parser that all verbs share, and the types of their arguments."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from itertools import takewhile
from typing import Any, NoReturn

from sam3_lora.errors import did_you_mean

_PYTHON_WORDS = {"True": True, "False": False, "None": None}


class Parser(argparse.ArgumentParser):
    """Takes options by their full names only, and suggests the close match for an unknown one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._known_options: list[str] = []
        options = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **options}
        super().__init__(*args, **options)
        # So that --box -5,2,30,50 is refused for its value, not for lacking one; argparse takes plain numbers only.
        self._negative_number_matcher = re.compile(r"^-\d")
        self.set_defaults(parser=self)

    def add_argument(self, *args: Any, **options: Any) -> argparse.Action:
        action = super().add_argument(*args, **options)
        self._known_options += action.option_strings
        return action

    def add_settings(self, about: str) -> None:
        """Add ``--set key=value``, which may be repeated."""
        self.add_argument(
            "--set",
            type=setting,
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help=f"{about}; may be repeated",
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as usual, but name an unknown option before any that is missing, which it may be meant to be."""
        words = list(takewhile(lambda word: word != "--", args or ()))
        for word in words if self._subparsers is None else ():
            if word.startswith("--") and word.partition("=")[0] not in self._known_options:
                self.refuse(word)
        return super().parse_known_args(args, namespace)

    def refuse(self, word: str) -> NoReturn:
        """Exit with the usage and an error about a word that no argument takes."""
        if not word.startswith("-"):
            self.error(f"unexpected argument {word!r}")
        option = word.partition("=")[0]
        self.error(f"unknown option {option!r}{did_you_mean(option, self._known_options, cutoff=0.7)}")


def count(text: str) -> int:
    """Return a whole number of 1 or more."""
    return _whole(text, least=1)


def seed(text: str) -> int:
    """Return a whole number of 0 or more."""
    return _whole(text, least=0)


def number(text: str, fits: Callable[[float], bool], needs: str) -> float:
    """Return a number that fits, or raise an error that says what is needed; NaN must not fit."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"needs {needs}, got {text!r}")
    return value


def rate(text: str) -> float:
    """Return a number between 0 and 1."""
    return number(text, lambda value: 0 < value < 1, "a number between 0 and 1, such as 1e-4")


def share(text: str) -> float:
    """Return a number from 0 to 1, both included."""
    return number(text, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def gigabytes(text: str) -> float:
    """Return a number above 0."""
    return number(text, lambda value: 0 < value < math.inf, "a number of gigabytes, such as 16")


def prompt(text: str) -> str:
    """Return the words without the spaces around them."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"needs words, such as 'red circle', got {text!r}")
    return text.strip()


def box_xyxy(text: str) -> tuple[float, ...]:
    """Return the edges ``x0, y0, x1, y1`` of a box that is not empty."""
    try:
        x0, y0, x1, y1 = edges = tuple(map(float, text.split(",")))
        fits = all(map(math.isfinite, edges)) and 0 <= x0 < x1 and 0 <= y0 < y1
    except ValueError:
        fits = False
    if not fits:
        raise argparse.ArgumentTypeError(
            f"needs x0,y0,x1,y1 in pixels with 0 <= x0 < x1 and 0 <= y0 < y1, such as 40,60,180,220, got {text!r}"
        )
    return edges


def preset(text: str) -> str:
    """Return the name of a preset that exists."""
    from sam3_lora.presets import PRESETS

    if text not in PRESETS:
        close = did_you_mean(text, PRESETS)
        raise argparse.ArgumentTypeError(
            f"unknown preset {text!r}{close or '; known are ' + ', '.join(PRESETS)}"
        )
    return text


def setting(text: str) -> tuple[str, Any]:
    """Return key and value of ``key=value``. The value is JSON, or ``True``, ``False``, ``None``, else text."""
    key, equals, value = text.partition("=")
    if not key.strip() or not equals:
        raise argparse.ArgumentTypeError(f"needs key=value, such as r=16, got {text!r}")
    if key.strip() in ("preset", "base"):
        raise argparse.ArgumentTypeError(f"{key.strip()} is an option of its own: --{key.strip()} {value}")
    if key.strip() in ("model", "adapter_name"):
        raise argparse.ArgumentTypeError(f"{key.strip()} is no setting of an adapter")
    if value in _PYTHON_WORDS:
        return key.strip(), _PYTHON_WORDS[value]
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        return key.strip(), value


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"needs a whole number of {least} or more, got {text!r}")
    return value
