"""`estimate`: its numbers are the counted ones, it says what would help, and it refuses what was not counted."""

import dataclasses
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from sam3_lora import estimate
from sam3_lora.cli import main
from sam3_lora.errors import ConfigError, DataError
from sam3_lora.estimation.coefficients import counted_formulas
from sam3_lora.estimation.levers import counted_presets, formula_of, shipped_levers
from sam3_lora.evaluation.batches import probe_batch
from sam3_lora.presets import PRESETS, TRAINABLE_PARAMETERS
from sam3_lora.training.composition import shipped_config
from sam3_lora.training.memory_check import STEPS, memory_check


@pytest.fixture
def dataset(tmp_path):
    """Three categories; images with 0, 2 and 60 objects, of which 51 are in one prompt, and a crowd."""
    objects = [(2, 1), (2, 2), *[(3, 1)] * 9, *[(3, 2)] * 51]
    annotations = [
        {"id": n, "image_id": i, "category_id": c, "iscrowd": 0} for n, (i, c) in enumerate(objects)
    ]
    annotations.append({"id": 99, "image_id": 1, "category_id": 1, "iscrowd": 1})
    document = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 9, "height": 9} for n in (1, 2, 3)],
        "categories": [{"id": n, "name": f"thing {n}"} for n in (1, 2, 3)],
        "annotations": annotations,
    }
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "_annotations.coco.json").write_text(json.dumps(document))
    return tmp_path


def test_the_levers_that_were_counted_are_those_of_the_shipped_configs():
    assert shipped_levers() == shipped_config().memory, "count again: python benchmarks/count.py"


def test_every_formula_meets_what_was_counted():
    for by_setting in counted_formulas()["formulas"].values():
        for formula in by_setting.values():
            assert formula.worst_error <= 0.02
            assert len(formula.counted) > 7  # more than there are weights


@pytest.mark.parametrize("preset", ["minimal", "balanced", "full"])
def test_trainable_parameters_are_exact(preset):
    assert estimate(preset).trainable_parameters == TRAINABLE_PARAMETERS[preset]


def test_the_breakdown_adds_up_to_the_peak_and_the_device():
    found = estimate("balanced", prompts=4)
    lines = dict(found.breakdown)
    assert lines["optimizer"] == 8 * found.trainable_parameters
    assert found.device_bytes == sum(lines.values())
    assert found.peak_bytes == sum(lines.values()) - lines["cuda_context"]


def test_more_prompts_objects_and_images_never_cost_less():
    sizes = [(1, 5, 1), (2, 5, 1), (16, 5, 1), (16, 200, 1), (16, 200, 2), (80, 200, 8)]
    for preset in counted_presets():
        found = [estimate(preset, prompts=p, objects=o, batch=b) for p, o, b in sizes]
        assert sorted(e.peak_bytes for e in found) == [e.peak_bytes for e in found]
        assert sorted(e.step_flops for e in found) == [e.step_flops for e in found]


def test_advice_begins_with_the_largest_gain_and_is_what_the_change_brings():
    found = estimate("balanced", prompts=8, batch=2)
    gains = [advice.saves_bytes for advice in found.advice]
    assert gains == sorted(gains, reverse=True)
    (batch,) = (a for a in found.advice if a.change.startswith("training.batch_size=1, and 2 x"))
    assert found.peak_bytes - batch.saves_bytes == estimate("balanced", prompts=8).peak_bytes
    assert any(a.change.startswith("preset minimal: ") for a in found.advice)


def test_a_preset_that_was_not_counted_is_refused_with_those_that_were(monkeypatch):
    counted = counted_formulas()
    fewer = {name: by_setting for name, by_setting in counted["formulas"].items() if name != "vision"}
    monkeypatch.setattr(
        "sam3_lora.estimation.levers.counted_formulas", lambda: {**counted, "formulas": fewer}
    )
    with pytest.raises(ConfigError, match="preset 'vision' was not counted; counted are minimal, balanced"):
        estimate("vision")


def test_every_preset_was_counted():
    assert counted_formulas()["formulas"].keys() == PRESETS.keys()


def test_levers_that_are_off_are_the_advice(monkeypatch):
    official = counted_formulas()["levers"]["official"]
    found = estimate("balanced", prompts=4, memory=official)
    (levers,) = (a for a in found.advice if "as shipped" in a.change)
    assert "memory.segmentation_chunk" in levers.change
    assert found.peak_bytes - levers.saves_bytes == estimate("balanced", prompts=4).peak_bytes


def test_a_dataset_gives_prompts_and_objects_of_the_typical_and_the_worst_image(dataset):
    found = estimate("minimal", data=dataset)
    assert (found.prompts, found.objects) == (4, 2)
    # A prompt with more than 50 objects is left out of the step.
    assert found.worst_image == dataclasses.replace(
        estimate("minimal", prompts=4, objects=9), advice=(), worst_image=None
    )
    assert estimate("minimal", data=dataset, max_objects=100).worst_image.objects == 60
    assert estimate("minimal", data=dataset, objects=7).worst_image is None


def test_a_gpu_must_hold_the_worst_image_and_what_cuda_takes(dataset):
    worst = estimate("minimal", data=dataset).worst_image.device_bytes
    assert estimate("minimal", data=dataset, gpu_memory=worst / 1e9).fits is True
    assert estimate("minimal", data=dataset, gpu_memory=worst / 1e9 - 0.001).fits is False
    assert "fits" not in estimate("minimal").as_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"preset": "ballanced"}, "did you mean 'balanced'", id="unknown preset"),
        pytest.param({"prompts": 0}, "prompts must be a whole number from 1 to", id="no prompt"),
        pytest.param(
            {"batch": 2000}, "batch must be a whole number from 1 to 1,000, got 2000", id="huge batch"
        ),
        pytest.param({"objects": 2.5}, "objects must be a whole number from 0", id="half an object"),
        pytest.param({"objects": 201}, "200 objects at most, got 201 in 1 prompts", id="more than queries"),
        pytest.param({"gpu_memory": -1}, "gpu_memory is in GB", id="negative memory"),
        pytest.param({"memory": {"bf16": True}}, "unknown key of memory 'bf16'", id="unknown lever"),
        pytest.param({"memory": {"mask_loss_chunk": 7}}, "were not counted together", id="other lever"),
    ],
)
def test_what_cannot_be_is_one_clear_error(options, message):
    with pytest.raises(ConfigError, match=message):
        estimate(**options)


def test_all_problems_come_at_once():
    with pytest.raises(ConfigError, match=r"(?s)prompts must.*batch must.*gpu_memory"):
        estimate(prompts=0, batch=0, gpu_memory=0)


def test_a_folder_without_a_dataset_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        estimate(data=tmp_path)


def test_the_command_takes_seconds_and_no_torch(dataset):
    code = "import sys; from sam3_lora.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    start = time.perf_counter()
    words = ["estimate", "--data", str(dataset), "--gpu-memory", "16", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 5
    *document, torch_loaded = done.stdout.splitlines()
    found = json.loads("\n".join(document))
    assert torch_loaded == "False"
    assert found == json.loads(json.dumps(estimate("balanced", data=dataset, gpu_memory=16).as_dict()))
    keys = {"peak_bytes", "step_flops", "trainable_parameters", "breakdown", "advice", "fits", "worst_image"}
    assert keys <= set(found)


def test_the_command_says_where_the_memory_goes_and_what_helps(capsys):
    assert main(["estimate", "--prompts", "4", "--batch", "2", "--gpu-memory", "4"]) == 0
    printed = capsys.readouterr().out
    assert "2 images with 4 prompts and 5 objects each" in printed
    assert "does not fit into 4 GB" in printed
    assert "training.batch_size=1, and 2 x as many training.gradient_accumulation_steps" in printed


def test_the_command_takes_levers_as_the_config_spells_them(capsys):
    words = [
        f"memory.{key}={json.dumps(value)}" for key, value in counted_formulas()["levers"]["official"].items()
    ]
    assert main(["estimate", "--json", *(w for word in words for w in ("--set", word))]) == 0
    official = json.loads(capsys.readouterr().out)
    assert official["peak_bytes"] > 1.2 * estimate("balanced").peak_bytes
    assert main(["estimate", "--set", "r=16"]) == 2
    assert "only presets as they are shipped were counted" in capsys.readouterr().err


def test_train_says_what_a_step_costs_before_it_starts(dataset, capsys):
    assert (
        main(["train", "--data", str(dataset), "--output", str(dataset / "run"), "--preset", "minimal"]) == 1
    )
    found = estimate("minimal", data=dataset)
    error = capsys.readouterr().err
    assert (
        f"Estimated: {found.device_bytes / 1e9:.1f} GB of GPU memory (4 prompts, 2 objects an image)" in error
    )
    assert "(9)" in error
    assert main(["train", "--data", str(dataset), "--output", "x", "--base", "tiny"]) == 1
    assert "Estimated" not in capsys.readouterr().err
    assert main(["train", "--data", str(dataset), "--output", "x", "--set", "r=4"]) == 1
    assert "No estimate of memory: only presets" in capsys.readouterr().err


def test_the_trainer_compares_the_estimate_with_the_highest_of_the_first_steps(caplog):
    caplog.set_level("INFO")
    boxes = np.array([[1, 1, 9, 9], [20, 20, 40, 40]], dtype=np.float32)
    batch = probe_batch(
        np.zeros((50, 50, 3), dtype=np.uint8),
        np.ones((2, 50, 50), dtype=bool),
        boxes,
        shown="circle",
        absent="square",
        resolution=112,
        device=torch.device("cpu"),
    )
    check = memory_check({"base": "facebook/sam3", "preset": "minimal", "overrides": {}})
    check.see(batch)
    estimated = estimate("minimal", prompts=3, objects=4).peak_bytes
    for peak in [*[estimated // 2] * (STEPS - 2), estimated * 11 // 10, 1, 2 * estimated]:
        check.measured(peak)
    (text,) = caplog.messages
    assert text.endswith(f"{estimated / 1e9:.2f} GB estimated (+10%)")


@pytest.mark.parametrize(
    "model",
    [
        {"base": "tiny", "preset": "minimal"},
        {"base": "random", "preset": "minimal", "overrides": {"r": 4}},
        {"base": "random", "preset": "minimal", "memory": {"mask_loss_chunk": 7}},
        {"base": "random"},
    ],
)
def test_a_run_that_was_not_counted_is_not_compared(model):
    assert memory_check(model) is None


def test_a_formula_is_found_by_the_values_of_the_levers():
    assert formula_of("minimal", {**shipped_levers(), "bf16_base": True}) is formula_of(
        "minimal", shipped_levers()
    )
    assert formula_of("minimal", {**shipped_levers(), "segmentation_chunk": True}) is None


def test_an_image_is_asked_up_to_the_cap_whatever_the_number_of_classes(dataset):
    found = [
        estimate("minimal", data=dataset, asking=asking).prompts
        for asking in (None, {"max_prompts_per_image": 7}, {"negatives": "classes"}, {"negatives": "none"})
    ]
    assert found == [4, 7, 3, 2]
