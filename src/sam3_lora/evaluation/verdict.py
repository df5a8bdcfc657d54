"""The verdict on an adapter: kept, drifted or lost, from what it and its base have answered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.evaluation.metrics import PairScore
from sam3_lora.evaluation.probe import Probe
from sam3_lora.evaluation.scores import CocoResult, ap50_of_draws
from sam3_lora.evaluation.statistics import bootstrap, calibration_error, matthews_correlation

Verdict = Literal["kept", "drifted", "lost"]
Scores = Sequence[Sequence[PairScore]]
Predictions = Sequence[CocoResult]

_VERDICTS: tuple[Verdict, Verdict, Verdict] = ("kept", "drifted", "lost")
_SHOWN_PHRASES = 5
_AP_DRAWS = 200  # a draw takes COCOeval some milliseconds


@dataclass(frozen=True)
class Cutoff:
    """From which harm on an adapter has drifted, and from which it has lost what the base could.

    Attributes:
        measure: Name of a :class:`Change` of the report.
        harm: ``rise`` in the measure, or its ``share`` of the base's that is gone.
        drifted: The least harm for this verdict.
        lost: The same.
        reason: Why there.
    """

    measure: str
    harm: Literal["rise", "share"]
    drifted: float
    lost: float
    reason: str


CUTOFFS = (
    Cutoff(
        "false_fire",
        "rise",
        0.05,
        0.25,
        "one unrelated prompt in twenty is what people accept; where one in four finds something, the words no longer matter",
    ),
    Cutoff(
        "general_AP50",
        "share",
        0.1,
        0.5,
        "a tenth is about what another seed changes; without half of it, the old concepts need the base",
    ),
)


@dataclass(frozen=True)
class Change:
    """One measure of the base and of the adapter, and the 95 % interval of the difference over draws of the images."""

    base: float
    adapter: float
    change: float
    low: float
    high: float


@dataclass(frozen=True)
class GuardReport:
    """What an adapter did to the open vocabulary of its base.

    Attributes:
        verdict: The worst that any of :data:`CUTOFFS` says; a change whose interval holds 0 counts as none.
        reasons: What led to it, as text; empty for "kept".
        measures: ``false_fire``: share of pairs of an image and an unrelated phrase for which an object is reported.
            ``ECE``: calibration error of the presence, and ``IL_MCC``: how well presence is told from absence, both over
            all pairs, with the classes. ``general_AP50``: AP50 of the masks on the general dataset, if there is one.
        fires_most: Phrase -> share of the images in which base and adapter report it, of those with the largest rise.
        images: How many were asked.
        phrases: How many each was asked besides its classes.
        threshold: From which score on an object is reported.
    """

    verdict: Verdict
    reasons: Sequence[str]
    measures: Mapping[str, Change]
    fires_most: Mapping[str, tuple[float, float]]
    images: int
    phrases: int
    threshold: float

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Answers:
    """What a model said of the pairs of a probe, and found in the general dataset."""

    scores: Scores
    general: Predictions | None = None


def judge(
    probe: Probe,
    base: Answers,
    adapter: Answers,
    *,
    threshold: float = 0.5,
    general: Path | None = None,
    seed: int = 0,
) -> GuardReport:
    """Return the report on what base and adapter have answered.

    Args:
        probe: What they were asked.
        base: Its answers.
        adapter: The same of the adapter, to the same questions.
        threshold: From which score on an object is reported.
        general: Folder of the general dataset, if it was asked.
        seed: Of the draws behind the intervals.
    """
    of_base, of_adapter = (_Pairs.of(probe, answers.scores, threshold) for answers in (base, adapter))
    measures = {
        name: _change(measure, of_base, of_adapter, seed)
        for name, measure in (("false_fire", _false_fire), ("ECE", _ece), ("IL_MCC", _il_mcc))
    }
    if general is not None and base.general is not None and adapter.general is not None:
        measures["general_AP50"] = _ap50_change(general, base.general, adapter.general, seed)
    verdict, reasons = _verdict(measures)
    return GuardReport(
        verdict,
        reasons,
        measures,
        _fires_most(probe, of_base, of_adapter),
        len(probe.images),
        len(probe.phrases),
        threshold,
    )


@dataclass(frozen=True)
class _Pairs:
    """``(images, prompts)`` arrays: what was said, with what presence, and what is true; the first are classes."""

    fires: NDArray[np.bool_]
    presence: NDArray[np.float64]
    present: NDArray[np.bool_]
    classes: int

    @staticmethod
    def of(probe: Probe, scores: Scores, threshold: float) -> _Pairs:
        table = np.array(scores, dtype=np.float64)  # (images, prompts, 2)
        return _Pairs(table[..., 0] > threshold, table[..., 1], probe.present, probe.classes)

    def of_images(self, places: NDArray[np.intp]) -> _Pairs:
        return _Pairs(self.fires[places], self.presence[places], self.present[places], self.classes)


def _false_fire(pairs: _Pairs) -> float:
    return float(pairs.fires[:, pairs.classes :].mean())


def _ece(pairs: _Pairs) -> float:
    return calibration_error(pairs.presence.ravel(), pairs.present.ravel())


def _il_mcc(pairs: _Pairs) -> float:
    return matthews_correlation(pairs.fires.ravel(), pairs.present.ravel())


def _change(measure: Callable[[_Pairs], float], base: _Pairs, adapter: _Pairs, seed: int) -> Change:
    interval = bootstrap(
        len(base.fires),
        lambda places: measure(adapter.of_images(places)) - measure(base.of_images(places)),
        seed,
    )
    return Change(measure(base), measure(adapter), *interval)


def _ap50_change(folder: Path, base: Predictions, adapter: Predictions, seed: int) -> Change:
    images, of_base = ap50_of_draws(folder / ANNOTATION_FILE, base)
    _, of_adapter = ap50_of_draws(folder / ANNOTATION_FILE, adapter)
    interval = bootstrap(images, lambda places: of_adapter(places) - of_base(places), seed, _AP_DRAWS)
    whole = np.arange(images)
    return Change(of_base(whole), of_adapter(whole), *interval)


def _verdict(measures: Mapping[str, Change]) -> tuple[Verdict, list[str]]:
    worst, reasons = 0, []
    for cutoff in CUTOFFS:
        if cutoff.measure not in measures:
            continue
        change = measures[cutoff.measure]
        if change.low <= 0 <= change.high:
            continue
        harm = change.change if cutoff.harm == "rise" else -change.change / max(change.base, 1e-9)
        level = (harm >= cutoff.drifted) + (harm >= cutoff.lost)
        worst = max(worst, level)
        if level:
            reasons.append(
                f"{cutoff.measure} {change.base:.3f} -> {change.adapter:.3f}, change {change.change:+.3f} "
                f"[{change.low:+.3f}, {change.high:+.3f}]: {_VERDICTS[level]}"
            )
    return _VERDICTS[worst], reasons


def _fires_most(probe: Probe, base: _Pairs, adapter: _Pairs) -> dict[str, tuple[float, float]]:
    before, after = (pairs.fires[:, pairs.classes :].mean(axis=0) for pairs in (base, adapter))
    worst_first = np.argsort(before - after, kind="stable")[:_SHOWN_PHRASES]
    return {
        probe.phrases[place]: (float(before[place]), float(after[place]))
        for place in worst_first
        if after[place] > before[place]
    }
