"""Whether an adapter still stays silent where nothing is, and still finds what the base finds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sam3_lora.adapter import BASE, active_adapters, inner_model, prompts_by_class, use_adapter
from sam3_lora.data.coco import ANNOTATION_FILE, read_split
from sam3_lora.errors import ConfigError
from sam3_lora.evaluation.metrics import pair_scores, predict_split
from sam3_lora.evaluation.probe import Probe, make_probe
from sam3_lora.evaluation.splits import checked_split
from sam3_lora.evaluation.verdict import Answers, GuardReport, judge
from sam3_lora.inference import bfloat16_on_cuda, resolution_of

from sam3.model.sam3_image import Sam3Image  # isort: skip  (after the modules that stand in for triton)

OnProgress = Callable[[int, int], None]

#: Images that a guard asks by default: with the shipped probe, some thousand pairs.
MAX_IMAGES = 20


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
        self._others = 0 if general is None else len(read_split(general).images)
        self._total = models * (len(probe.images) + self._others)

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
                self._done += self._others
        return Answers(scores, found)

    def _show(self, done: int, _: int) -> None:
        if self._on_progress:
            self._on_progress(min(self._done + done, self._total), self._total)


def general_folder(general: Path, split: str | Path) -> Path:
    """Return the folder of a general dataset: itself, if it holds annotations, or its split of that name."""
    if (general / ANNOTATION_FILE).is_file():
        return checked_split(general.parent, general.resolve())
    return checked_split(general, split)
