"""Training through the unmodified official script: from Python, by the name of a config, and by a path."""

import csv
import io
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from official_step import register_resolvers
from peft import PeftModel
from PIL import Image, ImageChops
from tiny_forward import forward

from sam3_lora.adapter import adapted_modules, load_adapter
from sam3_lora.attention import split_attention
from sam3_lora.base.loading import load_base
from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.shapes import DEMO_CONCEPTS, write_coco
from sam3_lora.errors import ConfigError, DataError, OutputError, Sam3LoraError
from sam3_lora.evaluation.metrics import evaluate_split
from sam3_lora.presets import PRESETS
from sam3_lora.training.launch import train
from sam3_lora.training.progress import PROGRESS_FILE
from sam3_lora.training.settings import TrainSettings, run_yaml
from sam3_lora.training.trainer import METRICS, LoraTrainer

CONFIGS = (*PRESETS, "demo")
ADAPTER_FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors", "sam3_lora.json")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    for split, seed in (("train", 1), ("valid", 2)):
        write_coco(folder / split, DEMO_CONCEPTS, 12, seed)
    return folder


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """One short run by ``train``: its result, and the progress that it reported."""
    seen = []
    output = tmp_path_factory.mktemp("runs") / "short"
    settings = TrainSettings(
        data=dataset, output=output, base="tiny", max_epochs=2, batch_size=4, config={"training.csv": True}
    )
    return train(settings, on_progress=seen.append), seen


def official_script(*arguments, cwd, **environment):
    """Run the official script as a user would; returns the finished process."""
    command = [sys.executable, "-W", "ignore", "-m", "sam3.train.train", *arguments]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_a_run_leaves_the_files_that_the_documentation_names(run):
    output = run[0].output
    for name in (
        "run.yaml",
        "config.yaml",
        "config_resolved.yaml",
        "checkpoints/checkpoint.pt",
        "logs/train.log",
    ):
        assert (output / name).is_file(), name
    for name in ("epoch_1", "epoch_2", "last", "best"):
        folder = output / "adapters" / name
        assert not folder.is_symlink()
        assert tuple(sorted(entry.name for entry in folder.iterdir())) == ADAPTER_FILES
        assert all(stat.S_IMODE(file.stat().st_mode) == 0o644 for file in folder.iterdir())
    assert list((output / "tensorboard").iterdir())
    assert {file.name for file in (output / "dumps").rglob("*.json")} == {
        "coco_predictions_bbox.json",
        "coco_predictions_segm.json",
    }


def test_the_record_of_an_adapter_tells_what_it_was_trained_on_and_what_it_reached(run):
    records = {
        name: json.loads((run[0].output / "adapters" / name / "sam3_lora.json").read_text())
        for name in ("best", "last")
    }
    reached = json.loads((run[0].output / "logs" / "best_metrics.json").read_text())
    shared = {"epochs": 2, "images": 12, "seed": 0, "best_metric": "segm_AP"}
    assert records["last"]["training"] == {"epoch": 2, **shared}
    assert records["best"]["training"] == {
        "epoch": reached["epoch"],
        **shared,
        "metrics": {name: reached[name] for name in ("bbox_AP", "bbox_AP50", "segm_AP", "segm_AP50")},
    }
    assert records["best"]["base"] == "tiny"
    assert records["best"]["prompts"] == ["purple cross", "orange hexagon", "cyan crescent"]


def test_the_log_says_what_is_in_force(run):
    log = (run[0].output / "logs" / "train.log").read_text()
    for line in (
        "Adapter: 68 modules, 133,120 of 5,038,310 parameters (2.642%)",
        "Precision: float32 on cpu",
        ", 4 prompts an image",
        "Verified negatives: 12 of 12 images",
        "Learning rate: ",
    ):
        assert line in log
    assert (run[0].trainable_parameters, run[0].total_parameters) == (133_120, 5_038_310)


def test_validation_predicts_nothing_without_a_category(run):
    for file in (run[0].output / "dumps").rglob("coco_predictions_*.json"):
        assert {result["category_id"] for result in json.loads(file.read_text())} == {1, 2, 3}


def test_progress_counts_epochs_and_steps_and_ends_with_metrics(run):
    seen = run[1]
    steps = list(dict.fromkeys((p.epoch, p.step) for p in seen))
    assert steps == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    assert {(p.epochs, p.steps) for p in seen} == {(2, 3)}
    assert all(p.loss > 0 for p in seen)
    assert set(seen[-1].metrics) == set(METRICS)


def test_progress_tells_the_rate_of_each_step_its_memory_and_the_terms_of_its_loss(run):
    steps = {(p.epoch - 1) * p.steps + p.step - 1: p for p in run[1]}
    first, last = 3e-3, 1.5e-5  # of the tiny schedule
    cosine = {k: last + (first - last) * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)}
    assert {k: p.rates[0] for k, p in steps.items()} == pytest.approx(cosine)
    assert {p.memory_of for p in steps.values()} == {"process memory"}
    assert all(1e8 < p.memory_bytes <= p.peak_bytes < 1e10 for p in steps.values())
    assert {"loss_bbox", "loss_giou", "loss_ce", "presence_loss", "loss_mask", "loss_dice"} <= set(
        steps[0].terms
    )
    assert not [name for name in steps[0].terms if "aux" in name or "o2m" in name]


@pytest.fixture(scope="module")
def board(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run[0].output / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    return events.Reload()


def test_tensorboard_has_every_step_and_every_validation(run, board):
    losses = {event.step: float(tensor_of(event)) for event in board.Tensors("Train/loss")}
    assert losses == pytest.approx({p.step + 3 * (p.epoch - 1): p.loss for p in run[1]})
    for name in ("Train/loss_mask", "LearningRate/group 1", "Memory/process memory in use (GB)"):
        assert [event.step for event in board.Tensors(name)] == [1, 2, 3, 4, 5, 6]
    last = board.Tensors("Validation/segm_AP50")[-1]
    assert (last.step, float(tensor_of(last))) == (6, pytest.approx(run[1][-1].metrics["segm_AP50"]))


def tensor_of(event):
    from tensorboard.util.tensor_util import make_ndarray

    return make_ndarray(event.tensor_proto)


def test_tensorboard_shows_the_same_validation_images_after_each_epoch(board):
    pictures = board.Images("Validation/predictions")
    assert [event.step for event in pictures] == [3, 6]
    first, second = (Image.open(io.BytesIO(event.encoded_image_string)) for event in pictures)
    assert first.size == second.size
    assert first.height > 4 * 320  # four rows
    left = (0, 100, first.width // 2, first.height)  # image and ground truth, below the headings
    assert ImageChops.difference(first.crop(left), second.crop(left)).getbbox() is None


def test_the_tables_have_a_row_for_each_step_and_each_validation(run):
    logs = run[0].output / "logs"
    steps = list(csv.DictReader((logs / "steps.csv").open()))
    assert [(row["epoch"], row["step"]) for row in steps] == [(e, s) for e in "12" for s in "123"]
    last = run[1][-1]
    assert float(steps[-1]["loss"]) == last.loss
    assert float(steps[-1]["loss_giou"]) == last.terms["loss_giou"]
    assert float(steps[-1]["lr"]) == last.rates[0]
    assert 0 <= float(steps[-1]["waited"]) <= float(steps[-1]["seconds"])
    validations = list(csv.DictReader((logs / "validations.csv").open()))
    assert [row["epoch"] for row in validations] == ["1", "2"]
    assert float(validations[-1]["bbox_AP"]) == last.metrics["bbox_AP"]


def test_the_run_ends_with_a_picture_of_its_curves(run):
    with Image.open(run[0].output / "curves.png") as picture:
        assert picture.size == (900, 3 * 300)  # loss, metrics, learning rate


def test_the_checkpoint_holds_adapters_and_optimizer_but_not_the_base(run):
    checkpoint = torch.load(run[0].output / "checkpoints" / "checkpoint.pt", weights_only=True)
    assert sum(tensor.numel() for tensor in checkpoint["model"].values()) == 133_120
    assert all(".lora_" in name for name in checkpoint["model"])
    assert len(checkpoint["optimizer"]["state"]) == len(checkpoint["model"])


def test_training_changed_the_adapter(run):
    first, last = (
        load_adapter(load_base("tiny", device="cpu"), run[0].output / "adapters" / name)
        for name in ("epoch_1", "last")
    )
    weights = {name: p for name, p in first.named_parameters() if "lora_B" in name}
    assert weights
    assert all(p.any() and not torch.equal(p, last.get_parameter(name)) for name, p in weights.items())


def test_plain_peft_loads_the_adapter_with_the_same_outputs(run):
    ours = load_adapter(load_base("tiny", device="cpu"), run[0].adapter).get_base_model()
    plain = PeftModel.from_pretrained(split_attention(load_base("tiny", device="cpu")), str(run[0].adapter))
    a, b = forward(ours), forward(plain.get_base_model().eval())
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_reloaded_adapter_gives_the_trainer_s_own_numbers(run, dataset):
    model = load_adapter(load_base("tiny", device="cpu"), run[0].adapter).get_base_model()
    valid = dataset / "valid"
    result = evaluate_split(model, valid, valid / ANNOTATION_FILE, resolution=112, batch_size=4, device="cpu")
    scores = result.overall.as_dict()
    measured = {name: scores[name] for name in run[0].metrics}
    assert measured == pytest.approx(dict(run[0].metrics), abs=5e-4)


def test_the_official_script_finds_our_config_by_name_and_trains_in_two_processes(dataset, tmp_path):
    """The balanced config by its name, with paths from the environment and the tiny base from a file of the user."""
    (tmp_path / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults: [/sam3_lora/balanced, /sam3_lora/tiny, _self_]\n"
        "training: {max_epochs: 1, batch_size: 3, gradient_accumulation_steps: 2}\n"
    )
    result = official_script(
        "-c", str(tmp_path / "mine.yaml"), "--use-cluster", "0", "--num-gpus", "2",
        cwd=tmp_path, DATASET_ROOT=str(dataset), EXPERIMENT_DIR=str(tmp_path / "run"),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert len(list((tmp_path / "run" / "adapters").iterdir())) == 3
    steps = [json.loads(line) for line in (tmp_path / "run/logs/progress.jsonl").read_text().splitlines()]
    assert [(s["step"], s["steps"]) for s in steps if s["event"] == "step"] == [(1, 1)]


@pytest.mark.slow
def test_the_demo_config_works_by_name_in_an_empty_folder(tmp_path):
    result = official_script("-c", "sam3_lora/demo", cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert (tmp_path / "runs/demo/adapters/best/adapter_model.safetensors").is_file()


@pytest.fixture(scope="module")
def composed():
    register_resolvers()
    with initialize_config_module("sam3.train", version_base="1.2"):
        yield lambda name: compose(config_name=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_composes_and_names_its_preset(composed, name, monkeypatch):
    monkeypatch.setenv("DATASET_ROOT", "somewhere")
    config = composed(f"sam3_lora/{name}")
    assert config.trainer._target_ == "sam3_lora.training.LoraTrainer"
    assert config.trainer.model._target_ == "sam3_lora.build_sam3_lora_model"
    assert config.trainer.model.preset == ("balanced" if name == "demo" else name)


def test_box_and_mask_losses_are_on(composed):
    loss = composed("sam3_lora/demo").trainer.loss.all
    targets = {entry._target_.rpartition(".")[2] for entry in loss.loss_fns_find}
    assert targets == {"Boxes", "IABCEMdetr", "ChunkedMasks"}
    assert loss.loss_fn_semantic_seg._target_ == "sam3.train.loss.loss_fns.SemanticSegCriterion"


def test_another_hydra_program_keeps_its_search_path(tmp_path):
    """Hydra loads every plug-in in the environment, ours too, in every Hydra program."""
    (tmp_path / "config.yaml").write_text("answer: 42\n")
    code = (
        "from hydra import initialize_config_dir\n"
        "from hydra.core.global_hydra import GlobalHydra\n"
        f"with initialize_config_dir({str(tmp_path)!r}, version_base='1.2'):\n"
        "    path = GlobalHydra.instance().config_loader().get_search_path()\n"
        "    print([entry.provider for entry in path.get_path()])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['hydra', 'main', 'schema']"


def test_the_run_file_holds_only_what_was_asked_for(dataset, tmp_path):
    settings = TrainSettings(
        data=dataset, output=tmp_path, base="tiny", lr=0.01, config={"training.amp_enabled": False}
    )
    run = yaml.safe_load(run_yaml(settings))
    assert run["defaults"] == ["/sam3_lora/balanced", "/sam3_lora/tiny", "_self_"]
    assert run["training"] == {"lr": 0.01, "amp_enabled": False}
    assert run["paths"] == {"dataset_root": str(dataset), "experiment_log_dir": str(tmp_path)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        pytest.param({"preset": "balnced"}, ConfigError, "did you mean 'balanced'", id="preset"),
        pytest.param(
            {"overrides": {"lora_alhpa": 4}}, ConfigError, "did you mean 'lora_alpha'", id="override"
        ),
        pytest.param({"overrides": {"r": 0}}, ConfigError, "r must be a whole number of 1 or more", id="r"),
        pytest.param(
            {"config": {"training.weigth_decay": 0.1}},
            ConfigError,
            "unknown key 'training.weigth_decay': training has no 'weigth_decay'; did you mean 'weight_decay'",
            id="config key",
        ),
        pytest.param({"overrides": {"rank": 8}}, ConfigError, "it is r here", id="keyword of the seed"),
        pytest.param(
            {"config": {"lora.alpha": 16}},
            ConfigError,
            r"unknown key 'lora\.alpha'; it is lora_alpha here",
            id="config key of the seed",
        ),
        pytest.param(
            {"config": {"training.lr": "abc", "training.num_train_workers": [2]}},
            ConfigError,
            r"training.lr needs a number, got 'abc'\n  training.num_train_workers needs a number, got \[2\]",
            id="config value",
        ),
        pytest.param({"base": "tinny"}, Sam3LoraError, "unknown base 'tinny'", id="base"),
        pytest.param({"data": Path("nowhere")}, DataError, "nowhere does not exist", id="data"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(dataset, tmp_path, changes, error, message):
    settings = {"data": dataset, "output": tmp_path / "run", "base": "tiny", **changes}
    with pytest.raises(error, match=message):
        train(TrainSettings(**settings))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_else_is_left_alone(dataset, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="is not empty"):
        train(TrainSettings(data=dataset, output=tmp_path, base="tiny"))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_epochs": 0}, "max_epochs must be 1 or more, got 0"),
        (
            {"batch_size": -1, "lr": 3.0},
            "batch_size must be 1 or more, got -1; lr must lie between 0 and 1, got 3.0",
        ),
    ],
)
def test_settings_out_of_range_are_refused_together(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainSettings(data=Path("d"), output=Path("o"), **values)


def test_an_error_of_the_official_script_is_one_line_that_names_the_cause(dataset, tmp_path):
    settings = TrainSettings(data=dataset, output=tmp_path / "run", base="tiny", batch_size=100)
    with pytest.raises(Sam3LoraError) as caught:
        train(settings)
    text = str(caught.value)
    assert "not one full batch in the training data: 12 images, and the trainer takes 100 a step" in text
    assert "console.log" in text


def test_what_has_no_effect_in_a_yaml_is_refused_and_a_lora_block_as_in_the_seed_with_its_names_here(
    dataset, tmp_path
):
    run = tmp_path / "run.yaml"
    run.write_text(
        "# @package _global_\ndefaults: [/sam3_lora/minimal, /sam3_lora/tiny, _self_]\n"
        "lora: {rank: 16, target_modules: [q_proj], apply_to_text_encoder: true, beta: 1}\n"
        "training: {val_epoch_frq: 2}\ntrainer: {modee: train}\n"
    )
    result = official_script("-c", str(run), cwd=tmp_path, DATASET_ROOT=str(dataset))
    assert result.returncode != 0
    for problem in (
        "unknown key 'lora.rank'; it is r here",
        "unknown key 'lora.target_modules'; a preset chooses them",
        "unknown key 'lora.apply_to_text_encoder'; name the parts to adapt instead: components=[...]",
        "unknown key 'lora.beta'; there is no such setting",
        "training.val_epoch_frq: nothing reads this key; did you mean 'val_epoch_freq'?",
        "trainer.modee: the trainer has no such key; did you mean 'mode'?",
    ):
        assert problem in result.stderr


def test_an_unknown_metric_for_the_best_adapter_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown metric 'segm_AP5O'; did you mean 'segm_AP50'"):
        LoraTrainer(adapter_dir="x", best_metric="segm_AP5O", logging={"log_dir": str(tmp_path)})
    assert (
        "did you mean 'segm_AP50'" in (tmp_path / PROGRESS_FILE).read_text()
    )  # so that the launcher can say it


def test_the_trained_model_keeps_its_official_parameter_names():
    from sam3_lora import build_sam3_lora_model

    model = build_sam3_lora_model(base="tiny", preset="minimal", overrides={"r": 4})
    assert type(model).__name__ == "Sam3Image"
    assert model.training
    assert len(adapted_modules(model)) == 42
    assert any(
        name.startswith("backbone.vision_backbone.trunk.blocks.0") for name, _ in model.named_parameters()
    )
