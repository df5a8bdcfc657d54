"""Two processes on one machine, whoever starts them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interrupted_runs import outcome

from sam3_lora import load_adapter, load_base
from sam3_lora.adapter_plan import ddp_reason, unused_parameters
from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.shapes import PRETRAINING_CONCEPTS, write_coco
from sam3_lora.errors import ConfigError
from sam3_lora.evaluation.metrics import evaluate_split
from sam3_lora.training.builder import build_sam3_lora_model
from sam3_lora.training.worker import ENVIRONMENT, run_worker

BIN = Path(sys.executable).parent
WORKER = ["-m", "sam3_lora.training.worker", "-c"]
LAUNCHERS = {
    "torchrun": [BIN / "torchrun", "--standalone", "--nproc-per-node=2", *WORKER],
    "accelerate": [
        BIN / "accelerate", "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--main_process_port=0",
        "--mixed_precision=no", "--dynamo_backend=no", *WORKER,
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes") / "data"
    write_coco(folder / "train", PRETRAINING_CONCEPTS[:4], 8, 1)
    write_coco(folder / "valid", PRETRAINING_CONCEPTS[:4], 3, 2)  # of which one process gets two
    return folder


def start(command):
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def said_by(process, code=0):
    said = process.communicate(timeout=300)[0]
    assert (process.returncode == 0) == (code == 0), said[-3000:]
    return said


def train(data, run):
    options = ["--num-gpus", 2, "--base", "tiny", "--preset", "minimal", "--max-epochs", 1, "--batch-size", 2]
    return start(
        [sys.executable, "-m", "sam3_lora", "train", "--no-report", "--data", data, "--output", run, *options]
    )


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Return two runs that went on at the same time, with the same settings."""
    folders = [tmp_path_factory.mktemp("two") / name for name in ("first", "second")]
    for process in [train(data, folder) for folder in folders]:
        said = said_by(process)
    assert "a pass x 1 accumulated x 2 processes" in said
    assert "find_unused_parameters false: every trained tensor takes part in every step" in said
    return folders


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_runs_at_once_do_not_meet(runs):
    assert outcome(runs[0]) == outcome(runs[1])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_other_launchers_end_with_the_same_bytes(runs, launcher, tmp_path):
    process = start(
        [*LAUNCHERS[launcher], runs[0] / "run.yaml", f"paths.experiment_log_dir={tmp_path / 'run'}"]
    )
    said_by(process)
    assert outcome(tmp_path / "run") == outcome(runs[0])
    assert (tmp_path / "run" / "config_resolved.yaml").is_file()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_metrics_of_uneven_shards_are_those_of_all_images(runs, data):
    measured = json.loads((runs[0] / "logs" / "best_metrics.json").read_text())
    model = load_adapter(load_base("tiny", device="cpu"), runs[0] / "adapters" / "best").get_base_model()
    valid = data / "valid"
    result = evaluate_split(model, valid, valid / ANNOTATION_FILE, resolution=112, batch_size=4, device="cpu")
    scores = result.overall.as_dict()
    compared = {name: value for name, value in measured.items() if name in scores}
    assert compared["bbox_AP"] > 0.3
    assert {name: scores[name] for name in compared} == pytest.approx(compared, abs=5e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_another_number_of_processes_does_not_go_on_with_a_run(runs):
    official = [sys.executable, "-m", "sam3.train.train", "-c", runs[1] / "run.yaml", "--use-cluster", "0"]
    said = said_by(start([*official, "--num-gpus", "1"]), code=1)
    assert (
        "is of another run; undo the changes, or train into a new folder: processes was 2, is now 1" in said
    )
    ours = [sys.executable, "-m", "sam3_lora", "train", "--resume", runs[1], "--num-gpus", "1"]
    assert "launcher.gpus_per_node: the run has 2, asked for 1" in said_by(start(ours), code=1)


def test_a_process_without_a_launcher_is_told_how_to_be_started(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ConfigError, match=r"no launcher has set RANK, LOCAL_RANK, .* start this with torchrun"
    ):
        run_worker("sam3_lora/demo")


@pytest.mark.parametrize(
    ("overrides", "masks", "unused"),
    [
        ({}, True, []),
        ({"modules_to_save": ["segmentation_head.pixel_decoder"]}, True, ["segmentation_head"]),
        ({}, False, []),
        (
            {"modules_to_save": ["backbone.vision_backbone.convs.1.conv_1x1"]},
            False,
            ["backbone.vision_backbone.convs.1.conv_1x1"],
        ),
    ],
    ids=["as shipped", "whole head", "boxes only", "neck without masks"],
)
def test_what_a_step_leaves_unused_is_known_before_the_first(overrides, masks, unused):
    torch.manual_seed(0)
    model = build_sam3_lora_model("tiny", "minimal", overrides, enable_segmentation=masks)
    found = unused_parameters(model)
    assert bool(found) == bool(unused)
    assert all(name.startswith(tuple(unused)) for name in found)
    assert ("no step uses" in ddp_reason(found)) == bool(unused)


def test_tables_of_constants_are_not_sent_in_every_step():
    model = build_sam3_lora_model("tiny", "minimal")
    buffers = {name for name, _ in model.named_buffers()}
    assert {name.rpartition(".")[2] for name in buffers} == {"freqs_cis", "attn_mask"}
    assert set(model._ddp_params_and_buffers_to_ignore) == buffers
