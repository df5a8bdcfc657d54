"""The demo, and the defaults of ``train`` on concepts that nobody tuned them for: minutes each, ``make test-slow``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sam3_lora.data.shapes import Concept, write_coco
from sam3_lora.errors import OutputError
from sam3_lora.output import MARKER_FILE, claim_output
from sam3_lora.training.launch import train
from sam3_lora.training.lock import LOCK_FILE, take_lock
from sam3_lora.training.settings import TrainSettings
from sam3_lora.training.trainer import METRICS


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a demo that the command line made, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "sam3_lora", "demo", "--json"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder / "runs" / "demo", json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.timeout(1200)
class TestDemo:
    def test_the_base_finds_nothing_and_the_adapter_finds_it(self, demo):
        metrics = demo[1]
        assert set(metrics["base"]) == set(metrics["adapter"]) == {*METRICS, "cgF1"}
        assert metrics["base"]["bbox_AP50"] <= 0.1
        assert metrics["base"]["segm_AP50"] <= 0.1
        assert metrics["adapter"]["bbox_AP50"] >= 0.70
        assert metrics["adapter"]["segm_AP50"] >= 0.65

    def test_the_adapter_is_small(self, demo):
        metrics = demo[1]
        assert metrics["trainable_parameters"] / metrics["total_parameters"] < 0.03
        assert metrics["adapter_bytes"] < 1_000_000

    def test_the_reloaded_adapter_gives_the_trainer_s_own_numbers(self, demo):
        best = json.loads((demo[0] / "logs" / "best_metrics.json").read_text())
        measured = {name: demo[1]["adapter"][name] for name in METRICS}  # the trainer has no cgF1
        assert measured == pytest.approx({name: best[name] for name in METRICS}, abs=5e-4)

    def test_it_takes_less_than_five_minutes_of_cpu_time(self, demo):
        assert 10 < demo[1]["cpu_seconds"] < 300

    def test_it_leaves_a_report_with_the_same_metrics(self, demo):
        text = (demo[0] / "report.html").read_text(encoding="utf-8")
        assert f"{demo[1]['adapter']['segm_AP50']:.3f}</strong>" in text
        assert text.count("<img ") == 27

    def test_it_leaves_metrics_and_a_picture(self, demo):
        assert json.loads((demo[0] / "metrics.json").read_text()) == demo[1]
        with Image.open(demo[0] / "before_after.png") as sheet:
            assert sheet.width > 1000


def test_the_demo_leaves_a_folder_alone_that_it_did_not_make(tmp_path):
    from sam3_lora.demo import run_demo

    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"is not empty \(it holds thesis.txt\)"):
        run_demo(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
    assert not (tmp_path / MARKER_FILE).exists()


def test_the_demo_does_not_replace_one_that_still_runs(tmp_path):
    from sam3_lora.demo import run_demo

    claim_output(tmp_path, made_by="demo")
    with take_lock(tmp_path / "logs"), pytest.raises(OutputError, match=f"\\(process {os.getpid()}\\); wait"):
        run_demo(tmp_path)
    assert (tmp_path / "logs" / LOCK_FILE).exists()


OTHER_CONCEPTS = {
    "plain": (Concept("yellow", "diamond"), Concept("pink", "arrow"), Concept("white", "cross")),
    "turned": (Concept("cyan", "hexagon"), Concept("purple", "diamond"), Concept("orange", "crescent")),
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", OTHER_CONCEPTS)
def test_train_reaches_its_goal_on_other_unseen_concepts_without_options(name, tmp_path):
    for split, seed in (("train", 31), ("valid", 32)):
        write_coco(tmp_path / "data" / split, OTHER_CONCEPTS[name], 60, seed)
    result = train(TrainSettings(data=tmp_path / "data", output=Path(tmp_path / "run"), base="tiny"))
    assert result.metrics["bbox_AP50"] >= 0.60
    assert result.metrics["segm_AP50"] >= 0.55
