"""``train`` and ``resume`` end with a report, and never lose an adapter over it."""

import json
import re
import warnings
from pathlib import Path

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam3_lora import finetune, report
from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.shapes import DEMO_CONCEPTS, write_coco
from sam3_lora.report import ReportError, read_history, report_of_run
from sam3_lora.training import launch
from sam3_lora.training.launch import TrainResult
from sam3_lora.training.settings import TrainSettings

RESULT = TrainResult(Path("run"), Path("run/adapters/best"), "tiny", {}, 1, 2)
SETTINGS = TrainSettings(data=Path("data"), output=Path("run"), base="tiny")


@pytest.fixture
def trained(monkeypatch):
    """Stand in for the training itself."""
    monkeypatch.setattr(launch, "train", lambda settings, on_progress: RESULT)
    monkeypatch.setattr(launch, "resume", lambda output, expected, on_progress: RESULT)


@pytest.mark.parametrize(
    "finish",
    [
        pytest.param(lambda: finetune.train(SETTINGS), id="train"),
        pytest.param(lambda: finetune.resume(Path("run")), id="resume"),
    ],
)
class TestAtTheEnd:
    def test_the_result_names_the_report(self, trained, monkeypatch, finish):
        monkeypatch.setattr(report, "report_of_run", lambda folder, on_progress: folder / "report.html")
        assert finish().report == Path("run/report.html")

    @pytest.mark.parametrize("error", [ReportError("no predictions"), RuntimeError("CUDA out of memory")])
    def test_a_report_that_fails_is_a_warning(self, trained, monkeypatch, finish, error):
        def fail(folder, on_progress):
            raise error

        monkeypatch.setattr(report, "report_of_run", fail)
        with pytest.warns(UserWarning, match=f"the adapter is complete, but there is no report: {error}"):
            assert finish() == RESULT


def test_no_report_is_made_when_none_is_wanted(trained, monkeypatch):
    monkeypatch.setattr(report, "report_of_run", lambda folder, on_progress: pytest.fail("a report was made"))
    assert finetune.train(TrainSettings(**{**vars(SETTINGS), "report": False})) == RESULT
    assert finetune.resume(Path("run"), report=False) == RESULT


@pytest.fixture(scope="module")
def reported():
    """What ``on_report`` was called with in ``run``."""
    return []


@pytest.fixture(scope="module")
def run(tmp_path_factory, reported):
    folder = tmp_path_factory.mktemp("finetune")
    for split, seed in (("train", 1), ("valid", 2)):
        write_coco(folder / "data" / split, DEMO_CONCEPTS, 6, seed)
    settings = TrainSettings(data=folder / "data", output=folder / "run", base="tiny", max_epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the adapter is complete")
        return finetune.train(settings, on_report=lambda *counts: reported.append(counts))


def test_the_report_says_how_many_images_the_base_has_seen(run, reported):
    assert reported == [(6, 6)]


def test_the_report_holds_the_run_s_own_numbers(run):
    text = run.report.read_text(encoding="utf-8")
    row = re.search(r'title="segm_AP50".*?</tr>', text)[0]
    assert f">{run.metrics['segm_AP50']:.3f}</span>" in row
    assert "<dt>Adapted modules</dt><dd>68</dd>" in text
    assert "<dd>133,120 of 5,038,310 (2.64%)</dd>" in text
    assert "<dd>552 kB</dd>" in text
    assert text.count("<img ") == 2 * 3 * 3
    history = read_history(run.output)
    assert f"in the validation after epoch {history.best_epoch}" in text
    assert len(history.steps) == 2
    assert set(history.metrics) == {1, 2}


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_the_predictions_in_the_report_are_those_of_the_best_adapter(run, iou_type):
    truth = COCO(str(run.output.parent / "data" / "valid" / ANNOTATION_FILE))
    results = json.loads((run.output / "dumps" / "best" / f"coco_predictions_{iou_type}.json").read_text())
    evaluation = COCOeval(truth, truth.loadRes(results), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    best = run.metrics[f"{iou_type}_AP"], run.metrics[f"{iou_type}_AP50"]
    assert evaluation.stats[:2] == pytest.approx(best)


def test_a_run_without_a_best_adapter_has_no_report(run, monkeypatch):
    best = run.output / "dumps" / "best"
    best.rename(best.with_name("gone"))
    with pytest.raises(ReportError, match="has no best adapter with its predictions"):
        report_of_run(run.output)
    best.with_name("gone").rename(best)
