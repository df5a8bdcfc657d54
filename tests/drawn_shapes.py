"""Three shapes with what formats lose, a hole, a second part and slanted edges, and what a conversion made of them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from sam3_lora.data.coco import ANNOTATION_FILE, compressed_run_lengths

SAMPLES = Path(__file__).parent / "data" / "convert"
HEIGHT, WIDTH = 48, 64
Y, X = np.mgrid[:HEIGHT, :WIDTH]
RING = ((X - 20) ** 2 + (Y - 22) ** 2 <= 14**2) & ((X - 20) ** 2 + (Y - 22) ** 2 > 6**2)
PAIR = ((X >= 40) & (X < 52) & (Y >= 5) & (Y < 15)) | ((X >= 46) & (X < 60) & (Y >= 30) & (Y < 44))
TRIANGLE_XY = [36.0, 20.0, 60.0, 26.0, 38.5, 44.0]
SIZE = {"width": WIDTH, "height": HEIGHT}


def drawn(polygon):
    return decoded([polygon])


def decoded(segmentation):
    return coco_mask.decode(compressed_run_lengths(segmentation, (HEIGHT, WIDTH))).astype(bool)


def rectangle(x, y, width, height):
    return (x <= X) & (x + width > X) & (y <= Y) & (y + height > Y)


TRIANGLE = drawn(TRIANGLE_XY)


def picture(path: Path, colour=(200, 40, 40), size=(WIDTH, HEIGHT)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def masks_of(folder: Path) -> dict[str, list]:
    """Return class and mask of each object, by image, and check that box and area are those of the mask."""
    found = {}
    for file in folder.glob(f"*/{ANNOTATION_FILE}"):
        document = json.loads(file.read_text())
        names = {c["id"]: c["name"] for c in document["categories"]}
        images = {i["id"]: i["file_name"] for i in document["images"]}
        for image in images.values():
            found.setdefault(image, [])
        for annotation in document["annotations"]:
            mask = decoded(annotation["segmentation"])
            rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
            box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
            assert (annotation["area"], annotation["bbox"]) == (mask.sum(), box)
            found[images[annotation["image_id"]]].append((names[annotation["category_id"]], mask))
    return found


def assert_masks(folder, expected):
    found = masks_of(folder)
    assert sorted(found) == sorted(expected)
    for image, objects in expected.items():
        assert [name for name, _ in found[image]] == [name for name, _ in objects], image
        for (name, mask), (_, wanted) in zip(found[image], objects, strict=True):
            assert np.array_equal(mask, wanted), f"{name} of {image}: {mask.sum()} pixels, not {wanted.sum()}"
