"""Finding what prompts name in images, with the official processor; the features of an image are computed once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from sam3_lora.adapter import (
    BASE,
    active_adapters,
    acts_inside,
    adapter_names,
    inner_model,
    load_adapter,
    recorded_base,
    thresholds_of,
    use_adapter,
)
from sam3_lora.base.cpu import enable_cpu
from sam3_lora.base.loading import load_base
from sam3_lora.data.coco import mask_to_run_lengths
from sam3_lora.data.image_files import read_image, to_rgb
from sam3_lora.errors import ConfigError, as_report, did_you_mean

from sam3.model.geometry_encoders import Prompt  # isort: skip  (after the modules that stand in for triton)
from sam3.model.sam3_image import Sam3Image  # isort: skip
from sam3.model.sam3_image_processor import Sam3Processor  # isort: skip

Boxes = Sequence[Sequence[float]] | NDArray[np.floating[Any]]
#: Objects that score this or less are left out where nothing better is known, as in the official ``Sam3Processor``.
DEFAULT_THRESHOLD = 0.5
_IMAGE_FEATURES = "backbone.vision_backbone"  # what Sam3Processor.set_image runs

_BoxXyxy = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What one prompt found in one image, best score first.

    Attributes:
        prompt: The words that were asked for.
        boxes_xyxy: ``(N, 4)`` fp32 in pixels of the image; an object at the edge may have a box that leaves it a little.
        masks: ``(N, H, W)``, the size of the image.
        scores: ``(N,)`` fp32, class times presence, each above the threshold and at most 1.
    """

    prompt: str
    boxes_xyxy: NDArray[np.float32]
    masks: NDArray[np.bool_]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        """Return the number of objects."""
        return len(self.scores)

    def as_coco_results(self, image_id: int, category_id: int) -> list[dict[str, Any]]:
        """Return the objects as COCO results: ``bbox`` xywh in pixels, ``segmentation`` as compressed RLE."""
        return [
            {
                "image_id": image_id,
                "category_id": category_id,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": score,
                "segmentation": mask_to_run_lengths(mask),
            }
            for (x0, y0, x1, y1), mask, score in zip(
                self.boxes_xyxy.tolist(), self.masks, self.scores.tolist(), strict=True
            )
        ]


class Predictor:
    """Finds objects by words, and optionally example boxes, with a SAM3 image model.

    For one prompt the result is that of the official ``Sam3Processor``. On CUDA it runs in bfloat16 autocast, as
    training does.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: str | torch.device | None = None,
        threshold: float | None = None,
        resolution: int | None = None,
    ) -> None:
        """Take a model as it is; weights that change later are seen, a later move to another device is not.

        Args:
            model: A ``Sam3Image`` with its segmentation head, with or without adapters, or the ``PeftModel`` around it.
            device: Move the model there; ``None`` leaves it where it is.
            threshold: Objects that score this or less are left out, unless ``predict`` is given another; ``None`` takes
                what the adapter recorded for the prompt (its validation split's best), and where it has nothing 0.5.
            resolution: Side in pixels of the square that the model sees. Only a check: a model takes one size.

        Raises:
            ConfigError: For another kind of model, and values out of range; all at once.
        """
        inner = inner_model(model)
        if not isinstance(inner, Sam3Image):
            raise ConfigError(f"a Predictor needs a Sam3Image, got a {type(inner).__name__}; see load_base")
        side = resolution_of(inner)
        problems = _threshold_problems(threshold)
        if resolution not in (None, side):
            problems.append(f"resolution {resolution!r}: this model takes {side}")
        if inner.segmentation_head is None:
            problems.append("this model has no segmentation head; load it with enable_segmentation=True")
        if problems:
            raise ConfigError(as_report(problems))
        enable_cpu()
        self.model = inner if device is None else inner.to(device)
        self.threshold = threshold
        self.resolution = side
        self.device = next(self.model.parameters()).device
        self._processor = Sam3Processor(self.model, resolution=side, device=self.device)

    @classmethod
    def from_adapter(
        cls,
        folder: str | Path,
        base: str | Path | None = None,
        device: str | torch.device | None = None,
        *,
        threshold: float | None = None,
    ) -> Predictor:
        """Load a base and an adapter into it.

        Args:
            folder: A saved adapter, such as ``adapters/best`` of a run.
            base: As in :func:`~sam3_lora.load_base`; by default the one that the adapter was made for.
            device: Where to put the model; ``None`` takes CUDA when there is one.
            threshold: As in the constructor.

        Raises:
            AdapterError: If the adapter is damaged, does not fit the base, or does not name one.
            CheckpointError: If the base cannot be had.
        """
        model = load_base(recorded_base(folder) if base is None else base, device=device)
        return cls(load_adapter(model, folder), threshold=threshold)

    def predict(
        self,
        image: Image.Image | str | Path,
        prompts: Sequence[str],
        boxes_xyxy: Boxes | None = None,
        threshold: float | None = None,
        *,
        adapter: str | None = None,
    ) -> list[Prediction]:
        """Return one prediction for each prompt, in their order. Modes and active adapter are as before afterwards.

        Args:
            image: A file, which is read upright (EXIF), or an image whose pixels are taken as they lie.
            prompts: Short noun phrases. ``"visual"`` with boxes asks for whatever the boxes show.
            boxes_xyxy: ``(K, 4)`` in pixels of the image: examples of what to find, for every prompt.
            threshold: Objects that score this or less are left out; ``None`` takes the predictor's.
            adapter: Which adapter of the model to use for this call; ``"base"`` is none of them; ``None`` takes the model
                as it is.

        Raises:
            ConfigError: For empty prompts, boxes that are empty or leave the image, a threshold out of range, an adapter
                that the model does not have; all at once.
            DataError: If the image cannot be read; names the file.
        """
        (predictions,) = self._predict(image, prompts, boxes_xyxy, threshold, [adapter])
        return predictions

    def predict_with(
        self,
        image: Image.Image | str | Path,
        prompts: Sequence[str],
        adapters: Sequence[str],
        boxes_xyxy: Boxes | None = None,
        threshold: float | None = None,
    ) -> dict[str, list[Prediction]]:
        """Return what :meth:`predict` returns with each of several adapters, by their names.

        The features of the image are computed once for all adapters that leave the vision encoder as it is, ``"base"``
        among them, and once more for each other. Other arguments and errors are those of :meth:`predict`.
        """
        return dict(
            zip(adapters, self._predict(image, prompts, boxes_xyxy, threshold, adapters), strict=True)
        )

    def predict_images(
        self,
        images: Iterable[Image.Image | str | Path],
        prompts: Sequence[str],
        boxes_xyxy: Boxes | None = None,
        threshold: float | None = None,
        *,
        adapter: str | None = None,
    ) -> Iterator[list[Prediction]]:
        """Return an iterator of what :meth:`predict` returns for each image; one image at a time is in memory.

        Arguments and errors are those of :meth:`predict`. What does not depend on an image is checked at once. The
        first image with a problem ends the iterator; call :meth:`predict` in a loop of your own to go on after it.
        """
        more = _adapter_problems(self.model, [adapter])
        _checked_boxes(prompts, boxes_xyxy, self.threshold if threshold is None else threshold, more=more)
        return (self.predict(image, prompts, boxes_xyxy, threshold, adapter=adapter) for image in images)

    def _predict(
        self,
        image: Image.Image | str | Path,
        prompts: Sequence[str],
        boxes_xyxy: Boxes | None,
        threshold: float | None,
        adapters: Sequence[str | None],
    ) -> list[list[Prediction]]:
        """Return the predictions of each adapter, in their order."""
        threshold = self.threshold if threshold is None else threshold
        more = _adapter_problems(self.model, adapters)
        picture = read_image(image) if isinstance(image, (str, Path)) else to_rgb(image)
        boxes = _checked_boxes(prompts, boxes_xyxy, threshold, picture.size, more)
        shared: dict[str, Any] | None = None
        found = []
        with eval_mode(self.model), bfloat16_on_cuda(self.device):
            for adapter in adapters:
                with use_adapter(self.model, adapter):
                    as_base = self._sees_as_base(adapter)
                    seen = (shared if as_base else None) or self._processor.set_image(picture)
                    shared = seen if as_base else shared
                    limits = self._thresholds(adapter, prompts, threshold)
                    found.append(
                        [
                            self._ask(seen, prompt, boxes, limit)
                            for prompt, limit in zip(prompts, limits, strict=True)
                        ]
                    )
        return found

    def _sees_as_base(self, adapter: str | None) -> bool:
        """Whether the features of an image are those of the base."""
        if adapter is None:
            return False  # whatever is active; there is only one call to make
        return adapter == BASE or not acts_inside(self.model, adapter, _IMAGE_FEATURES)

    def _thresholds(
        self, adapter: str | None, prompts: Sequence[str], threshold: float | None
    ) -> list[float]:
        if threshold is not None:
            return [threshold] * len(prompts)
        acting = active_adapters(self.model) if adapter is None else [adapter]
        recorded = thresholds_of(self.model, acting[0]) if acting else {}
        return [recorded.get(prompt, DEFAULT_THRESHOLD) for prompt in prompts]

    def _ask(
        self, seen: dict[str, Any], prompt: str, boxes_xyxy: Sequence[_BoxXyxy], threshold: float
    ) -> Prediction:
        """Ask the processor once. Its state is copied first, because it writes text and results into it."""
        self._processor.set_confidence_threshold(threshold)
        state = {**seen, "backbone_out": dict(seen["backbone_out"])}
        if boxes_xyxy:
            size = (seen["original_width"], seen["original_height"])
            state["geometric_prompt"] = self._examples(boxes_xyxy, size)
        state = self._processor.set_text_prompt(prompt, state)
        scores = state["scores"].float().cpu().numpy()
        best_first = np.argsort(-scores, kind="stable")
        return Prediction(
            prompt,
            boxes_xyxy=state["boxes"].float().cpu().numpy()[best_first],
            masks=state["masks"].squeeze(1).cpu().numpy()[best_first],
            scores=scores[best_first],
        )

    def _examples(self, boxes_xyxy: Sequence[_BoxXyxy], size: tuple[int, int]) -> Prompt:
        """Return what ``Sam3Processor.add_geometric_prompt`` collects; that runs the model after every box."""
        width, height = size
        cxcywh = [
            [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
            for x0, y0, x1, y1 in boxes_xyxy
        ]
        boxes = torch.tensor(cxcywh, dtype=torch.float32, device=self.device).unsqueeze(1)
        return Prompt(
            box_embeddings=boxes,
            box_mask=torch.zeros(1, len(boxes), dtype=torch.bool, device=self.device),
            box_labels=torch.ones(len(boxes), 1, dtype=torch.bool, device=self.device),
        )


def bfloat16_on_cuda(device: torch.device, enabled: bool = True) -> torch.autocast:
    """Return the autocast of our training runs for a device: bfloat16 on CUDA, none on the CPU."""
    return torch.autocast("cuda", dtype=torch.bfloat16, enabled=enabled and device.type == "cuda")


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, and each of its modules back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def resolution_of(model: Sam3Image) -> int:
    """Return the side of the square that the image encoder was built for; its RoPE tables fit no other."""
    trunk: Any = model.backbone.vision_backbone.trunk
    tokens = max(block.attn.input_size[0] for block in trunk.blocks)  # of a global block; windows are smaller
    return int(tokens * trunk.patch_embed.proj.weight.shape[-1])


def _checked_boxes(
    prompts: Sequence[str],
    boxes_xyxy: Boxes | None,
    threshold: float | None,
    size: tuple[int, int] | None = None,
    more: Iterable[str] = (),
) -> list[_BoxXyxy]:
    """Return the boxes as numbers, or raise for all problems of a request at once, with those found before.

    ``size`` is width and height, if known.
    """
    problems = [*_prompt_problems(prompts), *_threshold_problems(threshold), *more]
    boxes = []
    for box in () if boxes_xyxy is None else boxes_xyxy:
        try:
            x0, y0, x1, y1 = map(float, box)
        except (TypeError, ValueError):
            problems.append(f"box {box!r} is not four numbers x0, y0, x1, y1")
            continue
        boxes.append((x0, y0, x1, y1))
    problems += [problem for edges in boxes if (problem := _box_problem(edges, size))]
    if problems:
        raise ConfigError(as_report(problems))
    return boxes


def _prompt_problems(prompts: Sequence[str]) -> list[str]:
    if isinstance(prompts, str):
        return [f"prompts must be a list, such as [{prompts!r}], not the string itself"]
    if not len(prompts):
        return ["no prompt; name at least one thing to find, such as 'red circle'"]
    return [
        f"prompt {number} is {prompt!r}; name the thing to find, such as 'red circle'"
        for number, prompt in enumerate(prompts, 1)
        if not isinstance(prompt, str) or not prompt.strip()
    ]


def _adapter_problems(model: nn.Module, adapters: Sequence[str | None]) -> list[str]:
    known = [*adapter_names(model), BASE]
    if isinstance(adapters, str):
        return [f"adapters must be a list, such as [{adapters!r}], not the string itself"]
    return [_adapter_problem(adapter, known) for adapter in adapters if adapter not in (None, *known)]


def _adapter_problem(adapter: object, known: Sequence[str]) -> str:
    if isinstance(adapter, str):
        hint = did_you_mean(adapter, known) or f"; it has {', '.join(known)}"
        return f"this model has no adapter {adapter!r}{hint}"
    # PEFT's adapter_names gives the rows of axis 0 of each layer's input to adapters. In SAM3 these are windows of an image
    # in the vision encoder, prompts in the text encoder, and places in a sequence in the DETR.
    return f"adapter must be one name, got {adapter!r}; predict image by image for an adapter of its own for each"


def _threshold_problems(threshold: float | None) -> list[str]:
    return (
        []
        if threshold is None or 0 <= threshold <= 1
        else [f"threshold must be from 0 to 1, got {threshold!r}"]
    )


def _box_problem(box_xyxy: _BoxXyxy, size: tuple[int, int] | None) -> str:
    x0, y0, x1, y1 = box_xyxy
    shown = f"box ({x0:g}, {y0:g}, {x1:g}, {y1:g})"
    if not all(map(math.isfinite, box_xyxy)):
        return f"{shown} has a NaN or infinite number"
    if x1 <= x0 or y1 <= y0:
        return f"{shown} is empty; give x0, y0, x1, y1 with x0 < x1 and y0 < y1"
    if size is not None and (x0 < 0 or y0 < 0 or x1 > size[0] or y1 > size[1]):
        return f"{shown} leaves the image, which is {size[0]} wide and {size[1]} high"
    return ""
