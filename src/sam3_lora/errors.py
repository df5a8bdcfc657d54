"""The errors of the library: one base class, one subclass per thing a user can put right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class Sam3LoraError(Exception):
    """Base of all errors raised on purpose; the text says what happened, where, and what to do."""


class ConfigError(Sam3LoraError, ValueError):
    """A preset, keyword or setting that does not exist or has a value out of range."""


class TargetError(Sam3LoraError, ValueError):
    """Modules that cannot be adapted, or that were not wrapped as requested."""


class AdapterError(Sam3LoraError):
    """An adapter that is damaged, does not fit the model, or is already in it."""


class DataError(Sam3LoraError):
    """A dataset with missing files, or with annotations that cannot be used."""


class CheckpointError(Sam3LoraError):
    """A base checkpoint that is missing, damaged or not accessible."""


class OutputError(Sam3LoraError):
    """An output folder that cannot be written without loss of something that is there."""


class DivergenceError(Sam3LoraError):
    """A training whose loss or adapter is not finite any more."""


class MemoryShortage(Sam3LoraError):
    """A training step that needs more memory than there is."""


class RunStopped(Sam3LoraError):
    """A run that ended early because somebody asked for it; what was done is saved.

    Attributes:
        exit_code: 128 + the number of the signal that asked.
    """

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to ``name``, or ``""`` if none is close.

    The text is made to follow the statement that ``name`` is unknown. ``cutoff`` is how alike the two must be, 0 to 1.
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def as_report(problems: Sequence[str], limit: int = 30) -> str:
    """Return one problem as it is; several as their number and a line for each of the first."""
    if len(problems) == 1:
        return problems[0]
    rest = [f"and {len(problems) - limit} more"] if len(problems) > limit else []
    return "\n  ".join([f"{len(problems)} problems:", *problems[:limit], *rest])
