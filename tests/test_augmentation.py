"""Augmentation and resizing of training images: exact, seeded, in training only, and the one resolution of a base."""

import random

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from official_step import register_resolvers
from PIL import Image
from torch.utils.data import DataLoader

from sam3_lora.data.shapes import DEMO_CONCEPTS, write_coco
from sam3_lora.errors import ConfigError
from sam3_lora.evaluation.batches import RandomResizeAPI, make_datapoint
from sam3_lora.training.augmentation import RandomZoom, TrainImages
from sam3_lora.training.builder import build_sam3_lora_model
from sam3_lora.training.image_settings import AUGMENTATIONS, chosen_augmentations
from sam3_lora.training.launch import TrainingError, run_official_script, train
from sam3_lora.training.resumable_data import SeededItems, seeded
from sam3_lora.training.settings import TrainSettings, check_settings

from sam3.train.data.sam3_image_dataset import Object  # isort: skip  (the modules above stand in for triton)

SIZE_HW = (90, 120)
#: left, top, right, bottom in an image of 120 x 90.
BOXES = [(10, 20, 40, 50), (70, 5, 110, 85), (50, 60, 56, 66)]


def two_rectangles_and_an_example(with_masks=True):
    """A datapoint that is asked for two kinds: the first by an input box too. Each object is a rectangle of its grey."""
    height, width = SIZE_HW
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    objects = []
    for number, (x0, y0, x1, y1) in enumerate(BOXES):
        mask = torch.zeros(height, width, dtype=torch.uint8)
        mask[y0:y1, x0:x1] = 1
        pixels[mask.bool().numpy()] = 80 * (number + 1)
        box = torch.tensor([x0, y0, x1, y1], dtype=torch.float32)
        objects.append(
            Object(bbox=box, area=float(mask.sum()), object_id=number, segment=mask if with_masks else None)
        )
    datapoint = make_datapoint(Image.fromarray(pixels), ["big", "small"])
    datapoint.images[0].objects = objects
    datapoint.find_queries[0].object_ids_output = [0, 1]
    datapoint.find_queries[1].object_ids_output = [2]
    datapoint.find_queries[0].input_bbox = objects[0].bbox.clone()[None]
    datapoint.find_queries[0].input_bbox_label = torch.ones(1, dtype=torch.bool)
    return datapoint


def box_of(mask):
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


def pixels_of(datapoint):
    return np.asarray(datapoint.images[0].data)


def until(changed, make):
    """Return the first of the datapoints of many seeds that is changed in the way that a test is about."""
    found = next((point for seed in range(60) if changed(point := make(seed))), None)
    assert found is not None
    return found


def augmented(augment, seed, resize="squash", resolution=120, with_masks=True):
    """At 120 the squash to a square keeps the columns of the image."""
    with seeded(seed):
        return TrainImages(augment, resize, resolution)(two_rectangles_and_an_example(with_masks))


def test_without_augmentation_images_are_squashed_as_in_validation():
    ours = TrainImages(resolution=112)(two_rectangles_and_an_example())
    official = RandomResizeAPI(sizes=112, square=True, consistent_transform=False)(
        two_rectangles_and_an_example()
    )
    assert np.array_equal(pixels_of(ours), pixels_of(official))
    for a, b in zip(ours.images[0].objects, official.images[0].objects, strict=True):
        assert torch.equal(a.bbox, b.bbox)
        assert torch.equal(a.segment, b.segment)


def test_a_flip_mirrors_image_masks_boxes_and_input_boxes_exactly():
    plain = augmented("none", 0)
    before = pixels_of(plain)
    point = until(lambda p: not np.array_equal(pixels_of(p), before), lambda seed: augmented("flip", seed))
    assert np.array_equal(pixels_of(point), before[:, ::-1])
    for old, new in zip(plain.images[0].objects, point.images[0].objects, strict=True):
        assert torch.equal(new.segment, old.segment.flip(1))
        x0, y0, x1, y1 = old.bbox.flatten().tolist()
        assert new.bbox.flatten().tolist() == [120 - x1, y0, 120 - x0, y1]
    assert torch.equal(point.find_queries[0].input_bbox, point.images[0].objects[0].bbox)


@pytest.mark.parametrize("seed", range(8))
def test_the_box_of_a_flipped_mask_is_the_flipped_box(seed):
    with seeded(seed):
        point = TrainImages("flip", "squash", 90)(square_datapoint())
    for item in point.images[0].objects:
        assert box_of(item.segment) == item.bbox.flatten().tolist()


def square_datapoint():
    """The left 90 columns, which no resizing to 90 changes, with the objects that lie in them."""
    datapoint = two_rectangles_and_an_example()
    image = datapoint.images[0]
    image.data, image.size = image.data.crop((0, 0, 90, 90)), (90, 90)
    image.objects = [image.objects[0], image.objects[2]]
    for item in image.objects:
        item.segment = item.segment[:, :90]
    datapoint.find_queries[0].object_ids_output, datapoint.find_queries[1].object_ids_output = [0], [1]
    return datapoint


def test_colour_changes_pixels_and_nothing_else():
    plain, point = augmented("none", 0), augmented("color", 0)
    assert not np.array_equal(pixels_of(plain), pixels_of(point))
    for old, new in zip(plain.images[0].objects, point.images[0].objects, strict=True):
        assert torch.equal(new.segment, old.segment)
        assert torch.equal(new.bbox, old.bbox)


def cuts(point):
    """Whether the crop left a part of the second object, which reaches over most of the height."""
    image = point.images[0]
    return image.size != SIZE_HW and 0 < image.objects[1].segment.sum() < 40 * 80


def zoomed_in(seed, with_masks=True):
    random.seed(seed)
    return RandomZoom(1.5, 2.0, 112)(two_rectangles_and_an_example(with_masks))


def offset_of(point):
    """Where the crop is in the image: the first object is whole, since it is the example."""
    box = point.images[0].objects[0].bbox.flatten().tolist()
    return int(BOXES[0][0] - box[0]), int(BOXES[0][1] - box[1])


def test_an_enlarged_image_is_a_crop_with_masks_moved_by_whole_pixels_and_the_boxes_of_what_is_left():
    plain = two_rectangles_and_an_example()
    point = until(cuts, zoomed_in)
    image, (left, top) = point.images[0], offset_of(point)
    height, width = image.size
    assert image.data.size == (width, height)
    assert np.array_equal(pixels_of(point), pixels_of(plain)[top : top + height, left : left + width])
    for old, new in zip(plain.images[0].objects, image.objects, strict=True):
        assert torch.equal(new.segment, old.segment[top : top + height, left : left + width])
        if new.segment.any():
            assert new.bbox.flatten().tolist() == box_of(new.segment)
        assert new.area == pytest.approx(float(new.segment.sum()), abs=1e-6)
    assert torch.equal(point.find_queries[0].input_bbox, image.objects[0].bbox)


def test_boxes_without_masks_are_cut_in_the_same_way():
    seed = next(seed for seed in range(60) if cuts(zoomed_in(seed)))
    with_masks, without = zoomed_in(seed), zoomed_in(seed, with_masks=False)
    for a, b in zip(with_masks.images[0].objects, without.images[0].objects, strict=True):
        assert b.area == pytest.approx(a.area)
        if a.area:
            assert torch.equal(a.bbox, b.bbox)


@pytest.mark.parametrize("seed", range(40))
def test_a_crop_leaves_no_slivers_and_keeps_input_boxes_whole(seed):
    point = zoomed_in(seed)
    shares = [
        item.segment.sum().item() / ((x1 - x0) * (y1 - y0))
        for item, (x0, y0, x1, y1) in zip(point.images[0].objects, BOXES, strict=True)
    ]
    assert shares[0] == 1
    assert all(share == 0 or share >= 0.25 for share in shares)


def test_an_object_outside_the_crop_is_no_longer_asked_for():
    register_resolvers()
    with initialize_config_module("sam3.train", version_base="1.2"):
        config = compose("sam3_lora/common", overrides=["paths.dataset_root=unused"])
    point = until(lambda p: p.images[0].objects[2].area == 0, zoomed_in)
    kept = int(point.images[0].objects[1].area > 0)
    point = instantiate(config.transforms.train[0].transforms[4])(point)
    assert len(point.images[0].objects) == 1 + kept
    assert [query.object_ids_output for query in point.find_queries] == [list(range(1 + kept)), []]


def test_a_shrunk_image_lies_on_a_black_canvas_with_its_masks_and_boxes():
    random.seed(0)
    point = RandomZoom(0.5, 0.6, 112)(square_datapoint())
    image = point.images[0]
    assert image.data.size == (112, 112)
    assert image.size == (112, 112)
    for item in image.objects:
        assert item.segment.shape == (112, 112)
        assert box_of(item.segment) == pytest.approx(item.bbox.flatten().tolist(), abs=1)
    assert torch.equal(point.find_queries[0].input_bbox, image.objects[0].bbox)
    lit = np.argwhere(pixels_of(point).any(axis=2))
    assert (lit.max(axis=0) - lit.min(axis=0)).max() <= 0.6 * 112


@pytest.mark.parametrize(("resolution", "sides"), [(1008, list(range(480, 993, 32))), (112, [64, 96])])
def test_the_official_resizing_has_the_official_sides_and_pads_to_the_canvas(resolution, sides):
    resizing, padding = TrainImages(resize="official", resolution=resolution)._transforms
    assert resizing.sizes == sides
    assert (resizing.square, padding.size) == (True, resolution)


@pytest.mark.parametrize("seed", range(6))
def test_the_official_resizing_moves_masks_boxes_and_input_boxes_together(seed):
    with seeded(seed):
        point = TrainImages("none", "official", 112)(square_datapoint())
    image = point.images[0]
    assert image.data.size == (112, 112)
    x0, _, x1, _ = image.objects[0].bbox.flatten().tolist()
    assert x1 - x0 == pytest.approx(30 * 64 / 90) or x1 - x0 == pytest.approx(30 * 96 / 90)
    for item in image.objects:
        assert item.segment.shape == (112, 112)
        assert box_of(item.segment) == pytest.approx(item.bbox.flatten().tolist(), abs=1)
    assert torch.equal(point.find_queries[0].input_bbox, image.objects[0].bbox)


class OneImage:
    """A dataset of a single image, augmented in every way."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return TrainImages("all", "official", 112)(square_datapoint())


def test_the_draws_are_those_of_seed_epoch_and_image_and_of_nothing_else():
    def pixels(seed, epoch):
        items = SeededItems(OneImage(), seed)
        items.set_epoch(epoch)
        return pixels_of(items[0]).tobytes()

    random.seed(1)
    torch.manual_seed(1)
    state = random.getstate(), torch.get_rng_state()
    first = pixels(0, 0)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    random.seed(2)
    torch.manual_seed(2)
    assert pixels(0, 0) == first
    assert len({first, *(pixels(0, epoch) for epoch in range(1, 4)), pixels(1, 0)}) == 5


@pytest.mark.parametrize(
    ("augment", "chosen"),
    [
        ("none", ()),
        ("all", ("flip", "color", "scale")),
        (["scale", "flip"], ("flip", "scale")),
    ],
)
def test_names_combine_in_one_order(augment, chosen):
    assert chosen_augmentations(augment) == chosen


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    for split, seed in (("train", 1), ("valid", 2)):
        write_coco(folder / split, DEMO_CONCEPTS, 8, seed)
    return folder


def opened(dataset, split, *overrides):
    register_resolvers()
    with initialize_config_module("sam3.train", version_base="1.2"):
        config = compose("sam3_lora/demo", overrides=[f"paths.dataset_root={dataset}", *overrides])
    return SeededItems(instantiate(config.trainer.data[split].dataset), seed=0)


def images_of(dataset, workers):
    loader = DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=list)
    return torch.stack([point.images[0].data for batch in loader for point in batch])


def test_the_number_of_workers_does_not_change_what_the_loader_gives(dataset):
    opened_split = opened(dataset, "train", "training.augment=all")
    alone = images_of(opened_split, workers=0)
    assert torch.equal(alone, images_of(opened_split, workers=2))
    assert not torch.equal(alone, images_of(opened(dataset, "train"), workers=0))


@pytest.mark.parametrize(
    "override", [*(f"training.augment={name}" for name in AUGMENTATIONS), "training.resize=official"]
)
def test_each_key_changes_training_images(dataset, override):
    plain, changed = (images_of(opened(dataset, "train", *keys), workers=0) for keys in ([], [override]))
    assert changed.shape == plain.shape
    assert not torch.equal(changed, plain)


@pytest.mark.parametrize("override", ["training.augment=all", "training.resize=official"])
def test_validation_images_are_never_augmented(dataset, override):
    assert torch.equal(
        images_of(opened(dataset, "val", override), workers=0),
        images_of(opened(dataset, "val"), workers=0),
    )


def losses(dataset, output, **config):
    """The training loss of each epoch of a run that learns nothing, over the whole dataset in one batch."""
    seen = []
    still = {
        "training.lr": 0.0,
        "training.final_lr_ratio": 0.0,
        "training.weight_decay": 0.0,
        "training.val_epoch_freq": 2,
    }
    settings = TrainSettings(
        data=dataset,
        output=output,
        base="tiny",
        max_epochs=2,
        batch_size=8,
        report=False,
        config={**still, **config},
    )
    train(settings, on_progress=seen.append)
    by_epoch = {p.epoch: p.loss for p in seen if p.step == 1}
    return by_epoch[1], by_epoch[2]


@pytest.mark.slow
def test_in_a_run_every_epoch_has_its_own_augmentation_and_the_same_seed_gives_it_again(dataset, tmp_path):
    plain = losses(dataset, tmp_path / "plain")
    assert plain[0] == pytest.approx(plain[1], rel=1e-4)
    first = losses(dataset, tmp_path / "first", **{"training.augment": ["flip", "scale"]})
    assert abs(first[0] - plain[0]) > 0.01 * plain[0]
    assert abs(first[0] - first[1]) > 0.01 * plain[0]
    again = {"training.augment": ["flip", "scale"], "training.num_train_workers": 2}
    assert losses(dataset, tmp_path / "again", **again) == first


def test_all_wrong_names_are_reported_before_anything_is_written(dataset, tmp_path):
    config = {"training.augment": "flipp", "training.resize": "offical", "base.resolution": 504}
    with pytest.raises(ConfigError) as error:
        check_settings(TrainSettings(data=dataset, output=tmp_path / "run", base="tiny", config=config))
    text = str(error.value)
    assert text.startswith("3 problems:")
    assert "unknown 'flipp'; did you mean 'flip'? (none, all, flip, color, scale, or a list)" in text
    assert "unknown 'offical'; did you mean 'official'? (squash or official)" in text
    assert "base.resolution: 'tiny' takes 112 and nothing else, got 504: the position tables" in text


@pytest.mark.parametrize(
    ("augment", "problem"),
    [
        (["flip", "all"], "unknown 'all' in the list (flip, color, scale)"),
        ([], "needs a name or a list of flip, color, scale, got []"),
        (None, "needs a name or a list of flip, color, scale, got None; 'none' switches it off"),
    ],
)
def test_other_values_for_augment_are_refused(augment, problem):
    with pytest.raises(ConfigError, match=r"training\.augment") as error:
        TrainImages(augment)
    assert problem in str(error.value)


def test_another_resolution_is_refused_with_the_reason_and_what_to_do():
    with pytest.raises(ConfigError) as error:
        build_sam3_lora_model(base="random", resolution=504)
    assert str(error.value) == (
        "base.resolution: 'random' takes 1008 and nothing else, got 504: the position tables of its image encoder are "
        "made for that size, its weights were trained on no other, and neither sam3 nor a checkpoint would know of "
        "another. For less memory or time: training.batch_size=1 with training.gradient_accumulation_steps, the memory.* "
        "keys, base.quantization or a smaller preset ('sam3-lora estimate' compares them). For small objects in large "
        "images: cut the images into tiles"
    )


def test_a_config_of_the_user_s_own_with_another_resolution_ends_with_the_same_error(dataset, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(
        "# @package _global_\n"
        "defaults: [/sam3_lora/minimal, /sam3_lora/tiny, _self_]\n"
        f"paths: {{dataset_root: {dataset}, experiment_log_dir: {tmp_path / 'run'}}}\n"
        "base: {resolution: 168}\n"
    )
    with pytest.raises(TrainingError, match="'tiny' takes 112 and nothing else, got 168"):
        run_official_script(config, tmp_path / "run")
