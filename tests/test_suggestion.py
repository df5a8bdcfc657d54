"""Settings to start with: what fits, and what the number of images bears."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sam3_lora.cli import main
from sam3_lora.errors import OutputError
from sam3_lora.estimation.estimate import estimate
from sam3_lora.suggestion import as_command, suggest, write_suggestion


@pytest.fixture
def dataset(tmp_path):
    def write(images, categories=2, objects=3):
        document = {
            "images": [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 64} for i in range(images)],
            "categories": [{"id": c, "name": f"kind {c}"} for c in range(categories)],
            "annotations": [
                {"id": i * objects + o, "image_id": i, "category_id": o % categories, "iscrowd": 0}
                for i in range(images)
                for o in range(objects)
            ],
        }
        folder = tmp_path / f"data_{images}_{categories}_{objects}"
        (folder / "train").mkdir(parents=True)
        (folder / "train" / "_annotations.coco.json").write_text(json.dumps(document))
        return folder

    return write


@pytest.mark.parametrize(("images", "preset"), [(5, "minimal"), (300, "balanced"), (5_000, "full")])
def test_more_images_bear_a_larger_preset(dataset, images, preset):
    found = suggest(dataset(images), gpu_memory=80)
    assert (found.preset, found.batch_size, found.gradient_accumulation_steps) == (preset, 4, 1)
    assert found.fits


def test_a_smaller_gpu_gets_a_smaller_batch_then_a_smaller_preset(dataset):
    data = dataset(300)
    needed = {
        (preset, batch): estimate(preset, data=data, batch=batch).device_bytes / 0.9e9 + 0.01
        for preset, batch in (("balanced", 1), ("minimal", 1))
    }
    small = suggest(data, gpu_memory=needed["balanced", 1])
    assert (small.preset, small.batch_size, small.gradient_accumulation_steps) == ("balanced", 1, 4)
    smaller = suggest(data, gpu_memory=needed["minimal", 1])
    assert (smaller.preset, smaller.batch_size) == ("minimal", 1)
    assert "balanced would suit 300 images, but does not fit" in smaller.reasons[0]


def test_where_nothing_fits_it_says_so_and_what_helps(dataset):
    found = suggest(dataset(300, categories=40), gpu_memory=3)
    assert (found.fits, found.max_prompts) == (False, 0)
    assert "do NOT fit" in found.reasons[1]
    assert "fewer prompts" in found.reasons[-1]


def test_the_room_for_prompts_is_the_most_that_fits(dataset):
    found = suggest(dataset(300), gpu_memory=12)
    objects = (found.estimate.worst_image or found.estimate).objects

    def needs(prompts):
        return estimate(found.preset, prompts=prompts, objects=objects, batch=found.batch_size).device_bytes

    assert needs(found.max_prompts) <= 0.9 * 12e9 < needs(found.max_prompts + 1)


def test_few_images_are_seen_more_often_than_many(dataset):
    few, many = (suggest(dataset(images), gpu_memory=80) for images in (60, 5_000))
    assert (few.max_epochs, many.max_epochs) == (60, 5)


def test_an_optimizer_step_never_needs_more_images_than_there_are(dataset):
    found = suggest(dataset(3), gpu_memory=80)
    assert found.batch_size * found.gradient_accumulation_steps <= 3


def test_the_run_file_holds_the_suggestion_and_its_reasons(dataset, tmp_path):
    data = dataset(300)
    found = suggest(data, gpu_memory=8)
    file = tmp_path / "runs" / "first.yaml"
    write_suggestion(found, data, file)
    text = file.read_text()
    assert text.startswith("# @package _global_\n# preset ")
    run = OmegaConf.create(text)
    assert run.training.batch_size == found.batch_size
    assert run.training.max_epochs == found.max_epochs
    assert run.paths.experiment_log_dir == str(tmp_path / "runs" / "first")
    with pytest.raises(OutputError, match=r"first\.yaml exists"):
        write_suggestion(found, data, file)
    assert file.read_text() == text


def test_the_command_takes_only_options_that_train_has(dataset, capsys):
    data = dataset(300)
    command = as_command(suggest(data, gpu_memory=8), data).split()
    assert command[:2] == ["sam3-lora", "train"]
    # The data have no images: so far, and no further, the options are understood.
    assert main([*command[1:], "--output", str(Path(data) / "run")]) == 1
    assert "add polygons or RLE" in capsys.readouterr().err


def test_the_verb_prints_reasons_or_json(dataset, capsys):
    data = str(dataset(300))
    assert main(["suggest", "--data", data, "--gpu-memory", "16"]) == 0
    assert "preset balanced: 4,128,768 parameters" in capsys.readouterr().out
    assert main(["suggest", "--data", data, "--gpu-memory", "16", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {"preset", "batch_size", "gradient_accumulation_steps", "max_epochs", "fits"} <= printed.keys()


def test_an_output_that_is_no_yaml_file_is_refused(dataset, capsys):
    data = str(dataset(3))
    assert main(["suggest", "--data", data, "--gpu-memory", "16", "--output", "run.txt"]) == 2
    assert "--output must be a .yaml file" in capsys.readouterr().err
