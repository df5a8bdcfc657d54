"""The repaired copy: it passes the check, what is certain was put right, and the dataset itself stays as it was."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3_lora.cli import main
from sam3_lora.data.check import check_dataset, examine_dataset
from sam3_lora.data.coco import ANNOTATION_FILE, mask_to_run_lengths
from sam3_lora.data.repair import repair_dataset
from sam3_lora.errors import DataError, OutputError

WIDTH, HEIGHT = 120, 80
BOX = [10, 10, 40, 20]
POLYGON = [10, 10, 50, 10, 50, 30, 10, 30]


def picture(seed: int, size=(WIDTH, HEIGHT)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.NEAREST)


class Dataset:
    """Two splits of three images with two boxes each, to be broken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for seed, split in enumerate(("train", "valid")):
            (folder / split).mkdir(parents=True)
            images = [{"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for n in (1, 2, 3)]
            for image in images:
                picture(seed * 100 + image["id"]).save(folder / split / image["file_name"])
            annotations = [
                {"id": n, "image_id": 1 + n % 3, "category_id": 1 + n % 2, "bbox": list(BOX), "area": 800, "iscrowd": 0, "segmentation": [list(POLYGON)]}
                for n in range(6)
            ]  # fmt: skip
            self.write(
                {
                    "images": images,
                    "annotations": annotations,
                    "categories": [{"id": 1, "name": "red car"}, {"id": 2, "name": "tree"}],
                },
                split,
            )

    def write(self, document, split="train"):
        (self.folder / split / ANNOTATION_FILE).write_text(json.dumps(document))

    def read(self, split="train", folder=None):
        return json.loads(((folder or self.folder) / split / ANNOTATION_FILE).read_text())

    def edit(self, change, split="train"):
        document = self.read(split)
        change(document)
        self.write(document, split)

    def state(self):
        """Return every path with its contents and the time of its last change."""
        return {
            path: (path.lstat().st_mtime_ns, path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest())
            for path in sorted(self.folder.rglob("*"))
        }


@pytest.fixture
def dataset(tmp_path):
    return Dataset(tmp_path / "data")


def done(repair):
    return {each.kind: each.count for each in repair.done}


def repaired(dataset, tmp_path, **options):
    """Repair, and return the repair with the training split of the copy."""
    before = dataset.state()
    repair = repair_dataset(dataset.folder, tmp_path / "out", **options)
    assert dataset.state() == before
    check_dataset(tmp_path / "out", masks=options.get("masks", True))
    return repair, dataset.read(folder=tmp_path / "out")


def first(key, **values):
    return lambda document: document[key][0].update(values)


def without(key, name):
    return lambda document: [entry.pop(name) for entry in document[key]]


def test_nothing_is_done_to_a_good_dataset(dataset, tmp_path):
    repair, train = repaired(dataset, tmp_path)
    assert repair.done == ()
    assert train == dataset.read()
    for image in (dataset.folder / "train").glob("*.png"):
        copy = tmp_path / "out/train" / image.name
        assert copy.read_bytes() == image.read_bytes()
        assert copy.stat().st_ino != image.stat().st_ino


RLE = mask_to_run_lengths(np.pad(np.ones((20, 40), bool), ((10, 50), (10, 70))))


@pytest.mark.parametrize(
    ("change", "what", "expected"),
    [
        pytest.param(without("annotations", "iscrowd"), "iscrowd added", {"iscrowd": 0}, id="no iscrowd"),
        pytest.param(first("annotations", iscrowd="1"), "iscrowd corrected", {"iscrowd": 1}, id="iscrowd as text"),
        pytest.param(without("annotations", "area"), "area worked out", {"area": 800}, id="no area"),
        pytest.param(without("annotations", "bbox"), "bbox made from the mask: annotation without 'bbox'", {"bbox": BOX}, id="no box"),
        pytest.param(first("annotations", bbox=[10, 10, 50, 30]), None, {"bbox": [10, 10, 50, 30]}, id="box a little large"),
        pytest.param(first("annotations", bbox=[90, 60, 9, 9]), "bbox made from the mask: mask that disagrees with its box", {"bbox": BOX}, id="box elsewhere"),
        pytest.param(first("annotations", bbox=[float("nan"), 10, 40, 20]), "bbox made from the mask: bbox with NaN or an infinite number", {"bbox": BOX}, id="NaN"),
        pytest.param(first("annotations", bbox=[0.1, 0.1, 0.3, 0.2]), "bbox made from the mask: normalised coordinates, shares of 1 instead of pixels", {"bbox": BOX}, id="normalised box"),
        pytest.param(first("annotations", segmentation=[[v / (HEIGHT if k % 2 else WIDTH) for k, v in enumerate(POLYGON)]]), "mask scaled from shares of 1 to pixels", {"bbox": BOX, "segmentation": [pytest.approx(POLYGON)]}, id="normalised mask"),
        pytest.param(first("annotations", segmentation=[POLYGON, [1, 2, 3, 4]]), "polygons of a mask deleted: too few points, odd length, NaN or no numbers", {"segmentation": [POLYGON]}, id="one bad part"),
        pytest.param(first("annotations", segmentation=[[-30, 10, 50, 10, 50, 30, -30, 30]], bbox=[-30, 10, 80, 20]), "mask cut at the edges of the image", {"bbox": [0, 10, 50, 20]}, id="mask outside"),
        pytest.param(first("annotations", segmentation=RLE, bbox=None), "bbox made from the mask: annotation without 'bbox'", {"bbox": BOX, "segmentation": RLE}, id="RLE"),
        pytest.param(first("annotations", id=3), "annotation renumbered", {"id": 3}, id="id twice"),
        pytest.param(lambda d: (d["categories"].append({"id": 5, "name": "Red  Car"}), d["annotations"][0].update(category_id=5)), "categories of one name merged", {"category_id": 1}, id="same prompt"),
        pytest.param(lambda d: [entry.update(id=str(entry["id"])) for key in ("images", "annotations", "categories") for entry in d[key]], None, {"id": 0}, id="ids as text"),
    ],
)  # fmt: skip
def test_what_is_certain_is_put_right(change, what, expected, dataset, tmp_path):
    dataset.edit(change)
    repair, train = repaired(dataset, tmp_path)
    assert what in done(repair) if what else repair.done == ()
    assert {key: train["annotations"][0][key] for key in expected} == expected
    assert len(train["annotations"]) == 6


@pytest.mark.parametrize(
    ("change", "what", "left"),
    [
        pytest.param(first("annotations", segmentation=None), "annotation deleted: without a usable mask", 5, id="no mask"),
        pytest.param(first("annotations", segmentation={"size": [5, 5], "counts": "a"}), "annotation deleted: without a usable mask", 5, id="RLE of another size"),
        pytest.param(first("annotations", segmentation=[[1, 2, 3, 4, 5]]), "annotation deleted: without a usable mask", 5, id="only bad polygons"),
        pytest.param(first("annotations", image_id=9), "annotation deleted: of no image that is left", 5, id="unknown image"),
        pytest.param(first("annotations", category_id=9), "annotation deleted: of no category that is left", 5, id="unknown category"),
        pytest.param(first("images", file_name="gone.png"), "image deleted: its file is missing", 4, id="missing image"),
        pytest.param(first("images", width=70), "image deleted: its size is not that of its file, and its labels may be for either", 4, id="another size"),
        pytest.param(first("categories", name=" "), "category deleted: without a name", 3, id="no name"),
        pytest.param(lambda d: d["images"].append({**d["images"][0], "file_name": "2.png"}), "images deleted: different ones with one id", 4, id="image id twice"),
    ],
)  # fmt: skip
def test_what_is_not_certain_goes_and_is_told(change, what, left, dataset, tmp_path):
    dataset.edit(change)
    repair, train = repaired(dataset, tmp_path)
    assert what in done(repair)
    assert len(train["annotations"]) == left


def boxes(*values):
    def change(document):
        for annotation in document["annotations"]:
            annotation.pop("segmentation")
            annotation["bbox"] = list(values[annotation["id"] % len(values)])

    return change


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param([(10, 10, 50, 30), (60, 40, 110, 70)], {(10, 10, 40, 20), (60, 40, 50, 30)}, id="xyxy"),
        pytest.param([(0.1, 0.1, 0.3, 0.2), (0.6, 0.6, 0.4, 0.3)], {(12, 8, 36, 16), (72, 48, 48, 24)}, id="shares xywh"),
        pytest.param([(0.8, 0.5, 0.4, 0.2)], {(72, 32, 48, 16)}, id="shares of centre and size"),
        pytest.param([(95, 60, 30, 20)], {(95, 60, 25, 20)}, id="over the edge"),
    ],
)  # fmt: skip
def test_boxes_without_masks_are_read_as_all_of_the_file_agree(given, expected, dataset, tmp_path):
    dataset.edit(boxes(*given))
    dataset.edit(boxes(BOX), "valid")
    _, train = repaired(dataset, tmp_path, masks=False)
    assert {tuple(round(v, 6) for v in a["bbox"]) for a in train["annotations"]} == expected


def test_shares_that_may_mean_two_things_go(dataset, tmp_path):
    dataset.edit(boxes((0.4, 0.4, 0.2, 0.2), BOX))
    dataset.edit(boxes(BOX), "valid")
    repair, train = repaired(dataset, tmp_path, masks=False)
    assert done(repair)["annotation deleted: without a usable box or mask"] == 3
    assert len(train["annotations"]) == 3


def test_labels_follow_an_image_that_was_resized_after_labelling(dataset, tmp_path):
    picture(1, (2 * WIDTH, 2 * HEIGHT)).save(dataset.folder / "train/1.png")
    dataset.edit(lambda d: d["annotations"][3].update(segmentation=RLE))
    _, train = repaired(dataset, tmp_path)
    of_first = [annotation for annotation in train["annotations"] if annotation["image_id"] == 1]
    assert train["images"][0]["width"] == 2 * WIDTH
    assert [annotation["bbox"] for annotation in of_first] == [[20, 20, 80, 40]] * 2
    assert [annotation["area"] for annotation in of_first] == [3200, 3200]
    assert of_first[0]["segmentation"] == [[2 * value for value in POLYGON]]
    assert of_first[1]["segmentation"]["size"] == [2 * HEIGHT, 2 * WIDTH]


def test_an_image_that_was_labelled_upright_is_saved_so(dataset, tmp_path):
    upright = picture(1)
    exif = upright.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to the right to see it upright
    upright.rotate(90, expand=True).save(dataset.folder / "train/1.jpg", exif=exif, quality=95)
    dataset.edit(first("images", file_name="1.jpg"))
    repaired(dataset, tmp_path)
    with Image.open(tmp_path / "out/train/1.jpg") as image:
        assert image.size == (WIDTH, HEIGHT)
        assert 0x0112 not in image.getexif()
        assert (
            np.abs(np.asarray(image, int) - np.asarray(upright, int)).mean() < 12
        )  # the compression of noise


@pytest.mark.parametrize(
    ("image", "name"),
    [
        pytest.param(Image.fromarray(np.full((HEIGHT, WIDTH), 32896, np.uint16)), "1.png", id="16 bits"),
        pytest.param(Image.new("RGB", (WIDTH, HEIGHT), (128, 128, 128)).convert("CMYK"), "1.jpg", id="CMYK"),
        pytest.param(Image.new("RGBA", (WIDTH, HEIGHT), (128, 128, 128, 7)), "1.png", id="alpha"),
        pytest.param(Image.fromarray(np.full((HEIGHT, WIDTH), 32896, np.uint16)), "1.tif", id="TIFF of 16 bits"),
    ],
)  # fmt: skip
def test_a_picture_that_the_trainer_misreads_is_saved_in_8_bit_rgb(image, name, dataset, tmp_path):
    image.save(dataset.folder / "train" / name)
    dataset.edit(first("images", file_name=name))
    repaired(dataset, tmp_path)
    assert not examine_dataset(tmp_path / "out", images="pixels").warnings
    with Image.open(tmp_path / "out/train" / name) as saved:
        assert saved.mode == "RGB"
        assert np.abs(np.asarray(saved, int) - 128).max() <= 2


def test_images_from_outside_are_copied_in_under_names_of_their_own(dataset, tmp_path):
    (dataset.folder / "train/1.png").rename(tmp_path / "1.png")
    (dataset.folder / "train/2.png").rename(dataset.folder / "2.png")
    (dataset.folder / "train/3.png").rename(tmp_path / "3.png")
    (dataset.folder / "train/3.png").symlink_to(tmp_path / "3.png")
    names = [str(tmp_path / "1.png"), "../2.png", "3.png"]
    dataset.edit(
        lambda d: [image.update(file_name=name) for image, name in zip(d["images"], names, strict=True)]
    )
    repair, train = repaired(dataset, tmp_path)
    assert [image["file_name"] for image in train["images"]] == ["1.png", "2.png", "3.png"]
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert repair.report.problems == ()


def test_names_that_differ_by_case_and_wrong_slashes_are_put_right(dataset, tmp_path):
    (dataset.folder / "train/a").mkdir()
    picture(7).save(dataset.folder / "train/a/x.PNG")
    picture(8).save(dataset.folder / "train/A.png")
    picture(9).save(dataset.folder / "train/a.png")
    names = ["a\\x.png", "A.png", "a.png"]
    dataset.edit(
        lambda d: [image.update(file_name=name) for image, name in zip(d["images"], names, strict=True)]
    )
    _, train = repaired(dataset, tmp_path)
    assert [image["file_name"] for image in train["images"]] == ["x.PNG", "A.png", "a-2.png"]


def test_two_entries_of_one_image_become_one(dataset, tmp_path):
    dataset.edit(
        lambda d: (d["images"].append({**d["images"][0], "id": 9}), d["annotations"][0].update(image_id=9))
    )
    _, train = repaired(dataset, tmp_path)
    assert [image["id"] for image in train["images"]] == [1, 2, 3]
    assert train["annotations"][0]["image_id"] == 1


def test_folders_files_and_byte_order_marks_are_put_right(dataset, tmp_path):
    (dataset.folder / "valid").rename(dataset.folder / "Val")
    (dataset.folder / "Val" / ANNOTATION_FILE).rename(dataset.folder / "Val/labels.json")
    file = dataset.folder / "train" / ANNOTATION_FILE
    file.write_text("\ufeff" + file.read_text(), encoding="utf-8")
    repair, _ = repaired(dataset, tmp_path)
    assert {"split renamed", "annotation file renamed"} <= done(repair).keys()


@pytest.mark.parametrize(
    ("breaks", "problem"),
    [
        pytest.param(lambda d: (d.folder / "valid" / ANNOTATION_FILE).write_text("{"), "is not valid JSON", id="half a file"),
        pytest.param(lambda d: (d.folder / "valid").rename(d.folder / "other"), "has no folder 'valid'", id="no split"),
        pytest.param(lambda d: d.edit(lambda doc: doc.update(annotations=[])), "split without annotations", id="no annotations"),
    ],
)  # fmt: skip
def test_what_cannot_be_repaired_leaves_nothing_behind(breaks, problem, dataset, tmp_path):
    breaks(dataset)
    before = dataset.state()
    with pytest.raises(DataError, match=problem):
        repair_dataset(dataset.folder, tmp_path / "out")
    assert dataset.state() == before
    assert os.listdir(tmp_path) == ["data"]


@pytest.mark.parametrize("place", ["out", "data/out", "data", "data/train"])
def test_the_copy_never_goes_where_something_is_nor_into_the_dataset(place, dataset, tmp_path):
    (tmp_path / "out").mkdir()
    before = dataset.state()
    with pytest.raises(OutputError, match=r"exists already|lies in the dataset"):
        repair_dataset(dataset.folder, tmp_path / place)
    assert dataset.state() == before


def test_the_command_tells_what_it_did_and_succeeds_if_the_copy_is_good(dataset, tmp_path, capsys):
    dataset.edit(without("annotations", "iscrowd"))
    out = tmp_path / "out"
    assert main(["data", "check", str(dataset.folder), "--json", "--processes", "1"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert [(p["kind"], p["count"]) for p in found["problems"]] == [("annotation without 'iscrowd'", 6)]
    assert main(["data", "check", str(dataset.folder), "--fix", str(out), "--json", "--processes", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["problems"] == found["problems"]
    assert result["repaired"]["ok"]
    assert result["repaired"]["done"][0]["count"] == 6
    assert main(["data", "check", str(out), "--processes", "1"]) == 0
    assert capsys.readouterr().out == f"{out} can be used: 0 errors, 0 warnings\n"
    assert main(["data", "check", str(dataset.folder), "--fix", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
