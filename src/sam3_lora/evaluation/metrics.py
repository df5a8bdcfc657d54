"""Measuring a model on a COCO split: the official dataset, post-processing and COCO AP, without the trainer.

Every step is the official one with the settings of our training configs, so the numbers are those that the trainer's
validation prints for the same weights.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from sam3_lora.data.image_files import read_image
from sam3_lora.evaluation.batches import (
    MAX_PROMPTS,
    check_all_read,
    evaluating,
    forward,
    make_datapoint,
    official_transforms,
    open_split,
    silence,
)
from sam3_lora.evaluation.scores import CocoResult, ModelEvaluation, read_truth, score_predictions

from sam3.eval.postprocessors import PostProcessImage  # isort: skip  (after the modules that stand in for triton)
from sam3.model.sam3_image import Sam3Image  # isort: skip

# The module behind this one announces on stdout that the optional TIDE is not installed.
with silence():
    from sam3.eval.coco_writer import PredictionDumper

#: An image, or a file that is read upright.
Picture = Image.Image | Path

_MAX_PREDICTIONS = 100  # an image, best first, over all its categories: PredictionDumper's maxdets


def evaluate_split(
    model: Sam3Image,
    images: Path,
    annotation_file: Path,
    *,
    resolution: int,
    batch_size: int,
    device: str | torch.device,
    dump_dir: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    prompt_of: Mapping[str, str] | None = None,
) -> ModelEvaluation:
    """Ask the model for every category on every image of a split, and return its scores and predictions.

    Runs in eval mode without gradients, in whatever autocast context the caller has set; the model's modes and the
    random state of Python are as before afterwards.

    Args:
        model: On ``device``, with or without adapters.
        images: Folder that the file names in the annotations are relative to.
        annotation_file: COCO JSON with ``iscrowd`` in every annotation.
        resolution: Side in pixels of the square that the model sees.
        batch_size: Images at a time.
        device: Where the model is.
        dump_dir: Also write ``coco_predictions_bbox.json`` and ``coco_predictions_segm.json`` there, as the trainer
            does.
        on_progress: Called with the number of images done and of all images after every batch.
        prompt_of: Name of a category -> what to ask for it instead.

    Raises:
        DataError: If there is nothing to measure against (AP is undefined without objects), or images cannot be read.
    """
    read_truth(annotation_file)  # first: it raises if there is nothing to measure against
    (results,) = predict_split(
        [model],
        images,
        annotation_file,
        resolution=resolution,
        batch_size=batch_size,
        device=device,
        on_progress=on_progress,
        prompt_of=prompt_of,
    )
    if dump_dir is not None:
        _write_dumps(dump_dir, results)
    return score_predictions(annotation_file, results)


def predict_split(
    models: Sequence[Sam3Image],
    images: Path,
    annotation_file: Path,
    *,
    resolution: int,
    batch_size: int,
    device: str | torch.device,
    on_progress: Callable[[int, int], None] | None = None,
    prompt_of: Mapping[str, str] | None = None,
) -> list[list[CocoResult]]:
    """Ask every model for every category on every image, and return the predictions of each.

    All models see a batch before the next one is read, and the turns of an image with many categories follow each
    other, so that models may share what they compute from images alone. The rest is as in :func:`evaluate_split`.
    """
    dataset = open_split(images, annotation_file, resolution, prompt_of=prompt_of)
    dumpers = [_new_dumper() for _ in models]
    turns = len(dataset.coco.category_chunks)
    total = len(dataset)
    seen: Counter[int] = Counter()
    done = 0
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        for start in range(0, total, batch_size * turns):
            for turn in range(turns):
                places = range(start + turn, min(start + batch_size * turns, total), turns)
                datapoints = [dataset[place] for place in places]
                seen.update(d.find_queries[0].inference_metadata.original_image_id for d in datapoints)
                for model, dumper in zip(models, dumpers, strict=True):
                    outputs, metadata = forward(model, datapoints, device)
                    dumper.update(find_stages=outputs, find_metadatas=metadata)
                done += len(datapoints)
                if on_progress:
                    on_progress(done, total)
    check_all_read(dataset, seen)
    return [_merged(dumper) for dumper in dumpers]


def false_fire_rate(
    model: Sam3Image,
    images: Sequence[Picture],
    prompts: Sequence[Sequence[str]],
    threshold: float = 0.5,
    *,
    resolution: int,
    device: str | torch.device,
    batch_size: int = 8,
) -> float:
    """Return the share, 0 to 1, of (image, prompt) pairs for which the model reports an object.

    Args:
        model: On ``device``.
        images: Any size and mode, or files.
        prompts: For each image the prompts to ask, all of which name nothing in it.
        threshold: A pair counts if the best score (class x presence) of its queries is above this.
        resolution: Side in pixels of the square that the model sees.
        device: Where the model is.
        batch_size: Images at a time.

    Raises:
        ValueError: If there is not one list of prompts for each image, or no prompt at all.
    """
    scores = best_scores(model, images, prompts, resolution=resolution, device=device, batch_size=batch_size)
    fires = [score > threshold for row in scores for score in row]
    if not fires:
        raise ValueError("false_fire_rate needs at least one image with a prompt")
    return sum(fires) / len(fires)


def best_scores(
    model: Sam3Image,
    images: Sequence[Picture],
    prompts: Sequence[Sequence[str]],
    *,
    resolution: int,
    device: str | torch.device,
    batch_size: int = 8,
) -> list[list[float]]:
    """Return for each image and each of its prompts the highest score (class x presence) of any query.

    Arguments and errors as in :func:`false_fire_rate`.
    """
    scores = pair_scores(model, images, prompts, resolution=resolution, device=device, batch_size=batch_size)
    return [[pair.score for pair in row] for row in scores]


class PairScore(NamedTuple):
    """What a model says of an image and a prompt, 0 to 1: the best score of any query, and the presence alone."""

    score: float
    presence: float


def pair_scores(
    model: Sam3Image,
    images: Sequence[Picture],
    prompts: Sequence[Sequence[str]],
    *,
    resolution: int,
    device: str | torch.device,
    batch_size: int = 8,
    prompts_at_once: int = MAX_PROMPTS,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[PairScore]]:
    """Return what the model says of each image and each of its prompts.

    Arguments and errors as in :func:`false_fire_rate`; a forward has ``prompts_at_once`` at most, of all its images;
    ``on_progress`` is called with the images done and all.
    """
    asked = [
        (number, texts[start : start + prompts_at_once])
        for number, (_, texts) in enumerate(zip(images, prompts, strict=True))
        for start in range(0, len(texts), prompts_at_once)
    ]
    transform = official_transforms(resolution)
    scores: list[list[PairScore]] = [[] for _ in range(len(images))]
    with evaluating(model):
        for turn in _turns(asked, batch_size, prompts_at_once):
            datapoints = [transform(make_datapoint(_opened(images[number]), texts)) for number, texts in turn]
            outputs, _ = forward(model, datapoints, device)
            (stage,) = outputs
            presence = stage["presence_logit_dec"].float().sigmoid().reshape(-1)
            best = stage["pred_logits"].float().sigmoid().squeeze(-1).amax(dim=1) * presence
            found = iter(zip(best.tolist(), presence.tolist(), strict=True))
            for number, texts in turn:
                scores[number] += [PairScore(*next(found)) for _ in texts]
            if on_progress:
                on_progress(turn[-1][0] + 1, len(images))
    return scores


_Turn = list[tuple[int, Sequence[str]]]


def _turns(
    asked: Sequence[tuple[int, Sequence[str]]], batch_size: int, prompts_at_once: int
) -> Iterator[_Turn]:
    """Yield what to ask at once: up to ``batch_size`` images, and prompts as many as go into a forward."""
    turn: _Turn = []
    for number, texts in asked:
        if turn and (len(turn) == batch_size or sum(len(t) for _, t in turn) + len(texts) > prompts_at_once):
            yield turn
            turn = []
        turn.append((number, texts))
    if turn:
        yield turn


def _opened(picture: Picture) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else read_image(picture)


def _new_dumper() -> PredictionDumper:
    with tempfile.TemporaryDirectory() as folder:  # the dumper makes its folder, used or not
        return PredictionDumper(
            dump_dir=folder,
            # Gives boxes too, the same as with iou_type "bbox": one pass serves both.
            postprocessor=PostProcessImage(
                max_dets_per_img=-1,
                iou_type="segm",
                use_original_ids=True,
                use_original_sizes_box=True,
                use_original_sizes_mask=True,
                convert_mask_to_rle=True,
                always_interpolate_masks_on_gpu=False,
                use_presence=True,
            ),
            maxdets=_MAX_PREDICTIONS,
            iou_type="segm",
            merge_predictions=True,
        )


def _merged(dumper: PredictionDumper) -> list[CocoResult]:
    """Return the best predictions of each image, rounded, merged and in the order that the official dumper gives."""
    merged: list[CocoResult] = dumper.gather_and_merge_predictions()
    return [{key: value for key, value in result.items() if key != "area"} for result in merged]


def _write_dumps(folder: Path, results: list[CocoResult]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    boxes = [{key: value for key, value in result.items() if key != "segmentation"} for result in results]
    for iou_type, entries in (("bbox", boxes), ("segm", results)):
        (folder / f"coco_predictions_{iou_type}.json").write_text(json.dumps(entries), encoding="utf-8")
