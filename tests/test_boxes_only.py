"""A dataset with boxes and no masks: checked, trained, validated, reported and evaluated."""

import json

import pytest

from sam3_lora import build_sam3_lora_model, evaluate, train
from sam3_lora.data.check import check_dataset
from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.shapes import PRETRAINING_CONCEPTS, write_coco
from sam3_lora.errors import DataError, TargetError
from sam3_lora.training.settings import TrainSettings, check_settings

BOXES_ONLY = {"training.enable_segmentation": False}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("boxes") / "data"
    for split, count, seed in (("train", 4, 1), ("valid", 2, 2)):
        write_coco(folder / split, PRETRAINING_CONCEPTS[:3], count, seed)
        file = folder / split / ANNOTATION_FILE
        content = json.loads(file.read_text())
        for annotation in content["annotations"]:
            del annotation["segmentation"]
        file.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "boxes"
    return train(
        TrainSettings(
            data=dataset,
            output=output,
            base="tiny",
            preset="minimal",
            max_epochs=1,
            batch_size=2,
            config=BOXES_ONLY,
        )
    )


def test_boxes_train_and_validate_without_masks(run):
    assert set(run.metrics) == {"bbox_AP", "bbox_AP50"}
    assert 0 < run.metrics["bbox_AP"] <= 1
    best = json.loads((run.output / "logs" / "best_metrics.json").read_text())
    assert best["best_metric"] == "bbox_AP"
    assert not (run.output / "dumps" / "best" / "coco_predictions_segm.json").exists()


def test_the_report_of_a_run_on_boxes_has_boxes_only(run):
    page = run.report.read_text()
    assert "boxes only" in page
    assert "Boxes, AP50" in page
    assert "Masks" not in page


def test_boxes_are_evaluated_without_masks(run, dataset):
    result = evaluate(dataset, adapters=[run.adapter], device="cpu")
    (reached,) = result.adapters.values()
    assert reached.overall.bbox_AP == pytest.approx(run.metrics["bbox_AP"], abs=1e-6)
    assert reached.overall.segm_AP is None
    assert 0 <= reached.overall.mean_IoU <= 1


def test_masks_are_asked_for_unless_boxes_alone_are_trained(dataset):
    with pytest.raises(DataError, match=r"to train on boxes alone set training\.enable_segmentation=false"):
        check_dataset(dataset)
    assert check_dataset(dataset, masks=False).splits["train"].images == 4


def test_a_few_missing_masks_are_an_error_in_an_evaluation(tmp_path):
    write_coco(tmp_path / "valid", PRETRAINING_CONCEPTS[:3], 2, seed=3)
    file = tmp_path / "valid" / ANNOTATION_FILE
    content = json.loads(file.read_text())
    del content["annotations"][0]["segmentation"]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="annotation without 'segmentation'"):
        evaluate(tmp_path, base="tiny", device="cpu")


def test_adapters_in_a_head_that_boxes_do_not_train_are_refused(tmp_path):
    settings = TrainSettings(
        data=tmp_path, output=tmp_path, base="tiny", preset="segmentation_head", config=BOXES_ONLY
    )
    with pytest.raises(TargetError, match="boxes alone do not train it"):
        check_settings(settings)
    with pytest.raises(TargetError, match="boxes alone do not train it"):
        build_sam3_lora_model(base="tiny", preset="segmentation_head", enable_segmentation=False)
