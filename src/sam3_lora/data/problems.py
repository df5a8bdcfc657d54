"""Problems of a dataset: gathered one by one, reported together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

EXAMPLES = 3

#: An error stops a training or makes its numbers wrong; a warning is said, and the training goes on.
Level = Literal["error", "warning"]


class Kind(NamedTuple):
    """A kind of problem and how to put it right. Both are shown to the user."""

    name: str
    fix: str
    level: Level = "error"


@dataclass(frozen=True)
class Problem:
    """All problems of one kind; ``examples`` are the first few of ``count`` places."""

    kind: str
    count: int
    examples: tuple[str, ...]
    fix: str
    level: Level = "error"

    def __str__(self) -> str:
        more = [f"... and {self.count - len(self.examples)} more"] if self.count > len(self.examples) else []
        heading = f"{self.kind} ({self.count})" if self.count > 1 else self.kind
        fix = [f"-> {self.fix}"] if self.fix else []
        return "\n  ".join([heading, *self.examples, *more, *fix])


@dataclass
class Findings:
    """Collects problems; of each kind it keeps the number and the first few places only, so any dataset fits."""

    _counts: dict[Kind, int] = field(default_factory=dict)
    _examples: dict[Kind, list[str]] = field(default_factory=dict)

    def add(self, kind: Kind, place: str) -> None:
        self._counts[kind] = self._counts.get(kind, 0) + 1
        examples = self._examples.setdefault(kind, [])
        if len(examples) < EXAMPLES:
            examples.append(_printable(place))

    def add_more(self, kind: Kind, count: int) -> None:
        """Count places that are like those that were added."""
        self._counts[kind] += count

    def update(self, other: Findings) -> None:
        """Add what another one collected."""
        for kind, count in other._counts.items():
            for place in other._examples[kind]:
                self.add(kind, place)
            self.add_more(kind, count - len(other._examples[kind]))

    def problems(self) -> list[Problem]:
        """Return one problem per kind, in the order of discovery."""
        return [
            Problem(kind.name, count, tuple(self._examples[kind]), kind.fix, kind.level)
            for kind, count in self._counts.items()
        ]


def describe(title: str, problems: Sequence[Problem]) -> str:
    """Return the report of all problems: short for a single one, else under a line that counts them."""
    total = sum(problem.count for problem in problems)
    if total == 1:
        (problem,) = problems
        return f"{title}: {problem.kind}: {problem.examples[0]}\n  -> {problem.fix}"
    return "\n".join([f"{title}: {total} problems", *("  " + str(p).replace("\n", "\n  ") for p in problems)])


def _printable(text: str) -> str:
    """Return a text without what a file name could do to a terminal, or a terminal cannot show."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
