"""CVAT, Pascal VOC, masks and COCO files after their documentation become the masks that were drawn, pixel by pixel."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from drawn_shapes import (
    PAIR,
    RING,
    SAMPLES,
    SIZE,
    TRIANGLE,
    TRIANGLE_XY,
    X,
    Y,
    assert_masks,
    decoded,
    masks_of,
    picture,
    rectangle,
)
from PIL import Image
from pycocotools import mask as coco_mask

from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.convert import convert_dataset
from sam3_lora.errors import DataError

CVAT_IMAGES = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version><meta><task><labels><label><name>ring</name></label><label><name>tile</name></label>
</labels></task></meta>
<image id="0" name="sub/a.png" width="64" height="48" subset="Train">
<mask label="ring" source="manual" occluded="0" rle="{rle}" left="6" top="8" width="29" height="29" z_order="0"></mask>
<box label="tile" occluded="0" xtl="3.00" ytl="4.00" xbr="23.00" ybr="14.00" z_order="0"></box>
<box label="tile" occluded="0" xtl="30.00" ytl="10.00" xbr="40.00" ybr="30.00" rotation="90.00" z_order="0"></box>
<ellipse label="tile" occluded="0" cx="30" cy="20" rx="9" ry="6" z_order="0"></ellipse>
<polyline label="tile" occluded="0" points="1.00,1.00;5.00,5.00" z_order="0"></polyline>
</image></annotations>"""


def test_cvat_masks_turned_boxes_and_ellipses(tmp_path):
    picture(tmp_path / "s/images/sub/a.png")
    window = RING[8:37, 6:35].ravel()
    changes = np.flatnonzero(np.diff(np.concatenate([[False], window, [window[-1]]]))).tolist()
    runs = np.diff([0, *changes, window.size])
    (tmp_path / "s/annotations.xml").write_text(CVAT_IMAGES.format(rle=", ".join(map(str, runs))))
    made = convert_dataset(tmp_path / "s", tmp_path / "d", valid_share=0)
    (_, ring), (_, box), (_, turned), (_, ellipse) = masks_of(tmp_path / "d")["a.png"]
    assert np.array_equal(ring, RING)
    assert np.array_equal(box, rectangle(3, 4, 20, 10))
    assert np.array_equal(turned, rectangle(25, 15, 20, 10))
    true = ((X + 0.5 - 30) / 9) ** 2 + ((Y + 0.5 - 20) / 6) ** 2 < 1
    assert (ellipse & true).sum() / (ellipse | true).sum() > 0.95  # of 170 pixels
    assert made.categories == ["ring", "tile"]


def test_cvat_tracks_are_objects_of_frames(tmp_path):
    for frame in range(2):
        picture(tmp_path / f"s/images/frame_{frame:06d}.png")
    polygon = ";".join(f"{x},{y}" for x, y in zip(TRIANGLE_XY[0::2], TRIANGLE_XY[1::2], strict=True))
    (tmp_path / "s/annotations.xml").write_text(
        "<annotations><meta><job><original_size><width>64</width><height>48</height></original_size></job></meta>"
        f'<track id="0" label="triangle"><polygon frame="0" keyframe="1" outside="0" points="{polygon}"></polygon>'
        f'<polygon frame="1" keyframe="1" outside="1" points="{polygon}"></polygon></track></annotations>'
    )
    convert_dataset(tmp_path / "s", tmp_path / "d", valid_share=0)
    assert_masks(tmp_path / "d", {"frame_000000.png": [("triangle", TRIANGLE)], "frame_000001.png": []})


VOC = """<annotation><folder>VOC2007</folder><filename>a.png</filename><source><database>The VOC2007 Database</database>
<annotation>PASCAL VOC2007</annotation></source><size><width>64</width><height>48</height><depth>3</depth></size>
<object><name>dog</name><bndbox><xmin>4</xmin><ymin>5</ymin><xmax>23</xmax><ymax>14</ymax></bndbox></object></annotation>"""


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        pytest.param(VOC, rectangle(3, 4, 20, 10), id="the original, whose pixels count from 1"),
        pytest.param(
            VOC.replace("PASCAL VOC2007", "x"), rectangle(4, 5, 19, 9), id="other tools, edges of the box"
        ),
        pytest.param(
            VOC.replace(
                "<bndbox>",
                "<polygon><x1>36</x1><y1>20</y1><x2>60</x2><y2>26</y2><x3>38.5</x3><y3>44</y3></polygon><bndbox>",
            ),
            TRIANGLE,
            id="Roboflow's polygons",
        ),
    ],
)
def test_pascal_voc_boxes(text, mask, tmp_path):
    picture(tmp_path / "s/JPEGImages/a.png")
    (tmp_path / "s/Annotations").mkdir()
    (tmp_path / "s/Annotations/a.xml").write_text(text)
    convert_dataset(tmp_path / "s", tmp_path / "d", valid_share=0)
    assert_masks(tmp_path / "d", {"a.png": [("dog", mask)]})


def grey(path: Path, values) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path)


def test_binary_masks_in_a_folder_for_each_class(tmp_path):
    picture(tmp_path / "s/images/a.jpg")
    grey(tmp_path / "s/masks/ring/a.png", RING.astype(np.uint8) * 255)
    grey(tmp_path / "s/masks/tile/a.png", PAIR.astype(np.uint8))
    convert_dataset(tmp_path / "s", tmp_path / "d", valid_share=0)
    parts = [("tile", PAIR & (Y < 20)), ("tile", PAIR & (Y > 20))]
    assert_masks(tmp_path / "d", {"a.jpg": [("ring", RING), *parts]})


def test_semantic_masks_become_their_connected_parts(tmp_path):
    for split in ("train", "valid"):
        picture(tmp_path / f"s/{split}/a.jpg")
        grey(tmp_path / f"s/{split}/a_mask.png", (RING * 2 + PAIR * 1).astype(np.uint8))
        (tmp_path / f"s/{split}/_classes.csv").write_text(
            "Pixel Value, Class\n0, background\n1, tile\n2, ring\n"
        )
    made = convert_dataset(tmp_path / "s", tmp_path / "d")
    parts = [("tile", PAIR & (Y < 20)), ("tile", PAIR & (Y > 20))]
    assert_masks(tmp_path / "d", {"a.jpg": [*parts, ("ring", RING)] * 2})
    assert made.categories == ["tile", "ring"]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_value_for_each_object_keeps_its_parts_together(dtype, tmp_path):
    picture(tmp_path / "s/images/a.jpg")
    grey(tmp_path / "s/instances/a.png", (RING * 7 + PAIR * 200).astype(dtype))
    convert_dataset(tmp_path / "s", tmp_path / "d", class_name="cell", valid_share=0)
    assert_masks(tmp_path / "d", {"a.jpg": [("cell", RING), ("cell", PAIR)]})


def test_masks_of_several_values_without_names_are_not_guessed(tmp_path):
    picture(tmp_path / "s/images/a.jpg")
    grey(tmp_path / "s/masks/a.png", (RING * 7 + PAIR * 9).astype(np.uint8))
    with pytest.raises(DataError, match="nothing says whether these are classes or objects"):
        convert_dataset(tmp_path / "s", tmp_path / "d")
    made = convert_dataset(
        tmp_path / "s", tmp_path / "d", source_format="masks-instances", class_name="cell", valid_share=0
    )
    assert made.objects == {"train": 2}


@pytest.mark.parametrize(
    "segmentation",
    [
        pytest.param([TRIANGLE_XY, [2, 2, 9, 2, 9, 9]], id="two polygons"),
        pytest.param({"size": [48, 64], "counts": [100, 50, 48 * 64 - 150]}, id="run lengths as numbers"),
        pytest.param(
            {
                "size": [48, 64],
                "counts": coco_mask.encode(np.asfortranarray(RING.astype(np.uint8)))["counts"].decode(),
            },
            id="compressed",
        ),
    ],
)
@pytest.mark.parametrize("folder", ["val2017", "images", "images/val2017", "elsewhere/deep"])
def test_coco_in_any_layout(folder, segmentation, tmp_path):
    picture(tmp_path / "s" / folder / "a.png")
    annotation = {
        "id": 1,
        "image_id": "x",
        "category_id": 90,
        "segmentation": segmentation,
        "bbox": [0, 0, 1, 1],
        "area": 1,
        "iscrowd": 0,
    }
    document = {
        "images": [{"id": "x", "file_name": "a.png", **SIZE}],
        "annotations": [annotation],
        "categories": [{"id": 90, "name": "toothbrush"}],
    }
    (tmp_path / "s/annotations").mkdir()
    (tmp_path / "s/annotations/instances_val2017.json").write_text(json.dumps(document))
    (tmp_path / "s/annotations/captions_val2017.json").write_text(
        json.dumps(document | {"annotations": [{"image_id": "x", "caption": "?"}]})
    )
    convert_dataset(tmp_path / "s", tmp_path / "d", valid_share=0)
    assert_masks(tmp_path / "d", {"a.png": [("toothbrush", decoded(segmentation))]})


def test_a_label_file_alone_can_be_the_source(tmp_path):
    shutil.copytree(SAMPLES / "coco", tmp_path / "s")
    made = convert_dataset(tmp_path / "s/annotations/instances_val.json", tmp_path / "d", valid_share=0)
    assert made.images == {"train": 1}


def test_a_missing_image_is_not_taken_from_another_split(tmp_path):
    for split in ("train", "valid"):
        picture(tmp_path / f"s/{split}/a.png")
        document = {
            "images": [{"id": 1, "file_name": "a.png", **SIZE}],
            "annotations": [],
            "categories": [{"id": 1, "name": "x"}],
        }
        (tmp_path / f"s/{split}" / ANNOTATION_FILE).write_text(json.dumps(document))
    (tmp_path / "s/train/a.png").unlink()
    with pytest.raises(DataError, match=r"labels of an image that is not there: .*train.* means 'a.png'"):
        convert_dataset(tmp_path / "s", tmp_path / "d")
