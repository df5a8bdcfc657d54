"""The kinds of problems: each mistake has its name and level, and all of them are in the documents."""

from pathlib import Path

import pytest
from broken_dataset import first, good_dataset

from sam3_lora.data import kinds
from sam3_lora.data.check import examine_dataset
from sam3_lora.data.names import poor_prompt
from sam3_lora.data.problems import Kind


@pytest.fixture
def dataset(tmp_path):
    return good_dataset(tmp_path / "shapes")


def as_xyxy(document):
    for annotation in document["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["bbox"] = [x, y, x + width, y + height]


def as_shares(document):
    for annotation in document["annotations"]:
        annotation["bbox"] = [value / 112 for value in annotation["bbox"]]


def rare_category(document):
    first, *_ = document["annotations"]
    document["annotations"] = [{**first, "id": n} for n in range(40)] + [
        {**first, "id": 99, "category_id": 2}
    ]
    document["annotations"] += [
        {**first, "id": 100 + i["id"], "image_id": i["id"]} for i in document["images"]
    ]


@pytest.mark.parametrize(
    ("change", "kind", "level"),
    [
        pytest.param(as_xyxy, "bbox with x2, y2 (xyxy) instead of width, height (xywh)", "error", id="xyxy"),
        pytest.param(as_shares, "normalised coordinates, shares of 1 instead of pixels", "error", id="normalised boxes"),
        pytest.param(first("annotations", segmentation=[[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]]), "normalised coordinates, shares of 1 instead of pixels", "error", id="normalised mask"),
        pytest.param(first("annotations", bbox=[1, 2, float("nan"), 5]), "bbox with NaN or an infinite number", "error", id="NaN box"),
        pytest.param(first("annotations", bbox=[1, 2, 0, 5]), "bbox of no size", "error", id="flat box"),
        pytest.param(first("annotations", bbox=[-50, 2, 80, 5]), "bbox outside the image", "error", id="box outside"),
        pytest.param(first("annotations", bbox="1 2 3 4"), "bad bbox", "error", id="box as text"),
        pytest.param(first("annotations", segmentation=[[1, 2, 3, 4]]), "polygon of fewer than three points", "error", id="two points"),
        pytest.param(first("annotations", segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "polygon of odd length", "error", id="odd polygon"),
        pytest.param(first("annotations", segmentation=[[1, 2, 3, 4, 5, float("inf")]]), "polygon with NaN or an infinite number", "error", id="infinite polygon"),
        pytest.param(first("annotations", segmentation=[[1, 2, 300, 4, 5, 300]]), "polygon outside the image", "error", id="polygon outside"),
        pytest.param(first("annotations", segmentation={"size": [112, 111], "counts": "a"}), "RLE of another size than the image", "error", id="RLE size"),
        pytest.param(first("annotations", segmentation={"size": [112, 112], "counts": "a"}), "RLE with bad counts", "error", id="RLE counts"),
        pytest.param(first("annotations", segmentation={"size": [112, 112], "counts": [112 * 112]}), "mask without pixels", "error", id="empty mask"),
        pytest.param(first("annotations", segmentation=[[100, 1, 110, 1, 110, 11]], bbox=[1, 90, 10, 10]), "mask that disagrees with its box", "error", id="mask elsewhere"),
        pytest.param(first("annotations", segmentation=[[5, 5, 5.4, 5, 5.4, 5.4]], bbox=[5, 5, 0.4, 0.4]), "tiny object", "warning", id="tiny"),
        pytest.param(lambda d: [a.update(image_id=1) for a in d["annotations"]], "image without objects", "warning", id="empty images"),
        pytest.param(rare_category, "imbalance of the categories", "warning", id="imbalance"),
        pytest.param(lambda d: d["categories"].append({"id": 9, "name": "shapes"}), "category without objects", "warning", id="unused category"),
        pytest.param(lambda d: d["categories"].append({"id": 9, "name": "shapes"}), "category that the other splits lack", "warning", id="category of one split"),
        pytest.param(first("categories", name="class_0"), "name that makes a poor prompt", "warning", id="poor name"),
        pytest.param(lambda d: d["images"].append({**d["images"][0], "id": 9}), "image listed twice", "warning", id="listed twice"),
        pytest.param(lambda d: d["images"].append({**d["images"][0], "id": 9, "file_name": "Image00001.PNG"}), "names that differ only by case", "warning", id="case"),
        pytest.param(first("images", file_name="../train/image00001.png"), "image path that is absolute or leaves the split by '..'", "warning", id="path with .."),
    ],
)  # fmt: skip
def test_each_kind_of_mistake_has_its_name_and_level(change, kind, level, dataset):
    dataset.edit(change)
    problems = {problem["kind"]: problem for problem in examine_dataset(dataset.folder).as_dict()["problems"]}
    assert problems[kind]["level"] == level
    assert problems[kind]["count"] >= 1
    assert problems[kind]["examples"]
    assert problems[kind]["fix"]


@pytest.mark.parametrize(
    "name", ["7", "class_0", "cls-07", "object", "Objects", "red_car", "redCar", "a", "รถ", "5f2c9a77d1"]
)
def test_names_that_make_poor_prompts(name):
    assert poor_prompt(name)


@pytest.mark.parametrize("name", ["red car", "dog", "T-shirt", "iPhone 12 case", "ox", "Labrador", "M&M"])
def test_names_that_make_good_prompts(name):
    assert poor_prompt(name) == ""


def test_every_kind_is_in_the_documents():
    page = (Path(__file__).parents[1] / "docs/how-to/check-your-data.md").read_text(encoding="utf-8")
    known = [*kinds.FIELD.values(), *(value for value in vars(kinds).values() if isinstance(value, Kind))]
    assert len(known) > 40
    assert [kind.name for kind in known if f"| {kind.name} | {kind.fix} |" not in page] == []
