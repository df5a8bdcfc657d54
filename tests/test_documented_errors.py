"""Every error of docs/reference/errors.md, from a run that is really broken in that way, against the text on the page."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from sam3_lora.data.shapes import DEMO_CONCEPTS, write_coco
from sam3_lora.errors import ConfigError
from sam3_lora.training.launch import train
from sam3_lora.training.settings import TrainSettings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "errors.md"
BLOCK = re.compile(r"<!-- error: ([\w-]+) -->\n```text\n(.*?)\n```", re.DOTALL)
DOCUMENTED = dict(BLOCK.findall(PAGE.read_text(encoding="utf-8")))

FROM_BROKEN_RUNS = ("loss", "predictions", "adapter", "memory", "masks")
FROM_THE_SCRIPT = {  # the lines of a YAML below its defaults, and whether it has its first line
    "key": ("training: {lr: '${training.lr_vison_backbone}'}", True),
    "header": ("training: {max_epochs: 1}", False),
    "variable": ("training: {max_epochs: 1}", True),
}
ELSEWHERE = {"loader", "wandb", "full-size"}


def in_general(text, root="/data"):
    """Return a text without the numbers, names of tensors and folders that are those of one run."""
    package = ".".join(Path(root).parts[1:])
    text = text.replace(str(root), "/data").replace(f"'{package}'", "'data'")
    text = re.sub(r"\(training has [\w, ]+\)", "(training has KEYS)", text)
    text = re.sub(r"'image\d+\.png'( \(id \d+\))?", "IMAGE", text)
    text = re.sub(r"\b\w+(\.\w+)+\.lora_[AB]\.default\.weight", "TENSOR", text)
    return re.sub(r"\b(\d[\d.,]*(e[+-]?\d+)?|nan|inf)\b( [MG]B)?", "#", text)


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def broken_runs(root, *which):
    result = python(Path(__file__).with_name("broken_runs.py"), root, *which)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """What five broken runs said and left, and the folder they are in."""
    root = tmp_path_factory.mktemp("broken")
    return broken_runs(root), root


def test_every_documented_error_is_raised_somewhere_in_the_tests():
    assert set(DOCUMENTED) == {*FROM_BROKEN_RUNS, *FROM_THE_SCRIPT, *ELSEWHERE}


@pytest.mark.parametrize("name", FROM_BROKEN_RUNS)
def test_a_broken_run_says_what_the_page_says(name, broken):
    runs, root = broken
    assert in_general(runs[name]["error"], root) == in_general(DOCUMENTED[name])


def test_a_run_that_diverges_leaves_the_last_good_adapter_and_nothing_half_written(broken):
    runs, _ = broken
    assert runs["adapter"]["adapters"] == {"epoch_1": 1, "last": 1}
    assert runs["loss"]["adapters"] == runs["predictions"]["adapters"] == {}
    assert not [half for run in runs.values() for half in run["halves"]]


def test_a_run_that_cannot_go_on_leaves_its_curves_too(broken):
    assert all("curves.png" in broken[0][name]["files"] for name in ("loss", "adapter", "memory"))


@pytest.mark.parametrize("name", FROM_THE_SCRIPT)
def test_the_official_script_ends_with_what_the_page_says_of_a_config(name, tmp_path):
    lines, has_header = FROM_THE_SCRIPT[name]
    config = tmp_path / "headless.yaml"
    header = "# @package _global_\n" if has_header else ""
    config.write_text(f"{header}defaults: [/sam3_lora/minimal, /sam3_lora/tiny, _self_]\n{lines}\n")
    data = {} if name == "variable" else {"DATASET_ROOT": str(tmp_path)}
    result = python("-m", "sam3.train.train", "-c", config, "--use-cluster", "0", **data)
    assert result.returncode != 0
    assert in_general(result.stderr.strip().splitlines()[-1], tmp_path) == in_general(DOCUMENTED[name])


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_weights_and_biases_is_missed_before_anything_is_written(tmp_path):
    write_coco(tmp_path / "data" / "train", DEMO_CONCEPTS, 2, 1)
    settings = TrainSettings(
        data=tmp_path / "data",
        output=tmp_path / "run",
        base="tiny",
        config={"training.wandb": "my_project"},
    )
    with pytest.raises(ConfigError) as caught:
        train(settings)
    assert str(caught.value) == DOCUMENTED["wandb"]
    assert not (tmp_path / "run").exists()


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_the_full_size_model_out_of_memory_says_what_the_page_says(tmp_path):
    error = broken_runs(tmp_path, "full-size")["full-size"]["error"]
    assert in_general(error) == in_general(DOCUMENTED["full-size"])


@pytest.mark.slow
def test_a_slow_loader_is_warned_of_once_with_the_numbers(tmp_path):
    (warning,) = broken_runs(tmp_path, "loader")["loader"]["warnings"]
    assert in_general(warning) == in_general(DOCUMENTED["loader"])
