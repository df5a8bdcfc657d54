"""Image files: what is damaged, what the trainer reads otherwise than people see it, and what is in two splits."""

import random

import pytest
from broken_dataset import CONCEPTS, first, good_dataset
from PIL import Image

from sam3_lora.data.check import check_dataset, examine_dataset
from sam3_lora.data.shapes import write_coco


@pytest.fixture
def dataset(tmp_path):
    return good_dataset(tmp_path / "shapes")


def test_a_size_that_the_file_does_not_have(dataset):
    dataset.edit(first("images", width=200, height=100, file_name="photo.png"))
    Image.new("RGB", (100, 200)).save(dataset.folder / "train/photo.png")
    assert (
        f"image 1 is 200 x 100, its file {dataset.folder / 'train/photo.png'} is 100 x 200"
        in dataset.report()
    )


NOISE = Image.frombytes("RGB", (112, 112), random.Random(0).randbytes(112 * 112 * 3))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif"])
def test_a_whole_image_passes_and_half_of_it_does_not(suffix, dataset):
    photo = dataset.folder / f"train/photo{suffix}"
    NOISE.save(photo)
    dataset.edit(first("images", file_name=photo.name))
    check_dataset(dataset.folder)
    photo.write_bytes(photo.read_bytes()[: photo.stat().st_size // 2])
    assert f"unreadable image file: {photo} is damaged: " in dataset.report()


@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        pytest.param(b"", "is empty", id="no bytes"),
        pytest.param(
            b"version https://git-lfs.github.com/spec/v1\n", "is not an image", id="Git LFS pointer"
        ),
    ],
)
def test_a_file_that_is_no_image(contents, problem, dataset):
    photo = dataset.folder / "train/image00001.png"
    photo.write_bytes(contents)
    assert f"unreadable image file: {photo} {problem}" in dataset.report()


def test_bytes_after_the_end_of_a_photo_are_fine(dataset):
    photo = dataset.folder / "train/photo.jpg"
    NOISE.save(photo)
    photo.write_bytes(photo.read_bytes() + bytes(10_000))
    dataset.edit(first("images", file_name=photo.name))
    check_dataset(dataset.folder)


def turned(image: Image.Image) -> dict:
    exif = image.getexif()
    exif[0x0112] = 6
    return {"exif": exif}


@pytest.mark.parametrize(
    ("image", "name", "entry", "kind", "level"),
    [
        pytest.param(NOISE.convert("L").point(lambda v: v * 200, "I").convert("I;16"), "a.png", {}, "image of 16 bits or floats", "warning", id="16 bits"),
        pytest.param(NOISE.convert("CMYK"), "a.jpg", {}, "CMYK image", "warning", id="CMYK"),
        pytest.param(Image.merge("RGBA", (*NOISE.split(), NOISE.getchannel(0))), "a.png", {}, "image with an alpha channel", "warning", id="alpha"),
        pytest.param("turned", "a.jpg", {}, "image with an EXIF rotation", "warning", id="EXIF rotation"),
        pytest.param("turned", "a.jpg", {"width": 60}, "image that was labelled turned by its EXIF rotation", "error", id="labelled upright"),
    ],
)  # fmt: skip
def test_pictures_that_the_trainer_reads_otherwise_than_people_see_them(
    image, name, entry, kind, level, dataset
):
    photo = dataset.folder / "train" / name
    if image == "turned":
        picture = NOISE.crop((0, 0, 112, 112 if not entry else 60))
        picture.save(photo, **turned(picture))
        entry = {"width": 60, "height": 112} if entry else {}
    else:
        image.save(photo)
    dataset.edit(lambda d: d["annotations"].clear() or d["annotations"].append(ANNOTATION))
    dataset.edit(first("images", file_name=name, **entry))
    problems = {
        problem.kind: problem for problem in examine_dataset(dataset.folder, images="pixels").problems
    }
    assert problems[kind].level == level
    assert str(photo) in problems[kind].examples[0]


ANNOTATION = {
    "id": 1,
    "image_id": 1,
    "category_id": 1,
    "iscrowd": 0,
    "area": 50,
    "bbox": [1, 1, 40, 40],
    "segmentation": [[1, 1, 41, 1, 41, 41]],
}


def test_an_opaque_alpha_channel_is_none(dataset):
    NOISE.convert("RGBA").save(dataset.folder / "train/image00001.png")
    assert examine_dataset(dataset.folder, images="pixels").problems == ()


def test_an_image_behind_a_link_is_told(dataset, tmp_path):
    photo = dataset.folder / "train/image00001.png"
    photo.rename(tmp_path / "elsewhere.png")
    photo.symlink_to(tmp_path / "elsewhere.png")
    (problem,) = examine_dataset(dataset.folder).problems
    assert (problem.kind, problem.level) == ("image behind a symbolic link", "warning")


def test_a_name_of_another_case_is_recognised(dataset):
    (dataset.folder / "train/image00001.png").rename(dataset.folder / "train/IMAGE00001.png")
    assert "there is 'IMAGE00001.png', which differs by case" in dataset.report()


def test_the_same_picture_in_two_splits_is_found_in_another_size_and_format(dataset):
    with Image.open(dataset.folder / "train/image00002.png") as image:
        image.resize((90, 90)).save(dataset.folder / "valid/copy.jpg", quality=60)
    dataset.edit(
        lambda d: d["images"].append({"id": 9, "file_name": "copy.jpg", "width": 90, "height": 90}), "valid"
    )
    kinds = {problem.kind: problem for problem in examine_dataset(dataset.folder, images="pixels").problems}
    problem = kinds["same image in two splits"]
    assert (problem.count, problem.level) == (1, "warning")
    assert "image00002.png" in problem.examples[0]
    assert "copy.jpg" in problem.examples[0]


def test_several_processes_find_the_same(tmp_path):
    write_coco(tmp_path / "train", CONCEPTS, 70, seed=0)
    write_coco(tmp_path / "valid", CONCEPTS, 2, seed=1)
    (tmp_path / "train/image00007.png").write_bytes(b"x")
    (tmp_path / "train/image00068.png").unlink()
    alone = examine_dataset(tmp_path, images="pixels")
    assert not alone.ok
    assert examine_dataset(tmp_path, images="pixels", processes=2) == alone
