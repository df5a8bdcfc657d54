import json
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from sam3_lora.data.shapes import DEMO_CONCEPTS, write_coco
from sam3_lora.errors import DataError
from sam3_lora.training.composition import GROUPS, shipped_config
from sam3_lora.training.splits import SPLIT_KEYS, check_run_data, split_files

CONFIGS = Path(__file__).parents[1] / "src" / "sam3_lora" / "configs" / "sam3_lora"


def test_the_groups_are_the_folders():
    assert sorted(GROUPS) == sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())


def test_every_file_is_for_the_whole_config_and_says_what_it_is_for():
    for path in CONFIGS.rglob("*.yaml"):
        first, second = path.read_text(encoding="utf-8").splitlines()[:2]
        assert first == "# @package _global_", path
        assert second.startswith("# "), path


def test_every_line_of_the_usual_settings_has_a_comment():
    text = (CONFIGS / "common.yaml").read_text(encoding="utf-8")
    block = text.partition("\ntraining:\n")[2].partition("\ntrainer:")[0]
    lines = [line for line in block.splitlines() if line.startswith("  ")]
    bare = [line.split(":")[0].strip() for line in lines if " # " not in line]
    # the line above speaks for them too
    assert bare == ["ann_file_train", "img_folder_val", "num_val_workers"]


@pytest.mark.parametrize(
    ("defaults", "scheduler"),
    [
        ("/sam3_lora/balanced, _self_", "CosineParamScheduler"),
        ("/sam3_lora/balanced, override /sam3_lora/schedule: constant, _self_", "ConstantParamScheduler"),
        (
            "/sam3_lora/demo, _self_, override /sam3_lora/schedule: inverse_square_root",
            "InverseSquareRootParamScheduler",
        ),
    ],
)
def test_a_yaml_of_ones_own_exchanges_a_group(tmp_path, defaults, scheduler):
    run = tmp_path / "run.yaml"
    run.write_text(f"# @package _global_\ndefaults: [{defaults}]\n")
    with initialize_config_module("sam3.train", version_base="1.2"):
        config = compose(str(run.with_suffix("")))
    targets = {group.scheduler._target_.rpartition(".")[2] for group in config.trainer.optim.options.lr}
    assert targets == {scheduler}


def test_the_official_script_takes_a_choice_that_lies_in_the_working_folder(tmp_path, monkeypatch):
    folder = tmp_path / "sam3_lora" / "schedule"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\ntrainer: {optim: {options: {lr: []}}}\n")
    monkeypatch.chdir(tmp_path)
    with initialize_config_module("sam3.train", version_base="1.2"):
        config = compose("sam3_lora/balanced", overrides=["sam3_lora/schedule=mine"])
    assert config.trainer.optim.options.lr == []


def test_a_config_is_composed_beside_the_one_that_is_being_composed():
    with initialize_config_module("sam3.train", version_base="1.2"):
        before = GlobalHydra.instance().hydra
        assert shipped_config(name="full").adapter.preset == "full"
        assert GlobalHydra.instance().hydra is before
        assert compose("sam3_lora/minimal").adapter.preset == "minimal"
    assert not GlobalHydra.instance().is_initialized()


def test_a_shipped_config_is_the_callers_own():
    changed = shipped_config({"training.lr": 1.0})
    assert changed.training.lr == 1.0
    assert shipped_config().training.lr == 2e-4


def test_configs_are_composed_without_torch():
    code = (
        "import sys; from sam3_lora.training.composition import shipped_config as s; s(); "
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.fixture
def scattered(tmp_path):
    """A dataset whose training images lie elsewhere, with an annotation file of another name beside the folder."""
    write_coco(tmp_path / "data" / "valid", DEMO_CONCEPTS, 2, seed=1)
    write_coco(tmp_path / "pictures", DEMO_CONCEPTS, 3, seed=2)
    (tmp_path / "pictures" / "_annotations.coco.json").rename(tmp_path / "labels.json")
    return {
        "img_folder_train": str(tmp_path / "pictures"),
        "ann_file_train": str(tmp_path / "labels.json"),
    }


def test_splits_lie_in_the_dataset_unless_the_config_says_otherwise():
    config = shipped_config({"paths.dataset_root": "/data"}).training
    assert split_files(config) == {
        "train": (Path("/data/train"), Path("/data/train/_annotations.coco.json")),
        "valid": (Path("/data/valid"), Path("/data/valid/_annotations.coco.json")),
    }
    usual = OmegaConf.to_container(config, resolve=True)
    assert {key: usual[key] for key in SPLIT_KEYS} == {k: f"/data/{v}" for k, v in SPLIT_KEYS.items()}


def test_images_that_lie_elsewhere_are_checked_where_they_are(scattered, tmp_path):
    with pytest.raises(DataError, match="no folder 'train'"):
        check_run_data(tmp_path / "data", {})
    check_run_data(tmp_path / "data", scattered)
    labels = json.loads(Path(scattered["ann_file_train"]).read_text())
    labels["images"][0]["file_name"] = "gone.png"
    Path(scattered["ann_file_train"]).write_text(json.dumps(labels))
    with pytest.raises(DataError, match=r"gone\.png \(image 1 of .*labels\.json\)"):
        check_run_data(tmp_path / "data", scattered)
