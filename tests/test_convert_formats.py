"""Labels of every format become the masks that were drawn, pixel by pixel: on files that the tools themselves wrote, and on
files after their documentation where the tool runs in a browser or on a server only."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from drawn_shapes import (
    HEIGHT,
    PAIR,
    RING,
    SAMPLES,
    SIZE,
    TRIANGLE,
    TRIANGLE_XY,
    WIDTH,
    X,
    Y,
    assert_masks,
    masks_of,
    picture,
    rectangle,
)

from sam3_lora.data.check import check_dataset
from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.convert import convert_dataset
from sam3_lora.errors import DataError

RING_AND_TRIANGLE = [("red ring", RING), ("triangle", TRIANGLE)]
BOX = [("triangle", rectangle(3, 4, 20, 10))]


@pytest.mark.parametrize(
    ("sample", "third"),
    [
        pytest.param("cvat", BOX, id="CVAT, written by Datumaro"),
        pytest.param("coco", BOX, id="COCO, written by Datumaro"),
    ],
)
def test_masks_of_real_tools_are_kept_pixel_by_pixel(sample, third, tmp_path):
    made = convert_dataset(SAMPLES / sample, tmp_path / "d")
    assert made.format == sample
    assert_masks(
        tmp_path / "d", {"img0.png": RING_AND_TRIANGLE, "img1.png": [("pair", PAIR)], "img2.png": third}
    )
    assert made.images == {"train": 2, "valid": 1}  # as the sample has it
    check_dataset(tmp_path / "d")


def test_pascal_voc_as_datumaro_writes_it(tmp_path):
    made = convert_dataset(SAMPLES / "voc", tmp_path / "d")
    expected = {"img0.png": [("red ring", RING)], "img1.png": [("pair", PAIR)], "img2.png": BOX}
    assert_masks(tmp_path / "d", expected)
    assert [(note.kind, note.count) for note in made.notes] == [("box written as a mask", 1)]
    check_dataset(tmp_path / "d")


def test_labelme_writes_polygons_masks_groups_and_circles(tmp_path):
    made = convert_dataset(SAMPLES / "labelme", tmp_path / "d")
    disc = (X + 0.5 - 20) ** 2 + (Y + 0.5 - 20) ** 2 < 10**2
    found = masks_of(tmp_path / "d")
    (_, circle) = found["img1.png"].pop()
    assert (circle & disc).sum() / (circle | disc).sum() > 0.97  # of 312 pixels
    assert np.array_equal(found["img1.png"][0][1], PAIR)  # two shapes of one group_id
    assert np.array_equal(found["img0.png"][0][1], RING)
    assert np.array_equal(found["img0.png"][1][1], TRIANGLE)
    assert found["img2.png"] == []  # looked at, and nothing on it
    assert [note.kind for note in made.notes] == ["line, point or track without an area, left out"]
    check_dataset(tmp_path / "d")


def test_the_image_in_a_labelme_file_is_used_where_there_is_no_other(tmp_path):
    shutil.copytree(SAMPLES / "labelme", tmp_path / "source")
    (tmp_path / "source/img0.png").unlink()
    convert_dataset(tmp_path / "source", tmp_path / "d")
    (stored,) = (tmp_path / "d").glob("*/img0.png")
    assert stored.read_bytes() == (SAMPLES / "labelme/img0.png").read_bytes()


def test_a_dataset_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    expected = [("red ring", RING), ("pair", PAIR)], [("pair", PAIR)], []
    for source in (SAMPLES / "huggingface", datasets.load_from_disk(str(SAMPLES / "huggingface"))):
        made = convert_dataset(source, tmp_path / "d", overwrite=True)
        for split in ("train", "validation"):
            found = masks_of(tmp_path / "d")
            for row, objects in enumerate(expected):
                mask = found[f"{split}_{row:06d}.png"]
                assert [(n, m.tolist()) for n, m in mask] == [(n, m.tolist()) for n, m in objects]
        assert made.images == {"train": 3, "valid": 3}


def yolo(folder: Path, rows, names=("red ring", "triangle"), image="images/train/a.png") -> Path:
    picture(folder / image)
    label = (folder / image.replace("images", "labels")).with_suffix(".txt")
    label.parent.mkdir(parents=True, exist_ok=True)
    label.write_text("\n".join(rows) + "\n")
    (folder / "data.yaml").write_text(json.dumps({"names": dict(enumerate(names))}))
    return folder


TRIANGLE_ROW = "1 " + " ".join(f"{v / (HEIGHT if i % 2 else WIDTH):.8f}" for i, v in enumerate(TRIANGLE_XY))


def test_yolo_polygons_and_boxes(tmp_path):
    yolo(tmp_path / "s", [TRIANGLE_ROW, "0 0.203125 0.1875 0.3125 0.208333333", "", TRIANGLE_ROW])
    picture(tmp_path / "s/images/val/background.jpg")
    made = convert_dataset(tmp_path / "s", tmp_path / "d")
    expected = [("triangle", TRIANGLE), ("red ring", rectangle(3, 4, 20, 10))]
    assert_masks(tmp_path / "d", {"a.png": expected, "background.jpg": []})
    assert made.images == {"train": 1, "valid": 1}
    assert made.categories == ["red ring", "triangle"]
    assert {note.kind for note in made.notes} == {
        "box written as a mask",
        "label that stands there twice, written once",
    }


def test_yolo_as_roboflow_packs_it(tmp_path):
    for split in ("train", "valid", "test"):
        yolo(tmp_path / "s", [TRIANGLE_ROW], image=f"{split}/images/a.rf.0b1.png")
    (tmp_path / "s/data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['red ring', 'triangle']\n"
    )
    (tmp_path / "s/README.roboflow.txt").write_text("My project - v1\n")
    archive = shutil.make_archive(str(tmp_path / "My project.v1i.yolov8"), "zip", tmp_path / "s")
    made = convert_dataset(archive, tmp_path / "d")
    assert made.format == "yolo"
    assert made.images == {"train": 1, "valid": 1, "test": 1}
    assert not list(tmp_path.glob(".d.*"))


def test_coco_as_roboflow_packs_it(tmp_path):
    for split in ("train", "valid"):
        picture(tmp_path / f"s/{split}/a.jpg")
        annotation = {
            "id": 0,
            "image_id": 0,
            "category_id": 1,
            "bbox": [0, 0, 1, 1],
            "segmentation": [TRIANGLE_XY],
        }
        document = {
            "categories": [
                {"id": 0, "name": "shapes", "supercategory": "none"},
                {"id": 1, "name": "triangle", "supercategory": "shapes"},
            ],
            "images": [{"id": 0, "file_name": "a.jpg", **SIZE}],
            "annotations": [annotation | {"iscrowd": 0, "area": 1}],
        }
        (tmp_path / f"s/{split}/{ANNOTATION_FILE}").write_text(json.dumps(document))
    archive = shutil.make_archive(str(tmp_path / "r"), "zip", tmp_path / "s")
    made = convert_dataset(archive, tmp_path / "d")
    assert_masks(tmp_path / "d", {"a.jpg": [("triangle", TRIANGLE)] * 2})
    assert made.categories == ["triangle"]  # not the group, which would be a prompt for every image
    assert [note.kind for note in made.notes] == ["class that only groups others, left out"]


def via_regions():
    points = {"all_points_x": TRIANGLE_XY[0::2], "all_points_y": TRIANGLE_XY[1::2]}
    return [
        ({"name": "polygon", **points}, {"class": "triangle"}),
        ({"name": "rect", "x": 3, "y": 4, "width": 20, "height": 10}, {"class": "box"}),
        ({"name": "point", "cx": 3, "cy": 4}, {"class": "box"}),
    ]


def via_2_project(folder):
    regions = [{"shape_attributes": s, "region_attributes": a} for s, a in via_regions()]
    image = {"filename": "a.png", "size": 9, "regions": regions, "file_attributes": {}}
    return {
        "_via_settings": {},
        "_via_img_metadata": {"a.png9": image},
        "_via_attributes": {},
        "_via_image_id_list": [],
    }


def via_1_export(folder):
    image = via_2_project(folder)["_via_img_metadata"]["a.png9"]
    return {"a.png9": image | {"regions": {str(i): r for i, r in enumerate(image["regions"])}}}


def via_3_project(folder):
    shapes = {"1_a": ([7, *TRIANGLE_XY], "0"), "1_b": ([2, 3, 4, 20, 10], "1"), "1_c": ([1, 3, 4], "1")}
    return {
        "project": {"pid": "__VIA_PROJECT_ID__", "data_format_version": "3.1.1"},
        "attribute": {"1": {"aname": "class", "type": 4, "options": {"0": "triangle", "1": "box"}}},
        "file": {"1": {"fid": "1", "fname": "a.png", "type": 2, "loc": 1, "src": ""}},
        "metadata": {
            k: {"vid": "1", "flg": 0, "z": [], "xy": xy, "av": {"1": v}} for k, (xy, v) in shapes.items()
        },
        "view": {"1": {"fid_list": ["1"]}},
    }


def via_2_csv(folder):
    text = io.StringIO()
    rows = csv.writer(text, quoting=csv.QUOTE_MINIMAL)
    rows.writerow(
        "filename file_size file_attributes region_count region_id region_shape_attributes region_attributes".split()
    )
    for number, (shape, attributes) in enumerate(via_regions()):
        rows.writerow(["a.png", 9, "{}", 3, number, json.dumps(shape), json.dumps(attributes)])
    return text.getvalue()


def via_3_csv(folder):
    project = via_3_project(folder)
    text = io.StringIO()
    text.write("# Exported using VGG Image Annotator (http://www.robots.ox.ac.uk/~vgg/software/via)\n")
    text.write(f"# ATTRIBUTE = {json.dumps(project['attribute'])}\n")
    text.write(
        "# CSV_HEADER = metadata_id,file_list,flags,temporal_coordinates,spatial_coordinates,metadata\n"
    )
    for key, label in project["metadata"].items():
        cells = [key, '["a.png"]', "0", "[]", json.dumps(label["xy"]), json.dumps(label["av"])]
        csv.writer(text, quoting=csv.QUOTE_ALL).writerow(cells)
    return text.getvalue()


@pytest.mark.parametrize("make", [via_2_project, via_1_export, via_3_project, via_2_csv, via_3_csv])
def test_via_in_all_its_versions(make, tmp_path):
    picture(tmp_path / "s/a.png")
    content = make(tmp_path)
    name = "labels.csv" if isinstance(content, str) else "labels.json"
    (tmp_path / "s" / name).write_text(content if isinstance(content, str) else json.dumps(content))
    made = convert_dataset(tmp_path / "s", tmp_path / "d", valid_share=0)
    assert made.format == "via"
    assert_masks(tmp_path / "d", {"a.png": [("triangle", TRIANGLE), ("box", rectangle(3, 4, 20, 10))]})


def test_via_regions_without_a_class_need_one(tmp_path):
    picture(tmp_path / "s/a.png")
    project = via_2_project(tmp_path)
    for region in project["_via_img_metadata"]["a.png9"]["regions"]:
        region["region_attributes"] = {}
    (tmp_path / "s/via_region_data.json").write_text(json.dumps(project))
    with pytest.raises(DataError, match=r"label without a class(.|\n)*--class-name") as caught:
        convert_dataset(tmp_path / "s", tmp_path / "d")
    assert "2 problems" in str(caught.value)
    assert convert_dataset(tmp_path / "s", tmp_path / "d", class_name="balloon").categories == ["balloon"]


def test_what_was_converted_stays_the_same_when_it_is_converted_again(tmp_path):
    circle = " ".join(f"{0.5 + 0.31 * f(t):.6f}" for t in np.linspace(0, 6, 26) for f in (np.cos, np.sin))
    yolo(tmp_path / "s", [f"0 {circle}", "1 0.31 0.37 0.211 0.133"])
    convert_dataset(tmp_path / "s", tmp_path / "once", valid_share=0)
    convert_dataset(tmp_path / "once", tmp_path / "twice", valid_share=0)
    once, twice = (
        json.loads((tmp_path / d / "train" / ANNOTATION_FILE).read_text()) for d in ("once", "twice")
    )
    assert once == twice


def test_the_list_of_classes_can_be_the_source(tmp_path):
    yolo(tmp_path / "s", [TRIANGLE_ROW])
    (tmp_path / "s/other.json").write_text('{"images": [], "annotations": []}')
    convert_dataset(tmp_path / "s/data.yaml", tmp_path / "d", valid_share=0)
    assert_masks(tmp_path / "d", {"a.png": [("triangle", TRIANGLE)]})
