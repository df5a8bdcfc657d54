"""What the base, without adapters, says about training images: is a thing there? Asked once, and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sam3_lora.base.checkpoint import base_info, find_checkpoint
from sam3_lora.base.loading import load_base
from sam3_lora.base.tiny import WEIGHTS_SHA256
from sam3_lora.data.prompts import Asked
from sam3_lora.errors import DataError
from sam3_lora.evaluation.compare import RememberingTrunk
from sam3_lora.evaluation.metrics import pair_scores
from sam3_lora.inference import bfloat16_on_cuda
from sam3_lora.output import cache_folder, write_json_atomic
from sam3_lora.training.prompted_data import PromptedCoco

_PROMPTS_AT_ONCE = 16  # 1 GB of the full-size model's DETR at most
_SAMPLE = 1 << 20  # bytes read at each of 16 places of a checkpoint, to tell it from another

#: Called with the number of images done and of all.
OnAsked = Callable[[int, int], None]


@dataclass(frozen=True)
class Base:
    """The base to ask: as for :func:`sam3_lora.load_base`."""

    name: str
    device: str | torch.device | None = None
    quantization: str | None = None


def verify_negatives(
    loader: PromptedCoco,
    images: Path,
    base: Base,
    *,
    rank: int = 0,
    processes: int = 1,
    together: Callable[[], Any] = lambda: None,
    on_asked: OnAsked | None = None,
) -> None:
    """Ask the base about each image and hand its answers to the loader.

    What the base is asked about an image follows from the content of the file alone. Each answer is written at once, so
    that nothing is asked twice, in this run or in another with the same base, images and phrases.

    Args:
        loader: Of the training images, with ``negatives: verified``.
        images: Folder that its file names start from.
        base: Whom to ask; loaded only if an answer is missing.
        rank: Of this process; it asks its share of the images.
        processes: Their number.
        together: Returns when all of them have called it.
        on_asked: Called after each image that this process asks about.

    Raises:
        DataError: If an image cannot be read.
    """
    cache = Path(loader.settings.cache or cache_folder("presence")).expanduser()
    paths = [images / name for name in loader.file_names()]
    questions = [_question(loader, index, path, base, cache) for index, path in enumerate(paths)]
    missing = [n for n in range(rank, len(paths), processes) if not questions[n].answer.is_file()]
    if missing:
        _ask([(paths[n], questions[n]) for n in missing], base, on_asked)
    together()
    loader.set_presence(question.scores() for question in questions)


@dataclass(frozen=True)
class _Question:
    """What to ask about an image, and the file for the answers."""

    asked: Sequence[Asked]
    answer: Path

    def scores(self) -> Mapping[Asked, float]:
        answers = json.loads(self.answer.read_text(encoding="utf-8"))
        return {asked: answers[asked.prompt] for asked in self.asked}


def _question(loader: PromptedCoco, index: int, path: Path, base: Base, cache: Path) -> _Question:
    try:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"the image {str(path)!r} cannot be read: {error.strerror}") from error
    asked = loader.sampler.candidates(loader.classes_in(index)[1], seed=int(content[:16], 16))
    prompts = sorted(item.prompt for item in asked)
    key = json.dumps([_identity(base.name), base.quantization, content, prompts])
    name = hashlib.sha256(key.encode()).hexdigest()
    return _Question(asked, cache / name[:2] / f"{name}.json")


_known: dict[str, str] = {}


def _identity(base: str) -> str:
    """Return what tells the weights of a base from others."""
    if base not in _known:
        checkpoint = find_checkpoint(base)
        of_name = {"tiny": WEIGHTS_SHA256}.get(base, base)
        _known[base] = of_name if checkpoint is None else _sampled_hash(checkpoint)
    return _known[base]


def _sampled_hash(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb") as opened:
        for place in range(16):
            opened.seek(place * size // 16)
            digest.update(opened.read(_SAMPLE))
    return digest.hexdigest()


def _ask(questions: Sequence[tuple[Path, _Question]], base: Base, on_asked: OnAsked | None) -> None:
    model = load_base(
        base.name, device=base.device, enable_segmentation=False, quantization=base.quantization
    )
    neck: Any = model.backbone.vision_backbone
    neck.trunk = RememberingTrunk(neck.trunk)
    common: dict[str, Any] = {"resolution": base_info(base.name).resolution, "device": model.device}
    with bfloat16_on_cuda(model.device):
        for done, (path, question) in enumerate(questions, 1):
            prompts = list(dict.fromkeys(item.prompt for item in question.asked))
            (said,) = pair_scores(
                model, [_opened(path)], [prompts], prompts_at_once=_PROMPTS_AT_ONCE, **common
            )
            # Three digits: enough for a threshold, and the same on machines that differ in the last bits.
            answers = {prompt: round(pair.presence, 3) for prompt, pair in zip(prompts, said, strict=True)}
            question.answer.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(question.answer, answers)
            if on_asked:
                on_asked(done, len(questions))


def _opened(path: Path) -> Image.Image:
    """Return an image as the official dataset reads it, which does not turn it upright."""
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise DataError(f"the image {str(path)!r} cannot be read: {error}") from error
