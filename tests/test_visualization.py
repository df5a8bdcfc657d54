"""Pictures: what is drawn where, in which colour, and that it can be read at any size."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sam3_lora.data.shapes import ANNOTATION_FILE, DEMO_CONCEPTS, VARIED, write_coco
from sam3_lora.visualization import (
    GROUND_TRUTH,
    Instance,
    SheetRow,
    choose_images,
    comparison_sheet,
    draw_objects,
    label_colours,
    rows_from_results,
)

GREY = (100, 100, 100)
RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(width=600, height=500):
    return Image.new("RGB", (width, height), GREY)


def square_mask(width=600, height=500):
    mask = np.zeros((height, width), dtype=bool)
    mask[100:300, 200:400] = True
    return mask


def rle(mask):
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def uncompressed_rle(mask):
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat.astype(np.int8))) + 1
    return {"size": list(mask.shape), "counts": np.diff([0, *edges, flat.size]).tolist()}


def draw(mask, image=None, **options):
    return draw_objects(
        image or picture(), [mask], [(200, 100, 400, 300)], ["dog"], colours={"dog": RED}, **options
    )


def test_draw_objects_blends_the_mask_and_leaves_the_rest_and_the_input_alone():
    image = picture()
    drawn = draw(square_mask(), image, alpha=0.5)
    assert drawn.getpixel((300, 200)) == (178, 50, 50)
    assert drawn.getpixel((50, 450)) == GREY
    assert drawn.getpixel((200, 200)) == RED, "the outline is solid"
    assert image.getpixel((300, 200)) == GREY


@pytest.mark.parametrize(("alpha", "inside"), [(0.0, GREY), (1.0, RED)])
def test_alpha_goes_from_unseen_to_solid(alpha, inside):
    assert draw(square_mask(), alpha=alpha).getpixel((300, 200)) == inside


@pytest.mark.parametrize(
    "segmentation",
    [
        pytest.param(rle(square_mask()), id="compressed RLE"),
        pytest.param(uncompressed_rle(square_mask()), id="uncompressed RLE"),
        pytest.param([[200, 100, 400, 100, 400, 300, 200, 300]], id="polygons"),
    ],
)
def test_every_kind_of_coco_segmentation_draws_like_the_array(segmentation):
    difference = np.asarray(draw(segmentation), dtype=int) - np.asarray(draw(square_mask()), dtype=int)
    assert (difference != 0).any(axis=-1).mean() < 0.01  # a polygon may differ by its border


def test_boxes_without_masks_are_drawn_too():
    drawn = draw_objects(picture(), None, np.array([[200.0, 100, 400, 300]]), ["dog"], colours={"dog": RED})
    assert drawn.getpixel((200, 250)) == RED
    assert drawn.getpixel((300, 200)) == GREY


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        pytest.param((112, 112), None, (448, 448), id="small images grow so that text can be read"),
        pytest.param((1600, 900), None, (1600, 900), id="large images keep their size"),
        pytest.param((1600, 800), 320, (320, 160), id="the longest side on request"),
        pytest.param((1, 1), None, (448, 448), id="one pixel"),
        pytest.param((3000, 2), None, (3000, 2), id="a line"),
    ],
)
def test_the_size_of_the_drawing(size, side, expected):
    assert draw_objects(Image.new("L", size), [], [], [], side=side).size == expected
    boxed = draw_objects(
        Image.new("RGBA", size), None, [(-5, -5, 9999, 9999)], ["past every edge"], [0.5], side=side
    )
    assert boxed.size == expected


def test_small_objects_stay_visible_on_top_of_large_ones():
    large, small = np.ones((500, 600), dtype=bool), square_mask()
    drawn = draw_objects(
        picture(),
        [small, large],
        [(200, 100, 400, 300), (0, 0, 600, 500)],
        ["small", "large"],
        alpha=1.0,
        colours={"small": RED, "large": BLUE},
    )
    assert drawn.getpixel((300, 200)) == RED


def test_labels_of_neighbours_do_not_cover_each_other():
    boxes = [(100, 200, 300, 400), (110, 200, 310, 400)]
    both = draw_objects(
        picture(), None, boxes, ["red label", "blue label"], colours={"red label": RED, "blue label": BLUE}
    )
    pixels = np.asarray(both)
    for colour in (RED, BLUE):
        tag_rows = (pixels == colour).all(axis=-1).sum(axis=1) > 25  # wider than the two sides of a box
        assert tag_rows.sum() >= 10


def test_a_mask_of_another_size_is_an_error():
    with pytest.raises(
        ValueError, match=r"the mask has the shape \(50, 60\), the image is 600 wide and 500 high"
    ):
        draw(square_mask()[:50, :60])


def test_lists_of_different_lengths_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        draw_objects(picture(), None, [(0, 0, 9, 9)], ["dog"], [0.5, 0.6])


def test_label_colours_are_distinct_and_follow_the_order_of_appearance():
    colours = label_colours([f"label {i}" for i in range(40)] * 2)
    assert len(set(colours.values())) == 40
    assert label_colours(["label 0", "label 1"]) == {name: colours[name] for name in ("label 0", "label 1")}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_coco(folder, DEMO_CONCEPTS, 12, seed=3, style=VARIED)
    return folder


@pytest.fixture(scope="module")
def results(dataset):
    """Two results for each object, exactly it: one that scores 0.9 and one that scores 0.3."""
    document = json.loads((dataset / ANNOTATION_FILE).read_text())
    keys = ("image_id", "category_id", "bbox", "segmentation")
    return [
        {**{key: annotation[key] for key in keys}, "score": score}
        for annotation in document["annotations"]
        for score in (0.9, 0.3)
    ]


def test_rows_hold_ground_truth_and_the_results_above_the_threshold(dataset, results):
    rows = rows_from_results(
        dataset / ANNOTATION_FILE, dataset, {"adapter": results, "base": []}, image_ids=[5, 2]
    )
    assert [row.name for row in rows] == ["image00005.png", "image00002.png"]
    for row in rows:
        truth, found = row.objects[GROUND_TRUTH], row.objects["adapter"]
        assert [item.category for item in found] == [item.category for item in truth]
        assert [tuple(item.box_xyxy) for item in found] == [tuple(item.box_xyxy) for item in truth]
        assert {item.score for item in found} == {0.9}
        assert {item.score for item in truth} == {None}
        assert row.objects["base"] == []
        assert list(row.prompts) == ["purple cross", "orange hexagon", "cyan crescent"]


def test_chosen_images_show_many_objects_and_all_categories():
    def annotations(image_id, *categories):
        return [{"image_id": image_id, "category_id": category} for category in categories]

    document = {
        "images": [{"id": i} for i in (1, 2, 3, 4)],
        "annotations": annotations(1, 7) + annotations(2, 7, 7, 7) + annotations(3, 8, 9) + annotations(4),
    }
    assert choose_images(document, 2) == [2, 3]
    assert choose_images(document, 9) == [2, 3, 1, 4]


def test_the_sheet_shows_a_category_in_one_colour_in_every_row_and_in_the_legend(dataset, results):
    rows = rows_from_results(dataset / ANNOTATION_FILE, dataset, {"base": [], "adapter": results})
    sheet = comparison_sheet(rows)
    assert len(rows) == 6
    pixels = np.asarray(sheet)
    for name, colour in label_colours(rows[0].prompts).items():
        found = (pixels == colour).all(axis=-1)
        assert found[:56].any(), f"{name} is missing in the legend"
        drawn = sum(item.category == name for row in rows for item in row.objects[GROUND_TRUTH])
        assert found[100:].any() == (drawn > 0)
    assert (pixels[:, :20] == 255).all(), "the margin is white"


@pytest.mark.parametrize("size", [(640, 200), (200, 640), (3, 3), (2000, 1500)])
def test_a_sheet_takes_images_of_any_shape_and_any_number_of_long_prompts(size):
    prompts = [f"a rather long description of thing number {i}" for i in range(40)]
    bare = SheetRow(Image.new("RGB", size, GREY), "image.jpg", ["person"])
    busy = SheetRow(
        bare.image, "n" * 300, prompts, {"found": [Instance(prompts[39], (0, 0, 2, 2), None, 1.0)]}
    )
    sheet = comparison_sheet([bare, busy], columns=("image", "found"))
    assert sheet.width == comparison_sheet([bare], columns=("image", "found")).width
    assert (np.asarray(sheet)[:, -20:] == 255).all(), "nothing is written over the margin"


def test_a_sheet_without_rows_is_an_error():
    with pytest.raises(ValueError, match="at least one row"):
        comparison_sheet([])
