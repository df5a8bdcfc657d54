"""The check of a dataset: every mistake is found, named with its place, and answered with what to do."""

import json
import time

import pytest
from broken_dataset import CONCEPTS, first, good_dataset, repeated, without

from sam3_lora.data.check import check_dataset, check_splits, examine_dataset
from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.shapes import write_coco
from sam3_lora.errors import DataError


@pytest.fixture
def dataset(tmp_path):
    return good_dataset(tmp_path / "shapes")


def test_a_good_dataset_is_summed_up(dataset):
    summary = check_dataset(dataset.folder)
    train = json.loads(dataset.file().read_text())
    assert list(summary.splits) == ["train", "valid"]
    assert summary.splits["train"].images == 3
    assert summary.splits["train"].objects == len(train["annotations"])
    assert summary.splits["train"].prompts == ("red circle", "blue star")


def test_a_good_dataset_has_no_problem_at_all(dataset):
    assert examine_dataset(dataset.folder, images="pixels").as_dict() == {"problems": [], "ok": True}


def test_the_check_changes_nothing(dataset):
    before = {path: path.stat().st_mtime_ns for path in dataset.folder.rglob("*")}
    check_dataset(dataset.folder)
    assert before == {path: path.stat().st_mtime_ns for path in dataset.folder.rglob("*")}


def test_crowd_regions_are_fine(dataset):
    dataset.edit(lambda d: d["annotations"][0].update(iscrowd=1))
    check_dataset(dataset.folder)


def test_polygons_are_fine(dataset):
    triangle = {"segmentation": [[1, 1, 30, 1, 30.5, 30]], "bbox": [1, 1, 29.5, 29]}
    dataset.edit(lambda d: [a.update(triangle) for a in d["annotations"]])
    check_dataset(dataset.folder)


def test_area_is_only_needed_where_the_evaluation_reads_it(dataset):
    dataset.edit(lambda d: [a.pop("area") for a in d["annotations"]])
    (warning,) = check_dataset(dataset.folder).warnings
    assert warning.kind == "annotation without 'area' to train on"
    dataset.edit(lambda d: [a.pop("area") for a in d["annotations"]], split="valid")
    assert "annotation without 'area'" in dataset.report()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        pytest.param(
            "nowhere", "nowhere does not exist; a dataset is a folder with train/ and valid/", id="missing"
        ),
        pytest.param(
            f"shapes/train/{ANNOTATION_FILE}", f"{ANNOTATION_FILE} is a file; a dataset is", id="a file"
        ),
        pytest.param("shapes/train", "train is a single split; give the folder above it", id="a split"),
    ],
)
def test_a_folder_that_is_no_dataset(given, problem, dataset, tmp_path):
    with pytest.raises(DataError) as caught:
        check_dataset(tmp_path / given)
    assert problem in str(caught.value)


@pytest.mark.parametrize("name", ["val", "validation", "Valid"])
def test_a_split_of_another_name_is_recognised(name, dataset):
    (dataset.folder / "valid").rename(dataset.folder / name)
    assert f"did you mean {name!r}? Then rename it" in dataset.report()


def test_a_renamed_annotation_file_is_recognised(dataset):
    dataset.file("valid").rename(dataset.folder / "valid/annotations.json")
    assert (
        f"no {ANNOTATION_FILE!r} in {dataset.folder / 'valid'}; did you mean 'annotations.json'?"
        in dataset.report()
    )


def test_half_a_json_file(dataset):
    text = dataset.file().read_text()
    dataset.file().write_text(text[: len(text) // 2])
    report = dataset.report()
    assert f"unusable annotation file: {dataset.file()} is not valid JSON" in report
    assert "the file ends too early" in report


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param(lambda d: d.pop("categories"), "is not a COCO document: it has no 'categories'", id="no categories key"),
        pytest.param(lambda d: d.update(images=[], annotations=[]), "split without images", id="no images"),
        pytest.param(lambda d: d.update(annotations=[]), "split without annotations", id="no annotations"),
        pytest.param(lambda d: d.update(categories=[]), "split without categories", id="no categories"),
        pytest.param(repeated("images"), "id used twice: {file}: image 1\n", id="image id twice"),
        pytest.param(repeated("annotations"), "id used twice: {file}: annotation 1\n", id="annotation id twice"),
        pytest.param(repeated("categories", name="x"), "id used twice: {file}: category 1\n", id="category id twice"),
        pytest.param(without("annotations", "id"), "annotation at position 0 has id None", id="no annotation id"),
        pytest.param(first("images", id="a"), "image at position 0 has id 'a'", id="image id is text"),
        pytest.param(first("images", id=[1]), "image at position 0 has id [1]", id="image id is a list"),
        pytest.param(first("annotations", image_id=99), "annotation 1 has image_id 99", id="unknown image"),
        pytest.param(first("annotations", image_id="1"), "annotation 1 has image_id '1'", id="image id as text"),
        pytest.param(first("annotations", category_id=0), "annotation 1 of 'image00001.png' has category_id 0", id="unknown category"),
        pytest.param(first("categories", name=" "), "category 1 has the name ' '", id="blank name"),
        pytest.param(without("categories", "name"), "category 1 has the name None", id="no name"),
        pytest.param(first("categories", name="Blue  Star"), "categories 1 and 2 are both 'blue star'", id="same prompt"),
        pytest.param(without("annotations", "iscrowd"), "annotation without 'iscrowd': {file}: annotation 1", id="no iscrowd"),
        pytest.param(first("annotations", iscrowd="no"), "has 'no', which is neither 0 nor 1", id="odd iscrowd"),
        pytest.param(without("annotations", "bbox"), "annotation without 'bbox': {file}: annotation 1", id="no bbox"),
        pytest.param(without("annotations", "segmentation"), "annotation without 'segmentation': {file}", id="no segmentation"),
        pytest.param(first("annotations", segmentation=None), "annotation without 'segmentation'", id="null segmentation"),
        pytest.param(first("annotations", segmentation=[]), "segmentation is empty", id="empty segmentation"),
        pytest.param(first("annotations", segmentation=[[1, 2, 3, 4]]), "segmentation has a polygon of 4 numbers", id="two points"),
        pytest.param(first("annotations", bbox=[1, 2, 0, 5]), "bbox [1, 2, 0, 5] has width 0 and height 5", id="flat box"),
        pytest.param(first("annotations", bbox=[90, 9, 99, 99]), "leaves the image, which is 112 x 112", id="box outside"),
        pytest.param(first("annotations", bbox=[1, 2, float("nan"), 5]), "has a NaN or infinite number", id="NaN box"),
        pytest.param(without("images", "file_name"), "image without 'file_name': {file}: image 1", id="no file name"),
        pytest.param(without("images", "width"), "image without 'width' and 'height'", id="no width"),
        pytest.param(first("images", height=0), "image without 'width' and 'height'", id="height 0"),
        pytest.param(first("images", file_name="b.png"), "missing image file: {folder}/b.png (image 1 of", id="missing image"),
        pytest.param(first("images", file_name="train/image00001.png"), "there is 'image00001.png'", id="folder in the name"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_annotations_is_named(change, problem, dataset):
    dataset.edit(change)
    assert problem.format(file=dataset.file(), folder=dataset.folder / "train") in dataset.report()


def test_annotations_may_stand_before_the_images_and_categories_that_they_are_of(dataset):
    good = check_dataset(dataset.folder)
    document = json.loads(dataset.file().read_text())
    order = ("annotations", "images", "categories")
    dataset.file().write_text(json.dumps({key: document[key] for key in order}))
    assert check_dataset(dataset.folder) == good


def test_masks_are_asked_for_where_they_are_trained(dataset):
    dataset.edit(lambda d: [a.pop("segmentation") for a in d["annotations"]])
    assert "annotation without 'segmentation'" in dataset.report()
    assert check_dataset(dataset.folder, masks=False).splits["train"].images == 3
    assert check_dataset(dataset.folder, masks=None).splits["train"].images == 3


def test_a_single_mask_makes_all_of_its_split_need_one(dataset):
    dataset.edit(lambda d: [a.pop("segmentation") for a in d["annotations"][1:]])
    with pytest.raises(DataError, match="annotation without 'segmentation'"):
        check_dataset(dataset.folder, masks=None)


def test_splits_may_lie_anywhere(dataset, tmp_path):
    dataset.file().rename(tmp_path / "labels.json")
    files = {"train": (dataset.folder / "train", tmp_path / "labels.json")}
    assert check_splits(files).splits["train"].images == 3


def test_a_single_problem_is_a_short_message(dataset):
    (dataset.folder / "train/image00002.png").unlink()
    assert dataset.report() == (
        f"{dataset.folder} cannot be used: missing image file: {dataset.folder}/train/image00002.png "
        f"(image 2 of {dataset.file()})\n"
        "  -> copy it there, or delete the image and its annotations from the file"
    )


def test_many_problems_come_in_one_report_grouped_and_counted(dataset):
    dataset.edit(lambda d: [(a.pop("iscrowd"), a.update(image_id=1)) for a in d["annotations"]])
    dataset.edit(
        lambda d: d["annotations"].extend([{**d["annotations"][0], "id": n} for n in range(100, 140)])
    )
    dataset.edit(first("annotations", bbox=[5, 5, 0, 9]))
    (dataset.folder / "valid/image00001.png").unlink()
    count = len(json.loads(dataset.file().read_text())["annotations"])
    assert (
        dataset.report()
        == f"""\
{dataset.folder} cannot be used: {count + 2} problems
  annotation without 'iscrowd' ({count})
    {dataset.file()}: annotation 1 of 'image00001.png'
    {dataset.file()}: annotation 2 of 'image00001.png'
    {dataset.file()}: annotation 3 of 'image00001.png'
    ... and {count - 3} more
    -> add "iscrowd": 0 to each annotation, or 1 where a mask covers a crowd; the official loader reads it always
  bbox of no size
    {dataset.file()}: annotation 1 of 'image00001.png': bbox [5, 5, 0, 9] has width 0 and height 9
    -> draw the box again, make it from the mask or delete the annotation
  missing image file
    {dataset.folder}/valid/image00001.png (image 1 of {dataset.file("valid")})
    -> copy it there, or delete the image and its annotations from the file"""
    )


def test_a_broken_split_does_not_hide_the_problems_of_the_other(dataset):
    dataset.file("valid").write_text("{")
    dataset.edit(first("annotations", image_id=99))
    report = dataset.report()
    assert "unusable annotation file" in report
    assert "annotation of an unknown image" in report


def test_a_thousand_images_take_seconds(tmp_path):
    write_coco(tmp_path / "train", CONCEPTS, 20, seed=0)
    document = json.loads((tmp_path / "train" / ANNOTATION_FILE).read_text())
    document["images"] = [{**document["images"][n % 20], "id": n} for n in range(1, 1001)]
    (tmp_path / "train" / ANNOTATION_FILE).write_text(json.dumps(document))
    start = time.process_time()
    check_dataset(tmp_path, splits=["train"])
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    "name", ["a\0b.png", "a" * 5000, "", "..", "/", "\ud800.png", "train\\image00001.png"]
)
def test_hostile_file_names_are_missing_images(name, dataset):
    dataset.edit(first("images", file_name=name))
    assert "missing image file" in dataset.report() or not name


def test_values_nested_900_deep_are_named_in_short(dataset):
    nested = json.loads("[" * 900 + "]" * 900)
    dataset.edit(first("annotations", bbox=nested, iscrowd=nested, category_id=nested))
    report = dataset.report()
    assert "bad bbox" in report
    assert len(report) < 5000


def test_names_cannot_do_anything_to_a_terminal(dataset):
    dataset.edit(first("images", file_name="\x1b[31m\nred \udcff.png"))
    report = dataset.report()
    assert r"\x1b[31m\nred \udcff.png" in report
    assert "\x1b" not in report


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        pytest.param(first("images", width=10**400), "image without 'width' and 'height'", id="width of 400 digits"),
        pytest.param(first("images", id=10**30), "entry without a whole number as 'id'", id="id of 30 digits"),
        pytest.param(first("annotations", bbox=[10**400, 1, 2, 3]), "bbox with NaN or an infinite number", id="box"),
    ],
)  # fmt: skip
def test_numbers_that_no_tensor_can_hold(change, kind, dataset):
    dataset.edit(change)
    assert kind in dataset.report()
