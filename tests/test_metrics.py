"""The evaluation gives the official numbers, says what it cannot measure, and leaves no trace."""

import copy
import json
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam3_lora.base.checkpoint import TINY
from sam3_lora.base.tiny import build_tiny_sam3
from sam3_lora.data.shapes import ANNOTATION_FILE, DEMO_CONCEPTS, VARIED, write_coco
from sam3_lora.errors import DataError
from sam3_lora.evaluation import batches
from sam3_lora.evaluation.metrics import best_scores, evaluate_split, false_fire_rate
from sam3_lora.evaluation.scores import cgf1
from sam3_lora.training.composition import shipped_config

from sam3.train.data.collator import collate_fn_api  # isort: skip  (after the modules that stand in for triton)

OPTIONS = {"resolution": TINY.resolution, "device": "cpu", "batch_size": 3}
SIZE = 128  # not the model's, so that boxes and masks must be scaled back


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return build_tiny_sam3(seed=1)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_coco(folder, DEMO_CONCEPTS, 7, seed=3, style=VARIED, size=SIZE)
    return folder


@pytest.fixture(scope="module")
def dataset(shapes, model, tmp_path_factory):
    """Annotated with a part of what the untrained model itself predicts, shifted, so that AP is neither 0 nor 1."""
    folder = tmp_path_factory.mktemp("dataset")
    document = json.loads((shapes / ANNOTATION_FILE).read_text())
    results = evaluate_split(model, shapes, shapes / ANNOTATION_FILE, **OPTIONS).predictions
    document["annotations"] = [
        {**annotation_from(result, shift=number % 4 * 2), "id": number + 1}
        for number, result in enumerate(results[::17])
    ]
    for image in document["images"]:
        (folder / image["file_name"]).write_bytes((shapes / image["file_name"]).read_bytes())
    (folder / ANNOTATION_FILE).write_text(json.dumps(document))
    return folder


def annotation_from(result, shift):
    x, y, width, height = result["bbox"]
    mask = np.roll(coco_mask.decode(result["segmentation"]), shift * 3, axis=0)
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {
        "image_id": result["image_id"],
        "category_id": result["category_id"],
        "bbox": [x + shift, y, width, height],
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
        "area": width * height,
        "iscrowd": 0,
    }


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    return tmp_path_factory.mktemp("run") / "dumps"


@pytest.fixture(scope="module")
def result(model, dataset, dumps):
    return evaluate_split(model, dataset, dataset / ANNOTATION_FILE, dump_dir=dumps, **OPTIONS)


@pytest.fixture
def document(dataset):
    return json.loads((dataset / ANNOTATION_FILE).read_text())


def official_validation(model, dataset, folder, iou_type):
    """What the official trainer does with the validation section of our configs."""
    config = shipped_config()
    config.paths = {"dataset_root": str(folder), "experiment_log_dir": str(folder)}
    config.base.resolution = TINY.resolution
    (folder / "valid").symlink_to(dataset)
    split = instantiate(config.trainer.data.val.dataset, _convert_="all")
    meter = instantiate(config.trainer.meters.val.valid[iou_type], _convert_="all")
    collate = partial(collate_fn_api, repeats=1, dict_key="valid", with_seg_masks=True)
    model.eval()
    with torch.no_grad():
        for batch in torch.utils.data.DataLoader(split, batch_size=3, collate_fn=collate):
            meter.update(find_stages=model(batch["valid"]), find_metadatas=batch["valid"].find_metadatas)
    model.train()
    numbers = meter.compute_synced()
    return numbers, json.loads(Path(meter.dump_dir, f"coco_predictions_{iou_type}.json").read_text())


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_numbers_and_dumps_are_those_of_the_official_validation(
    model, dataset, result, dumps, tmp_path, iou_type
):
    official, official_dump = official_validation(model, dataset, tmp_path, iou_type)
    ours = [getattr(result.overall, f"{iou_type}_{name}") for name in ("AP", "AP50", "AP75")]
    assert ours == [official[f"coco_eval_{iou_type}_{name}"] for name in ("AP", "AP_50", "AP_75")]
    assert 0.02 < ours[0] < ours[1] < 0.98, "a comparison of zeros proves nothing"
    dump = json.loads((dumps / f"coco_predictions_{iou_type}.json").read_text())
    assert dump == [{key: entry[key] for key in dump[0]} for entry in official_dump]


def test_predictions_are_coco_results_for_both_kinds_of_evaluation(dataset, result):
    truth = COCO(str(dataset / ANNOTATION_FILE))
    for iou_type in ("bbox", "segm"):
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(result.predictions)), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == getattr(result.overall, f"{iou_type}_AP")
    for prediction in result.predictions:
        assert set(prediction) == {"image_id", "category_id", "bbox", "segmentation", "score"}
        assert prediction["segmentation"]["size"] == [SIZE, SIZE]
        assert 0 <= prediction["score"] <= 1


def test_every_image_is_asked_for_every_category(result, document):
    categories = {category["id"] for category in document["categories"]}
    asked = {image["id"]: set() for image in document["images"]}
    for prediction in result.predictions:
        asked[prediction["image_id"]].add(prediction["category_id"])
    assert asked == {image["id"]: categories for image in document["images"]}


def test_many_categories_are_asked_in_turns_with_the_same_result(model, dataset, result, monkeypatch):
    monkeypatch.setattr(batches, "MAX_PROMPTS", 2)
    progress = []
    in_turns = evaluate_split(
        model,
        dataset,
        dataset / ANNOTATION_FILE,
        on_progress=lambda done, total: progress.append((done, total)),
        **OPTIONS,
    )
    assert progress[-1] == (14, 14)
    assert in_turns.overall.as_dict() == pytest.approx(result.overall.as_dict(), abs=5e-4)


def test_evaluation_leaves_no_trace(model, dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.train()
    model.backbone.vision_backbone.eval()  # as a user may freeze a part
    modes = [module.training for module in model.modules()]
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    weights = copy.deepcopy(model.state_dict())
    evaluate_split(model, dataset, dataset / ANNOTATION_FILE, **OPTIONS)
    best_scores(model, [Image.new("RGB", (20, 20))], [["thing"]], resolution=TINY.resolution, device="cpu")
    assert [module.training for module in model.modules()] == modes
    assert random.getstate() == python_state
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not torch.distributed.is_initialized()
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    model.train()


def test_the_modes_come_back_even_if_the_evaluation_fails(model, dataset, tmp_path):
    with pytest.raises(DataError):
        evaluate_split(model.train(), tmp_path, copy_without_images(dataset, tmp_path, {1}), **OPTIONS)
    assert model.training


def copy_without_images(dataset, folder, missing):
    document = json.loads((dataset / ANNOTATION_FILE).read_text())
    for image in document["images"]:
        if image["id"] not in missing:
            (folder / image["file_name"]).write_bytes((dataset / image["file_name"]).read_bytes())
        else:
            (folder / image["file_name"]).write_text("no image")
    (folder / ANNOTATION_FILE).write_text(json.dumps(document))
    return folder / ANNOTATION_FILE


def test_unreadable_images_are_named_and_not_replaced_by_their_neighbours(model, dataset, tmp_path):
    annotation_file = copy_without_images(dataset, tmp_path, {2, 7})
    with pytest.raises(DataError, match=r"cannot read 2 of 7 images in '.*': image00002.png, image00007.png"):
        evaluate_split(model, tmp_path, annotation_file, **OPTIONS)


@pytest.mark.parametrize("crowds_only", [False, True], ids=["no annotations", "crowds only"])
def test_a_split_without_objects_is_an_error_because_ap_is_undefined(model, document, tmp_path, crowds_only):
    crowds = [{**annotation, "iscrowd": 1} for annotation in document["annotations"]]
    document["annotations"] = crowds if crowds_only else []
    (tmp_path / ANNOTATION_FILE).write_text(json.dumps(document))
    with pytest.raises(DataError, match="has no object to measure against"):
        evaluate_split(model, tmp_path, tmp_path / ANNOTATION_FILE, **OPTIONS)


def as_results(annotations, score=0.9):
    keys = ("image_id", "category_id", "bbox", "segmentation")
    return [{**{key: annotation[key] for key in keys}, "score": score} for annotation in annotations]


@pytest.fixture(scope="module")
def objects(shapes):
    return json.loads((shapes / ANNOTATION_FILE).read_text())["annotations"]


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_cgf1_of_perfect_predictions_is_1_and_falls_with_what_is_missed_or_invented(
    shapes, objects, iou_type
):
    perfect = as_results(objects)
    wrong_category = [{**p, "category_id": p["category_id"] % 3 + 1} for p in perfect]

    def value(predictions):
        return cgf1(shapes / ANNOTATION_FILE, predictions, iou_type)["cgF1"]

    assert value(perfect) == pytest.approx(1, abs=1e-3)
    assert 0.05 < value(perfect[::2]) < 0.8
    assert 0.05 < value(perfect + wrong_category) < 0.8
    assert value(wrong_category) <= 0


def test_cgf1_returns_its_parts_and_counts_only_confident_predictions(shapes, objects):
    unsure = as_results(objects[::2], score=0.49)
    parts = cgf1(shapes / ANNOTATION_FILE, as_results(objects[1::2]) + unsure)
    assert parts["recall"] == pytest.approx(len(objects[1::2]) / len(objects), abs=1e-3)
    assert parts["precision"] == pytest.approx(1, abs=1e-3)
    assert {"cgF1", "cgF1@0.5", "cgF1@0.75", "F1", "IL_MCC", "positive_micro_F1"} <= set(parts)


def test_cgf1_takes_no_predictions_at_all(shapes, capsys):
    parts = cgf1(shapes / ANNOTATION_FILE, [])
    assert parts["cgF1"] == parts["recall"] == 0
    assert parts["positive_macro_F1"] == -1, "the official value for 0/0"
    assert capsys.readouterr().out == ""


def test_cgf1_is_0_where_no_category_is_ever_absent(shapes, tmp_path):
    document = json.loads((shapes / ANNOTATION_FILE).read_text())
    document["categories"] = document["categories"][:1]
    document["annotations"] = [{**a, "category_id": 1} for a in document["annotations"]]
    (tmp_path / ANNOTATION_FILE).write_text(json.dumps(document))
    parts = cgf1(tmp_path / ANNOTATION_FILE, as_results(document["annotations"]))
    assert parts["IL_MCC"] == parts["cgF1"] == 0
    assert parts["positive_micro_F1"] == pytest.approx(1, abs=1e-3)


def test_cgf1_takes_polygons_and_annotations_without_iscrowd(shapes, tmp_path):
    document = json.loads((shapes / ANNOTATION_FILE).read_text())
    polygon = [[10, 10, 60, 10, 60, 60, 10, 60]]
    document["annotations"] = [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 2,
            "bbox": [10, 10, 50, 50],
            "area": 2500,
            "segmentation": polygon,
        }
    ]
    (tmp_path / ANNOTATION_FILE).write_text(json.dumps(document))
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8, order="F")
    mask[10:60, 10:60] = 1
    rle = coco_mask.encode(mask)
    found = {"image_id": 1, "category_id": 2, "score": 0.8, "bbox": [10, 10, 50, 50]}
    found["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    assert cgf1(tmp_path / ANNOTATION_FILE, [found])["cgF1@0.75"] == pytest.approx(1, abs=1e-3)


@pytest.fixture(scope="module")
def pictures(shapes):
    loaded = [Image.open(path).convert("RGB") for path in sorted(shapes.glob("*.png"))[:3]]
    return [loaded[0], loaded[1].resize((90, 60)), loaded[2].convert("L")]


def test_best_scores_are_those_of_the_predictions(model, shapes, result):
    names = [concept.prompt for concept in DEMO_CONCEPTS]
    images = [Image.open(path) for path in sorted(shapes.glob("*.png"))]
    scores = best_scores(model, images, [names] * len(images), **OPTIONS)
    for image_id, row in enumerate(scores, start=1):
        for category_id, score in enumerate(row, start=1):
            highest = max(
                p["score"]
                for p in result.predictions
                if (p["image_id"], p["category_id"]) == (image_id, category_id)
            )
            assert score == pytest.approx(highest, abs=2e-5)


def test_best_scores_keep_the_order_of_prompts_that_differ_from_image_to_image(model, pictures):
    prompts = [["one", "two", "three"], [], ["two"]]
    together = best_scores(model, pictures, prompts, **OPTIONS)
    assert [len(row) for row in together] == [3, 0, 1]
    for image, texts, row in zip(pictures, prompts, together, strict=True):
        for text, score in zip(texts, row, strict=True):
            assert best_scores(model, [image], [[text]], **OPTIONS)[0][0] == pytest.approx(score, abs=1e-5)


def test_false_fire_rate_is_the_share_of_pairs_above_the_threshold(model, pictures):
    prompts = [["one", "two"], ["three"], ["four"]]
    scores = sorted(score for row in best_scores(model, pictures, prompts, **OPTIONS) for score in row)
    between = (scores[0] + scores[1]) / 2
    assert false_fire_rate(model, pictures, prompts, threshold=between, **OPTIONS) == 0.75
    assert false_fire_rate(model, pictures, prompts, threshold=1.0, **OPTIONS) == 0
    assert false_fire_rate(model, pictures, prompts, threshold=0.0, **OPTIONS) == 1


def test_false_fire_rate_needs_prompts_for_each_image(model, pictures):
    with pytest.raises(ValueError, match="at least one image with a prompt"):
        false_fire_rate(model, pictures, [[], [], []], **OPTIONS)
    with pytest.raises(ValueError, match="zip"):
        false_fire_rate(model, pictures, [["one"]], **OPTIONS)
