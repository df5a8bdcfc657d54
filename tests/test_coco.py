"""Reading a COCO folder: what counts as one, what is said when it is not one, and what the split knows."""

import json
import math

import pytest

from sam3_lora.data.coco import ANNOTATION_FILE, box_problem, read_coco, read_split, segmentation_problem
from sam3_lora.errors import DataError

SIZE_HW = (40, 60)

DOCUMENT = {
    "images": [{"id": 1, "file_name": "a.png", "width": 60, "height": 40}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 7, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 7, "iscrowd": 1},
        {"id": 3, "image_id": 1, "category_id": 2, "iscrowd": 0},
    ],
    "categories": [{"id": 7, "name": "red car"}, {"id": 2, "name": "tree"}, {"id": 9, "name": "bird"}],
}


@pytest.fixture
def split_folder(tmp_path):
    (tmp_path / ANNOTATION_FILE).write_text(json.dumps(DOCUMENT))
    return tmp_path


def test_prompts_are_category_names_by_ascending_id(split_folder):
    assert read_split(split_folder).prompts == ("tree", "red car", "bird")


def test_objects_are_counted_per_prompt_without_crowd_regions(split_folder):
    assert read_split(split_folder).objects_per_prompt == {"tree": 1, "red car": 1, "bird": 0}


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"^no folder .*/nowhere$"):
        read_split(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("present", "hint"),
    [
        pytest.param([], f"no {ANNOTATION_FILE!r} in", id="no JSON at all"),
        pytest.param(
            ["annotations.json"], "did you mean 'annotations.json'? Then rename it", id="another name"
        ),
        pytest.param(
            ["labels.json"], "did you mean 'labels.json'? Then rename it", id="a far name, but the only one"
        ),
        pytest.param(
            ["x.json", "_annotations.json"], "did you mean '_annotations.json'?", id="the closest of two"
        ),
    ],
)
def test_a_missing_annotation_file_is_named_with_the_likely_one(present, hint, tmp_path):
    for name in present:
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError) as caught:
        read_split(tmp_path)
    assert hint in str(caught.value)


WHOLE = json.dumps(DOCUMENT)
CUT_OFF = "the file ends too early, like a copy that was cut off"


@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        pytest.param(WHOLE[:-1], CUT_OFF, id="last bracket missing"),
        pytest.param(WHOLE[: WHOLE.index("a.png") + 2], CUT_OFF, id="cut in a string"),
        pytest.param(WHOLE[: WHOLE.index("60") + 1], CUT_OFF, id="cut in a number"),
        pytest.param('{"images": [], "annotations": fals', CUT_OFF, id="cut in a word"),
        pytest.param("", CUT_OFF, id="empty file"),
        pytest.param('{"images": [],, "annotations": []}', "line 1 column 15 (char 14)", id="stray comma"),
        pytest.param("\ufeff" + WHOLE, "byte order mark", id="byte order mark"),
        pytest.param(b'{"images": "\xff"}', "is not UTF-8 text: byte 12 is 0xff", id="not UTF-8"),
        pytest.param("[" * 100_000, "is not usable JSON", id="100,000 brackets"),
        pytest.param(
            "[]", "it holds a list, not an object with 'images', 'annotations' and 'categories'", id="list"
        ),
        pytest.param(
            '{"images": [], "shapes": []}',
            "it has no 'annotations' and no 'categories', only ['images', 'shapes']",
            id="other keys",
        ),
        pytest.param(
            '{"images": {}, "annotations": [], "categories": []}',
            "'images' is a dict, not a list",
            id="dict of images",
        ),
        pytest.param(
            '{"images": [], "annotations": [{}, 5], "categories": []}',
            "annotations[1] is '5', not an object",
            id="number among annotations",
        ),
    ],
)
def test_an_unusable_file_is_explained(contents, problem, tmp_path):
    file = tmp_path / ANNOTATION_FILE
    file.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    with pytest.raises(DataError) as caught:
        read_coco(file)
    assert problem in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_valid_file_with_a_mistake_in_the_middle_is_not_called_cut_off(tmp_path):
    (tmp_path / "x.json").write_text(WHOLE.replace(":", "", 1))
    with pytest.raises(DataError) as caught:
        read_coco(tmp_path / "x.json")
    assert CUT_OFF not in str(caught.value)


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        pytest.param([0, 0, 60, 40], "", id="the whole image"),
        pytest.param([-0.5, 0, 61.5, 41], "", id="rounded past the edge"),
        pytest.param([0, 0, 10, 0], "has width 10 and height 0", id="flat box"),
        pytest.param([30, 30, -5, 8], "has width -5 and height 8", id="corners swapped"),
        pytest.param([50, 30, 58, 38], "leaves the image, which is 60 x 40", id="xyxy for xywh"),
        pytest.param([-20, 0, 30, 10], "leaves the image, which is 60 x 40", id="left of the image"),
        pytest.param([0, 0, math.nan, 4], "has a NaN or infinite number", id="NaN"),
        pytest.param([0, 0, 10**400, 4], "has a NaN or infinite number", id="a number of 400 digits"),
        pytest.param([0, 0, 5], "is not four numbers [x, y, width, height]", id="three numbers"),
        pytest.param([0, 0, "5", 5], "is not four numbers [x, y, width, height]", id="text"),
        pytest.param({"x": 0}, "is not four numbers [x, y, width, height]", id="dict"),
    ],
)
def test_box_problem(box, problem):
    assert box_problem(box, SIZE_HW) == problem


TRIANGLE = [0, 0, 9, 0, 9, 9]


@pytest.mark.parametrize(
    ("segmentation", "problem"),
    [
        pytest.param([TRIANGLE], "", id="polygon"),
        pytest.param([TRIANGLE, [1.5, 1, 5, 1, 5, 5, 1, 5]], "", id="two polygons"),
        pytest.param({"size": [40, 60], "counts": "abc"}, "", id="compressed run lengths"),
        pytest.param({"size": [40, 60], "counts": [400, 2000]}, "", id="plain run lengths"),
        pytest.param([], "is empty", id="no polygon"),
        pytest.param([[]], "has a polygon of 0 numbers; three points need 6", id="empty polygon"),
        pytest.param([TRIANGLE, [1, 2, 3, 4]], "has a polygon of 4 numbers; three points need 6", id="two points"),
        pytest.param([TRIANGLE + [1]], "has a polygon of 7 numbers, which is odd", id="odd count"),
        pytest.param([TRIANGLE[:5] + [math.inf]], "has a NaN or infinite number", id="infinite"),
        pytest.param([TRIANGLE[:5] + [None]], "has a polygon with something else than numbers", id="null"),
        pytest.param([[[0, 0], [9, 0], [9, 9]]], "has a polygon with something else than numbers", id="point pairs"),
        pytest.param(TRIANGLE, "is not a list of polygons, each a list [x1, y1, x2, y2, ...]", id="bare polygon"),
        pytest.param("mask.png", "is 'mask.png', neither polygons nor run lengths", id="file name"),
        pytest.param(
            {"size": [60, 40], "counts": "abc"},
            "has run lengths of size [60, 40]; the image needs [40, 60] (height, width)",
            id="size turned",
        ),
        pytest.param({"counts": "abc"}, "has run lengths of size None; the image needs [40, 60] (height, width)", id="no size"),
        pytest.param({"size": [40, 60], "counts": [5, 5]}, "has run lengths that do not fill the image", id="too short"),
        pytest.param({"size": [40, 60], "counts": None}, "has run lengths with counts None", id="no counts"),
    ],
)  # fmt: skip
def test_segmentation_problem(segmentation, problem):
    assert segmentation_problem(segmentation, SIZE_HW) == problem
