"""How images and prompts reach the model in an evaluation: the official dataset, transforms and collator."""

from __future__ import annotations

import contextlib
import functools
import io
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sam3_lora.base.cpu import provide_triton
from sam3_lora.errors import DataError
from sam3_lora.inference import eval_mode

provide_triton()

from sam3.model.sam3_image import Sam3Image  # noqa: E402
from sam3.model.utils.misc import copy_data_to_device  # noqa: E402
from sam3.train.data.coco_json_loaders import COCO_FROM_JSON  # noqa: E402
from sam3.train.data.collator import collate_fn_api  # noqa: E402
from sam3.train.data.sam3_image_dataset import (  # noqa: E402
    Datapoint,
    FindQueryLoaded,
    InferenceMetadata,
    Object,
    Sam3ImageDataset,
)
from sam3.train.data.sam3_image_dataset import Image as DatapointImage  # noqa: E402
from sam3.train.transforms.basic_for_api import (  # noqa: E402
    ComposeAPI,
    NormalizeAPI,
    RandomResizeAPI,
    ToTensorAPI,
)
from sam3.train.transforms.segmentation import DecodeRle  # noqa: E402

#: Asked of an image at once; the rest in further turns, so that memory does not grow with the number of categories.
MAX_PROMPTS = 32


def open_split(
    images: Path,
    annotation_file: Path,
    resolution: int,
    *,
    masks: bool = False,
    prompt_of: Mapping[str, str] | None = None,
) -> Any:
    """Return the official validation dataset of a COCO split: every category is asked of every image.

    Args:
        images: Folder that the file names in the annotations start from.
        annotation_file: COCO JSON.
        resolution: Side in pixels that images are resized to.
        masks: Load the masks of the objects, which a loss needs; COCOeval reads them from the file itself.
        prompt_of: Name of a category -> what to ask for it instead.
    """
    loader = functools.partial(COCO_FROM_JSON, include_negatives=True, category_chunk_size=MAX_PROMPTS)
    with silence():
        dataset = Sam3ImageDataset(
            img_folder=str(images),
            ann_file=str(annotation_file),
            transforms=[*([DecodeRle()] if masks else []), official_transforms(resolution)],
            max_ann_per_img=100_000,
            multiplier=1,
            training=False,
            load_segmentation=masks,
            coco_json_loader=loader,
        )
    coco, given = dataset.coco, prompt_of or {}
    coco.prompts = {key: given.get(name, name) for key, name in coco._cat_idx_to_text.items()}
    return dataset


def official_transforms(resolution: int) -> Any:
    """Return the official validation transforms: a square of ``resolution`` pixels, values -1 to 1."""
    return ComposeAPI(
        [
            RandomResizeAPI(sizes=resolution, square=True, consistent_transform=False),
            ToTensorAPI(),
            NormalizeAPI(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]),
        ]
    )


def make_datapoint(image: Image.Image, prompts: Sequence[str]) -> Any:
    """Return an official ``Datapoint`` that asks the prompts of the image, without ground truth."""
    size_hw = (image.height, image.width)
    metadata = InferenceMetadata(
        coco_image_id=-1,
        original_image_id=-1,
        original_category_id=-1,
        original_size=size_hw,
        object_id=-1,
        frame_index=-1,
    )
    queries = [
        FindQueryLoaded(
            query_text=prompt,
            image_id=0,
            object_ids_output=[],
            is_exhaustive=True,
            is_pixel_exhaustive=True,
            inference_metadata=metadata,
        )
        for prompt in prompts
    ]
    picture = DatapointImage(data=image.convert("RGB"), objects=[], size=size_hw)
    return Datapoint(find_queries=queries, images=[picture])


def probe_batch(
    image: NDArray[np.uint8],
    masks: NDArray[np.bool_],
    boxes_xyxy: NDArray[np.float32],
    *,
    shown: str,
    absent: str,
    resolution: int,
    device: str | torch.device,
) -> Any:
    """Return an official batch with targets: one image asked for what it shows, for that by an example, and for more.

    Args:
        image: ``(H, W, 3)`` RGB.
        masks: ``(N, H, W)`` of the objects.
        boxes_xyxy: ``(N, 4)`` of the objects, in pixels; the first is the example.
        shown: The prompt that all objects belong to; asked without and with the example.
        absent: A prompt that no object belongs to.
        resolution: Side in pixels that the image is resized to.
        device: Where to put the batch.
    """
    datapoint = make_datapoint(Image.fromarray(image), [shown, shown, absent])
    _add_objects(datapoint, masks, boxes_xyxy, [range(len(masks))] * 2 + [range(0)])
    datapoint.find_queries[1].input_bbox = torch.tensor(boxes_xyxy[:1])
    datapoint.find_queries[1].input_bbox_label = torch.ones(1, dtype=torch.bool)
    return _batch_with_targets([datapoint], resolution, device)


def sized_batch(
    images: int, prompts: int, objects: int, *, resolution: int, device: str | torch.device = "cpu"
) -> Any:
    """Return an official batch with targets of a given size: noise in which rectangles are to be found.

    Each image is asked all prompts, as in training with so many categories, and its objects are spread over them as
    evenly as can be. Always the same for the same numbers; objects beyond 256 repeat the rectangles.

    Args:
        images: In the batch, 1 or more.
        prompts: Of each image, 1 or more; the same for all images.
        objects: In each image, 0 or more.
        resolution: Side in pixels.
        device: Where to put the batch.
    """
    rng = np.random.RandomState(0)
    boxes = _grid_boxes(objects, resolution)
    rows, columns = np.mgrid[:resolution, :resolution]
    masks = np.array(
        [(columns >= x0) & (columns < x1) & (rows >= y0) & (rows < y1) for x0, y0, x1, y1 in boxes],
        dtype=bool,
    )
    datapoints = []
    for _ in range(images):
        noise = rng.randint(0, 256, (resolution, resolution, 3)).astype(np.uint8)
        datapoint = make_datapoint(Image.fromarray(noise), [f"kind {n + 1}" for n in range(prompts)])
        _add_objects(datapoint, masks, boxes, [range(n, objects, prompts) for n in range(prompts)])
        datapoints.append(datapoint)
    return _batch_with_targets(datapoints, resolution, device)


def _grid_boxes(count: int, side: int) -> NDArray[np.float32]:
    """Return ``(count, 4)`` boxes of whole pixels on a grid of 16 x 16."""
    cell = side / 16
    spots = [(n % 16, n // 16 % 16) for n in range(count)]
    boxes = [(x * cell, y * cell, (x + 0.8) * cell, (y + 0.8) * cell) for x, y in spots]
    return np.array(boxes, dtype=np.float32).reshape(-1, 4).round()


def _add_objects(
    datapoint: Any,
    masks: NDArray[np.bool_],
    boxes_xyxy: NDArray[np.float32],
    numbers: Sequence[Sequence[int]],
) -> None:
    """Put objects into the one image of a datapoint, and tell each of its prompts the numbers of its own."""
    datapoint.images[0].objects = [
        Object(
            bbox=torch.tensor(box),
            area=float(mask.sum()),
            object_id=i,
            frame_index=0,
            segment=torch.tensor(mask),
        )
        for i, (box, mask) in enumerate(zip(boxes_xyxy, masks, strict=True))
    ]
    for query, own in zip(datapoint.find_queries, numbers, strict=True):
        query.object_ids_output = list(own)


def _batch_with_targets(datapoints: list[Any], resolution: int, device: str | torch.device) -> Any:
    transform = official_transforms(resolution)
    return batch_of([transform(datapoint) for datapoint in datapoints], device)


def batch_of(datapoints: list[Any], device: str | torch.device) -> Any:
    """Return the official batch of transformed datapoints, with targets and masks."""
    batch = collate_fn_api(datapoints, dict_key="all", with_seg_masks=True)["all"]
    return copy_data_to_device(batch, torch.device(device))


def forward(model: Sam3Image, datapoints: list[Any], device: str | torch.device) -> tuple[Any, Any]:
    """Run the model on transformed datapoints and return its ``SAM3Output`` and the metadata of the prompts."""
    batch = collate_fn_api(datapoints, dict_key="all", with_seg_masks=False)["all"]
    batch = copy_data_to_device(batch, torch.device(device))
    with torch.no_grad():
        return model(batch), batch.find_metadatas


def check_all_read(dataset: Any, seen: Mapping[int, int]) -> None:
    """Raise if images are missing among those that ``open_split``'s dataset gave: it replaces one that it cannot read
    by the next one, without an error.

    Args:
        dataset: From :func:`open_split`.
        seen: How often each image id was given.

    Raises:
        DataError: Names the images that cannot be read.
    """
    turns = len(dataset.coco.category_chunks)
    names = {entry["image"]["id"]: entry["image"]["file_name"] for entry in dataset.coco._raw_data}
    unread = [names[image_id] for image_id in names if seen.get(image_id, 0) < turns]
    if unread:
        raise DataError(
            f"cannot read {len(unread)} of {len(names)} images in {dataset.root!r}: {', '.join(unread)}"
        )


@contextlib.contextmanager
def evaluating(model: Sam3Image) -> Iterator[None]:
    """Put the model in eval mode for a while.

    Python's random state comes back too: the official resize draws from it even when there is one size only.
    """
    state = random.getstate()
    try:
        with eval_mode(model):
            yield
    finally:
        random.setstate(state)


def silence() -> contextlib.redirect_stdout[io.StringIO]:
    """Keep what pycocotools and sam3 print off the screen."""
    return contextlib.redirect_stdout(io.StringIO())
