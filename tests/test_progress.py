"""The progress file of a run: written by the trainer, read while it goes on and after it has ended."""

import json

import pytest

from sam3_lora.training.history import read_history
from sam3_lora.training.launch import _result
from sam3_lora.training.progress import PROGRESS_FILE, ProgressReader, append_event

START = {"epochs": 2, "trainable_parameters": 10, "total_parameters": 100}


def step(number):
    return {"epoch": 1, "step": number, "steps": 2, "loss": 0.5}


@pytest.fixture
def logs(tmp_path):
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


def test_a_line_that_a_kill_cut_short_does_not_take_the_next_one_with_it(logs):
    append_event(logs, "step", **step(1))
    with (logs / PROGRESS_FILE).open("a") as file:
        file.write('{"event": "step", "epo')
    reader = ProgressReader(logs, None)
    append_event(logs, "start", **START)
    append_event(logs, "step", **step(2))
    reader.read()
    assert reader.start == START
    history = read_history(logs.parent)
    assert history.start == START
    assert [s.step for s in history.steps] == [1, 2]


def test_a_run_that_failed_once_and_went_on_has_a_history(logs):
    append_event(logs, "start", **START)
    append_event(logs, "error", message="no room left")
    append_event(logs, "step", **step(1))
    append_event(logs, "metrics", epoch=1, bbox_AP=0.25)
    history = read_history(logs.parent)
    assert [s.step for s in history.steps] == [1]
    assert history.metrics == {1: {"bbox_AP": 0.25}}


def test_a_reader_reports_only_what_came_after_it_and_the_last_error(logs):
    append_event(logs, "error", message="of an earlier start")
    seen = []
    reader = ProgressReader(logs, seen.append)
    append_event(logs, "start", **START)
    append_event(logs, "step", **step(1))
    append_event(logs, "metrics", epoch=1, bbox_AP=0.25)
    reader.read()
    assert [(p.step, p.epochs, dict(p.metrics)) for p in seen] == [(1, 2, {}), (1, 2, {"bbox_AP": 0.25})]
    assert reader.error == ""
    append_event(logs, "error", message="no room left")
    reader.read()
    assert reader.error == "no room left"


def test_a_line_that_is_still_being_written_is_read_when_it_is_whole(logs):
    reader = ProgressReader(logs, None)
    text = json.dumps({"event": "start", **START})
    (logs / PROGRESS_FILE).write_text(text[:20])
    reader.read()
    assert reader.start == {}
    (logs / PROGRESS_FILE).write_text(text + "\n")
    reader.read()
    assert reader.start == START


def test_the_questions_to_the_base_are_shown_and_are_no_metrics(tmp_path, capsys):
    seen = []
    reader = ProgressReader(tmp_path, seen.append)
    append_event(tmp_path, "verifying", done=20, images=60)
    append_event(tmp_path, "start", epochs=1)
    append_event(tmp_path, "step", epoch=1, step=1, steps=2, loss=0.5)
    reader.read()
    assert "20/60 images: asking the base" in capsys.readouterr().err
    assert [progress.metrics for progress in seen] == [{}]


def test_a_run_that_stopped_early_without_a_best_adapter_gives_the_last_one(logs):
    reader = ProgressReader(logs, None)
    append_event(logs, "start", **START)
    append_event(logs, "stopped_early", epoch=3, best_epoch=1, best_metric="segm_AP")
    (logs.parent / "config_resolved.yaml").write_text("base: {name: tiny}")
    reader.read()
    result = _result(logs.parent, reader)
    assert (result.stopped_early, result.metrics) == (3, {})
    assert result.adapter == logs.parent / "adapters" / "last"
