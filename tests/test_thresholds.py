"""The best score threshold of each class, and where it is kept and used."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_forward import untouched

from sam3_lora.adapter import get_peft_sam3, load_adapter, save_adapter, thresholds_of
from sam3_lora.cli import main
from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.shapes import PRETRAINING_CONCEPTS, write_coco
from sam3_lora.errors import AdapterError
from sam3_lora.evaluation.thresholds import best_thresholds
from sam3_lora.inference import Predictor
from sam3_lora.record import RECORD_FILE, read_record, record_thresholds

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_coco(folder / "valid", PRETRAINING_CONCEPTS[:2], 12, seed=2)
    return folder


def document_of(folder):
    return json.loads((folder / ANNOTATION_FILE).read_text())


def result(annotation, score, category=None, found=True):
    """A prediction that finds an object, or lies beside it."""
    x, y, w, h = annotation["bbox"]
    here = {"bbox": [x, y, w, h], "segmentation": annotation["segmentation"]}
    beside = {"bbox": [x, y, 1, 1], "segmentation": [[x, y, x + 1, y, x + 1, y + 1]]}
    return {
        "image_id": annotation["image_id"],
        "category_id": category or annotation["category_id"],
        "score": score,
        **(here if found else beside),
    }


def f1_at(annotations, scored, threshold):
    taken = [found for _, found, score in scored if score > threshold]
    return 2 * sum(taken) / (len(taken) + len(annotations))


@pytest.mark.parametrize("seed", range(6))
def test_no_other_threshold_gives_a_higher_f1(data, seed):
    rng = np.random.default_rng(seed)
    own = [a for a in document_of(data / "valid")["annotations"] if a["category_id"] == 1]
    scored = [(a, True, float(rng.beta(4, 3))) for a in own]
    scored += [(a, False, float(rng.beta(2, 4))) for a in own]
    predictions = [result(a, score, found=found) for a, found, score in scored]
    best = best_thresholds(data / "valid" / ANNOTATION_FILE, predictions)["red circle"]
    assert best.objects == len(own) >= 5
    assert best.f1 == pytest.approx(f1_at(own, scored, best.threshold))
    assert best.f1_at_half == pytest.approx(f1_at(own, scored, 0.5))
    assert best.f1 >= max(f1_at(own, scored, cut) for cut in np.linspace(0, 1, 201)) - 1e-9


def test_a_false_alarm_in_an_image_without_the_class_counts(data):
    document = document_of(data / "valid")
    own = [a for a in document["annotations"] if a["category_id"] == 1]
    others = [a for a in document["annotations"] if a["category_id"] == 2]
    quiet = best_thresholds(data / "valid" / ANNOTATION_FILE, [result(a, 0.4) for a in own])["red circle"]
    assert quiet.threshold < 0.4
    assert (quiet.f1, quiet.f1_at_half) == (1, 0)
    noisy = [result(a, 0.4) for a in own] + [result(a, 0.3, category=1) for a in others]
    between = best_thresholds(data / "valid" / ANNOTATION_FILE, noisy)["red circle"]
    assert between.threshold == pytest.approx(0.35)


def test_half_is_kept_where_nothing_is_better_and_few_objects_say_nothing(data, tmp_path):
    document = document_of(data / "valid")
    own = [a for a in document["annotations"] if a["category_id"] == 1]
    found = best_thresholds(data / "valid" / ANNOTATION_FILE, [result(a, 0.9) for a in own])
    assert found["red circle"].threshold == 0.5
    document["annotations"] = own[:4]
    (tmp_path / "few.json").write_text(json.dumps(document))
    assert best_thresholds(tmp_path / "few.json", [result(a, 0.4) for a in own[:4]]) == {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = get_peft_sam3(untouched(), "minimal")
    place = tmp_path_factory.mktemp("saved") / "adapter"
    return save_adapter(model, place, prompts=["red circle"], thresholds={"red circle": 0.99})


def test_thresholds_are_saved_loaded_and_saved_again(folder, tmp_path):
    assert read_record(folder).thresholds == {"red circle": 0.99}
    model = load_adapter(untouched(), folder)
    assert thresholds_of(model, "default") == {"red circle": 0.99}
    save_adapter(model, tmp_path / "again")
    assert read_record(tmp_path / "again").thresholds == {"red circle": 0.99}


def test_the_predictor_takes_the_threshold_of_the_prompt_unless_told_otherwise(folder, data):
    document = document_of(data / "valid")
    shows = {a["image_id"] for a in document["annotations"] if a["category_id"] == 1}
    image = Image.open(data / "valid" / next(i["file_name"] for i in document["images"] if i["id"] in shows))
    predictor = Predictor(load_adapter(untouched(), folder))
    prompts = ["red circle", "red square"]

    def lowest(**options):
        return [min([*found.scores.tolist(), 1.0]) for found in predictor.predict(image, prompts, **options)]

    everything = lowest(threshold=0.0)
    assert all(score < 0.5 for score in everything)
    recorded = lowest()
    assert recorded[0] > 0.99
    assert recorded[1] > 0.5
    assert 0.5 < lowest(adapter="base")[0] < 0.99
    (strict, _), (told, _) = (lowest(threshold=value) for value in (0.6, 0.2))
    assert 0.6 < strict < 0.99
    assert 0.2 < told <= strict
    assert 0.6 < min(Predictor(predictor.model, threshold=0.6).predict(image, prompts[:1])[0].scores) < 0.99


def test_evaluate_writes_them_into_the_adapter(folder, data, capsys):
    command = [
        "evaluate",
        "--data",
        str(data),
        "--adapter",
        str(folder),
        "--base",
        "tiny",
        "--save-thresholds",
    ]
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != RECORD_FILE}
    assert main(command) == 0
    capsys.readouterr()
    saved = read_record(folder).thresholds
    assert set(saved) == {"red circle", "red square"}
    assert all(0 < threshold < 0.99 for threshold in saved.values())
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != RECORD_FILE} == before
    load_adapter(untouched(), folder)


def test_without_a_record_or_an_adapter_there_is_no_place_for_them(tmp_path, data, capsys):
    with pytest.raises(AdapterError, match=r"has no sam3_lora\.json"):
        record_thresholds(tmp_path, {})
    assert main(["evaluate", "--data", str(data), "--base", "tiny", "--save-thresholds"]) == 2
    assert "add --adapter DIR" in capsys.readouterr().err
