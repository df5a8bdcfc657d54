"""Boxes and masks: what is found wrong with them, without drawing them."""

import math

import numpy as np
import pytest

from sam3_lora.data.coco import mask_to_run_lengths
from sam3_lora.data.labels import box_flaw, segmentation_flaw

SIZE_HW = (40, 60)
SQUARE = np.pad(np.ones((10, 10), bool), ((5, 25), (5, 45)))


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        pytest.param([0, 0, 60, 40], "", id="the whole image"),
        pytest.param([-0.5, 0, 61.5, 41], "", id="rounded past the edge"),
        pytest.param([0, 0, 10, 0], "has width 10 and height 0", id="flat box"),
        pytest.param([30, 30, -5, 8], "has width -5 and height 8", id="corners swapped"),
        pytest.param(
            [50, 30, 58, 38],
            "leaves the image, which is 60 x 40; as x1, y1, x2, y2 it fits",
            id="xyxy for xywh",
        ),
        pytest.param([-20, 0, 30, 10], "leaves the image, which is 60 x 40", id="left of the image"),
        pytest.param(
            [0.2, 0.3, 0.5, 0.5], "lies between 0 and 1, in an image of 60 x 40 pixels", id="normalised"
        ),
        pytest.param([0, 0, math.nan, 4], "has a NaN or infinite number", id="NaN"),
        pytest.param([0, 0, 10**400, 4], "has a NaN or infinite number", id="a number of 400 digits"),
        pytest.param([0, 0, 5], "is not four numbers [x, y, width, height]", id="three numbers"),
        pytest.param([0, 0, "5", 5], "is not four numbers [x, y, width, height]", id="text"),
        pytest.param({"x": 0}, "is not four numbers [x, y, width, height]", id="dict"),
    ],
)
def test_what_is_wrong_with_a_box(box, problem):
    flaw = box_flaw(box, SIZE_HW)
    assert (flaw.text if flaw else "") == problem


TRIANGLE = [0, 0, 9, 0, 9, 9]


@pytest.mark.parametrize(
    ("segmentation", "problem"),
    [
        pytest.param([TRIANGLE], "", id="polygon"),
        pytest.param([TRIANGLE, [1.5, 1, 5, 1, 5, 5, 1, 5]], "", id="two polygons"),
        pytest.param(mask_to_run_lengths(SQUARE), "", id="compressed run lengths"),
        pytest.param(mask_to_run_lengths(SQUARE[:20]) | {"size": [40, 60]}, "has run lengths that do not fill the image: 1200 of 2400 pixels", id="compressed for another size"),
        pytest.param({"size": [40, 60], "counts": "abc"}, "has run lengths with counts that are none: 'abc'", id="no run lengths"),
        pytest.param({"size": [40, 60], "counts": "é"}, "has run lengths with counts that are none: 'é'", id="not in the alphabet"),
        pytest.param({"size": [40, 60], "counts": [2400]}, "covers no pixel", id="empty mask"),
        pytest.param([[5, 5, 9, 5, 7, 5]], "covers no pixel", id="flat polygon"),
        pytest.param([[0.1, 0.1, 0.5, 0.1, 0.5, 0.7]], "lies between 0 and 1, in an image of 60 x 40 pixels", id="normalised"),
        pytest.param([[0, 0, 90, 0, 90, 20]], "leaves the image, which is 60 x 40", id="outside"),
        pytest.param({"size": [40, 60], "counts": [400, 2000]}, "", id="plain run lengths"),
        pytest.param([], "is empty", id="no polygon"),
        pytest.param([[]], "has a polygon of 0 numbers; three points need 6", id="empty polygon"),
        pytest.param([TRIANGLE, [1, 2, 3, 4]], "has a polygon of 4 numbers; three points need 6", id="two points"),
        pytest.param([TRIANGLE + [1]], "has a polygon of 7 numbers, which is odd", id="odd count"),
        pytest.param([TRIANGLE[:5] + [math.inf]], "has a NaN or infinite number", id="infinite"),
        pytest.param([TRIANGLE[:5] + [None]], "has a polygon with something else than numbers", id="null"),
        pytest.param([[[0, 0], [9, 0], [9, 9]]], "has a polygon with something else than numbers", id="point pairs"),
        pytest.param(TRIANGLE, "is not a list of polygons, each a list [x1, y1, x2, y2, ...]", id="bare polygon"),
        pytest.param("mask.png", "is 'mask.png', neither polygons nor RLE", id="file name"),
        pytest.param(
            {"size": [60, 40], "counts": "abc"},
            "has run lengths of size [60, 40]; the image needs [40, 60] (height, width)",
            id="size turned",
        ),
        pytest.param({"counts": "abc"}, "has run lengths of size None; the image needs [40, 60] (height, width)", id="no size"),
        pytest.param({"size": [40, 60], "counts": [5, 5]}, "has run lengths that do not fill the image: 10 of 2400 pixels", id="too short"),
        pytest.param({"size": [40, 60], "counts": None}, "has run lengths with counts None", id="no counts"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_mask(segmentation, problem):
    flaw, edges = segmentation_flaw(segmentation, SIZE_HW)
    assert (flaw.text if flaw else "") == problem
    assert (edges is None) == bool(flaw)
