"""Whether an adapter still stays silent where nothing is, and still finds what the base finds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sam3_lora.adapter import BASE, active_adapters, inner_model, prompts_by_class, use_adapter
from sam3_lora.data.coco import ANNOTATION_FILE, read_split
from sam3_lora.errors import ConfigError
from sam3_lora.evaluation.metrics import PairScore, pair_scores, predict_split
from sam3_lora.evaluation.probe import Probe, make_probe
from sam3_lora.evaluation.scores import CocoResult, ap50_of_draws
from sam3_lora.evaluation.splits import checked_split
from sam3_lora.evaluation.statistics import bootstrap, calibration_error, matthews_correlation
from sam3_lora.inference import bfloat16_on_cuda, resolution_of

from sam3.model.sam3_image import Sam3Image  # isort: skip  (after the modules that stand in for triton)

Verdict = Literal["kept", "drifted", "lost"]
Scores = Sequence[Sequence[PairScore]]
Predictions = Sequence[CocoResult]
OnProgress = Callable[[int, int], None]

#: Images that a guard asks by default: with the shipped probe, some thousand pairs.
MAX_IMAGES = 20

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


def guard(
    model: nn.Module,
    data: str | Path,
    *,
    split: str | Path = "valid",
    general: str | Path | None = None,
    phrases: Sequence[str] | None = None,
    max_images: int | None = MAX_IMAGES,
    threshold: float = 0.5,
    base: Sam3Image | None = None,
    batch_size: int = 4,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> GuardReport:
    """Compare an adapter with its base on what neither should find, and on what the base can find.

    Every image is asked for the classes of its dataset and for phrases that name nothing in it. Of a phrase that an image
    shows after all, base and adapter report the object alike, so that it does not count.

    Args:
        model: A ``PeftModel``, or the ``Sam3Image`` inside one; modes and active adapter are as before afterwards.
        data: Dataset folder; images that the adapter was not trained on.
        split: Name of a split in it, or another folder with ``_annotations.coco.json``.
        general: Dataset of concepts that the base knows: a folder with ``_annotations.coco.json``, or with such a split.
        phrases: By default the shipped probe. Those that share a word with a class are left out.
        max_images: Draw so many images of the split; ``None`` takes all. The general dataset is taken whole.
        threshold: From which score on (class times presence) an object is reported.
        base: By default the model without its adapter, which must then be neither merged nor change the base.
        batch_size: Images at a time.
        seed: Of the draws.
        on_progress: Called with the number of images done and of all.

    Raises:
        DataError: If a dataset cannot be used.
        AdapterError: If the base is not there any more.
        ConfigError: If no phrase is left, or a number is out of range.
    """
    inner: Any = inner_model(model)
    folder = checked_split(Path(data), split)
    others = None if general is None else general_folder(Path(general), split)
    acting = active_adapters(inner)
    asked = prompts_by_class(inner, acting[0]) if acting else {}
    probe = make_probe(read_split(folder), phrases, max_images, seed, asked)
    asker = _Asker(probe, others, 2, resolution_of(inner), batch_size, on_progress)
    with use_adapter(inner, BASE) if base is None else contextlib.nullcontext():
        of_base = asker.ask(inner if base is None else base)
    return judge(probe, of_base, asker.ask(inner), threshold=threshold, general=others, seed=seed)


def guard_all(
    base: Sam3Image,
    adapted: Mapping[str, nn.Module],
    folder: Path,
    *,
    resolution: int,
    prompt_of: Mapping[str, str] | None = None,
    general: Path | None = None,
    batch_size: int = 4,
    on_progress: OnProgress | None = None,
) -> dict[str, GuardReport]:
    """Return what :func:`guard` says of each of several models beside one base, which is asked once.

    Args:
        base: Without adapters.
        adapted: Name -> the same with one.
        folder: Of a split that was found usable, as is the next.
        resolution: Side in pixels of the square that they see.
        prompt_of: Name of a class -> what to ask for it instead.
        general: As from :func:`general_folder`.
        batch_size: Images at a time.
        on_progress: Called with the number of images done and of all.
    """
    probe = make_probe(read_split(folder), max_images=MAX_IMAGES, prompt_of=prompt_of)
    asker = _Asker(probe, general, 1 + len(adapted), resolution, batch_size, on_progress)
    of_base = asker.ask(base)
    return {name: judge(probe, of_base, asker.ask(model), general=general) for name, model in adapted.items()}


@dataclass(frozen=True)
class Answers:
    """What a model said of the pairs of a probe, and found in the general dataset."""

    scores: Scores
    general: Predictions | None = None


class _Asker:
    """Asks several models the same, and counts the images of all."""

    def __init__(
        self,
        probe: Probe,
        general: Path | None,
        models: int,
        resolution: int,
        batch_size: int,
        on_progress: OnProgress | None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be 1 or more, got {batch_size!r}")
        self._probe, self._general = probe, general
        self._resolution, self._batch_size = resolution, batch_size
        self._on_progress = on_progress
        self._done = 0
        others = 0 if general is None else len(read_split(general).images)
        self._total = models * (len(probe.images) + others)

    def ask(self, model: Any) -> Answers:
        device = next(model.parameters()).device
        common: dict[str, Any] = {
            "resolution": self._resolution,
            "device": device,
            "batch_size": self._batch_size,
            "on_progress": self._show,
        }
        images, prompts = self._probe.images, [self._probe.prompts] * len(self._probe.images)
        found = None
        with bfloat16_on_cuda(device):
            scores = pair_scores(model, images, prompts, **common)
            self._done += len(images)
            if self._general is not None:
                (found,) = predict_split([model], self._general, self._general / ANNOTATION_FILE, **common)
                self._done += len(read_split(self._general).images)
        return Answers(scores, found)

    def _show(self, done: int, _: int) -> None:
        if self._on_progress:
            self._on_progress(min(self._done + done, self._total), self._total)


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


def general_folder(general: Path, split: str | Path) -> Path:
    """Return the folder of a general dataset: itself, if it holds annotations, or its split of that name."""
    if (general / ANNOTATION_FILE).is_file():
        return checked_split(general.parent, general.resolve())
    return checked_split(general, split)
