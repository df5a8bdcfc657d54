"""Reading a COCO folder: what counts as one, what is said when it is not one, and what the split knows."""

import json

import pytest

from sam3_lora.data.coco import ANNOTATION_FILE, read_coco, read_split
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
