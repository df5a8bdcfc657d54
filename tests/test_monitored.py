"""What a run is judged by, from real runs: accumulation, clipping, averages of weights, early stopping, validations."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.shapes import PRETRAINING_CONCEPTS, write_coco
from sam3_lora.errors import ConfigError
from sam3_lora.training.averaging import WeightAverage
from sam3_lora.training.in_force import image_features
from sam3_lora.training.launch import resume, train
from sam3_lora.training.monitor import METRICS, chosen_metric, monitor_problems
from sam3_lora.training.settings import TrainSettings, check_settings

from sam3.train.data.coco_json_loaders import COCO_FROM_JSON  # isort: skip  (ours stand in for triton)

TRAIN_IMAGES, VALID_IMAGES, PROMPTS = 4, 2, 3


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What tests/monitored_runs.py prints."""
    folder = tmp_path_factory.mktemp("monitored")
    for split, count, seed in (("train", TRAIN_IMAGES, 1), ("valid", VALID_IMAGES, 2)):
        write_coco(folder / "data" / split, PRETRAINING_CONCEPTS[:PROMPTS], count, seed)
    script = Path(__file__).with_name("monitored_runs.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def runs(found):
    return found["runs"]


def events(run, kind):
    return [event for event in run["events"] if event["event"] == kind]


def losses(run):
    return [event["loss"] for event in events(run, "step")]


def without_event(event):
    return {name: value for name, value in event.items() if name not in ("event", "epoch")}


def test_a_run_with_accumulation_is_that_with_the_big_batch(runs, found):
    big, accumulated = runs["big"], runs["accumulated"]
    assert losses(accumulated) == pytest.approx(losses(big), rel=1e-5)
    assert found["difference"] <= 1e-4  # of the adapters after four steps, relative
    for of_big, of_accumulated in zip(big["stats"], accumulated["stats"], strict=True):
        terms = [name for name in of_big if "loss" in name]
        assert len(terms) > 10
        for name in terms:
            assert of_accumulated[name] == pytest.approx(of_big[name], rel=1e-4, abs=1e-6), name


def test_the_gradient_that_the_optimizer_gets_is_clipped(runs):
    assert all(norm > 10 for norm in runs["unclipped"]["gradient_norms"])
    assert runs["big"]["gradient_norms"] == pytest.approx([1.0] * 4, rel=1e-4)
    assert runs["big"]["weights"] != runs["unclipped"]["weights"]


def test_adapters_have_the_average_of_the_weights_and_training_goes_on_without_it(runs, found):
    assert found["averages"] == {"saved_is_average": True, "average_is_trained": False, "updates": 4}
    assert losses(runs["averaged"]) == losses(runs["big"])
    assert runs["averaged"]["weights"] != runs["big"]["weights"]


def test_a_resumed_run_has_the_same_average(runs):
    assert runs["averaged, stopped"]["code"] == 128 + 15
    assert runs["averaged, resumed"]["weights"] == runs["averaged"]["weights"]


def test_a_run_stops_early_and_says_so(runs):
    early = runs["stopped early"]
    assert {event["epoch"] for event in events(early, "step")} == {1, 2, 3}
    (stop,) = events(early, "stopped_early")
    assert without_event(stop) == {"best_epoch": 1, "best_metric": "segm_AP"}
    assert stop["epoch"] == 3


def test_a_run_that_stopped_early_is_only_validated_again(runs):
    before, again = runs["stopped early"], runs["stopped early, again"]
    assert again["weights"] == before["weights"]
    assert losses(again) == losses(before)
    assert again["trunk_images"] == {"train": 0, "val": VALID_IMAGES}
    assert without_event(events(again, "stopped_early")[-1]) == {"best_epoch": 1, "best_metric": "segm_AP"}


def test_two_validations_of_the_same_weights_give_the_same_numbers(runs):
    first, second = events(runs["stopped early"], "metrics")  # its learning rate is 0
    assert (first["epoch"], second["epoch"]) == (1, 3)
    assert without_event(first) == without_event(second)
    assert 0 < first["segm_AP"] < 1


def test_every_validation_asks_every_image_the_same_prompts(runs):
    asked = runs["stopped early"]["validation_prompts"]
    assert len(asked) == 2
    assert asked[0] == asked[1]
    texts, prompts = asked[0]
    assert texts == [concept.prompt for concept in PRETRAINING_CONCEPTS[:PROMPTS]]
    assert prompts == list(range(PROMPTS)) * VALID_IMAGES  # negatives too


def test_the_last_epoch_is_validated_whatever_the_frequency(runs):
    assert [event["epoch"] for event in events(runs["to the end"], "metrics")] == [1, 2]


def test_an_image_passes_the_vision_encoder_once_for_all_of_its_prompts(runs):
    run = runs["to the end"]
    assert run["trunk_images"] == {"train": 2 * TRAIN_IMAGES, "val": 2 * VALID_IMAGES}
    assert run["asked_prompts"] == {name: PROMPTS * images for name, images in run["trunk_images"].items()}


@pytest.mark.parametrize(("chunk", "passes"), [(None, 1), (PROMPTS, 1), (2, 2), (1, 3)])
def test_a_run_says_when_prompts_in_chunks_repeat_the_vision_encoder(chunk, passes, tmp_path):
    write_coco(tmp_path, PRETRAINING_CONCEPTS[:PROMPTS], 1, seed=1)
    loader = COCO_FROM_JSON(str(tmp_path / ANNOTATION_FILE), category_chunk_size=chunk)
    assert len(loader.getDatapointIds()) == passes  # each is a pass of the one image
    said = image_features({"val": {"dataset": {"coco_json_loader": {"category_chunk_size": chunk}}}}, PROMPTS)
    expected = (
        f"val: {passes} times an image, category_chunk_size is {chunk}" if passes > 1 else "once an image"
    )
    assert said.startswith(expected)


def test_boxes_alone_have_no_metrics_and_no_losses_of_masks(runs):
    run = runs["to the end"]
    assert all(set(without_event(event)) == {"bbox_AP", "bbox_AP50"} for event in events(run, "metrics"))
    assert not any("mask" in name or "dice" in name or "semantic" in name for name in run["stats"][0])


def test_a_run_says_what_it_minimises_and_what_it_watches(runs):
    def said(name):
        return events(runs[name], "start")[0]["settings"]

    assert said("to the end")["Losses"] == (
        "loss_bbox x 5, loss_giou x 2, loss_ce x 20, presence_loss x 20; gradient norm clipped to 1"
    )
    assert "loss_mask x 200, loss_dice x 10" in said("unclipped")["Losses"]
    assert said("unclipped")["Losses"].endswith("; gradients not clipped")
    assert said("to the end")["Monitor"] == (
        "bbox_AP decides adapters/best, validated after epochs 1, 6, ... and the last; no early stopping; "
        "no average of the weights"
    )
    assert said("stopped early")["Monitor"].endswith(
        "stops after 1 validation without a rise; weights averaged with decay 0.9"
    )


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        pytest.param({"training.best_metric": "segm_ap"}, "did you mean 'segm_AP'", id="metric"),
        pytest.param(
            {"training.best_metric": "segm_AP", "training.enable_segmentation": False},
            "needs masks",
            id="masks",
        ),
        pytest.param({"training.enable_segmentation": "no"}, "must be true or false", id="not a switch"),
        pytest.param({"training.ema_decay": 1.0}, "between 0 and 1", id="average"),
        pytest.param({"training.early_stopping_patience": 0}, "of 1 or more", id="patience"),
        pytest.param(
            {"training.early_stopping_patience": 2, "training.best_metric": None},
            "to watch",
            id="nothing to watch",
        ),
    ],
)
def test_settings_of_the_monitor_that_cannot_be_are_errors(config, problem, tmp_path):
    with pytest.raises(ConfigError, match=problem):
        check_settings(TrainSettings(data=tmp_path, output=tmp_path, base="tiny", config=config))


def test_all_wrong_settings_of_the_monitor_are_reported_at_once():
    wrong = {"training.ema_decay": 3, "training.early_stopping_patience": 1.5, "training.best_metric": "AP"}
    assert len(monitor_problems(wrong)) == 3


def test_auto_is_the_precision_of_masks_or_else_of_boxes():
    assert (chosen_metric("auto", masks=True), chosen_metric("auto", masks=False)) == ("segm_AP", "bbox_AP")
    assert all(chosen_metric(name, masks=True) == name for name in METRICS)


@pytest.mark.slow
def test_two_processes_stop_early_together(tmp_path):
    for split, count in (("train", 4), ("valid", 2)):
        write_coco(tmp_path / "data" / split, PRETRAINING_CONCEPTS[:PROMPTS], count, seed=1)
    settings = TrainSettings(
        data=tmp_path / "data",
        output=tmp_path / "run",
        base="tiny",
        preset="minimal",
        max_epochs=4,
        batch_size=1,
        num_gpus=2,
        config={
            "training.lr": 0.0,
            "training.gradient_accumulation_steps": 2,
            "training.ema_decay": 0.9,
            "training.early_stopping_patience": 1,
        },
    )
    assert train(settings).stopped_early == 2
    assert resume(settings.output).stopped_early == 2


def test_the_average_moves_by_the_decay_and_in_the_first_updates_faster():
    model = torch.nn.Linear(1, 1, bias=False)
    average, expected = WeightAverage(model, decay=0.3), model.weight.item()
    for update in range(1, 7):
        with torch.no_grad():
            model.weight.fill_(float(update))
        average.update()
        decay = min(0.3, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * update
    with average.in_use():
        assert model.weight.item() == pytest.approx(expected)
        with average.in_use():
            assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 6.0
