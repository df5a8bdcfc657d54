"""What a run records and warns of, in parts that need no run."""

import csv
import json
import math

import pytest
import torch
from PIL import Image
from torch import nn

from sam3_lora.estimation.advice import cheapest
from sam3_lora.estimation.estimate import estimate
from sam3_lora.training.curves import write_curves, write_tables
from sam3_lora.training.divergence import Place, Settings, first_bad_tensor, loss_diverged
from sam3_lora.training.history import Step, mean_losses, thinned
from sam3_lora.training.loading_time import Loading, LoadingTime, slow_loading
from sam3_lora.training.memory_check import BatchSize
from sam3_lora.training.memory_use import is_memory_error, memory_shortage
from sam3_lora.training.progress import append_event
from sam3_lora.training.recorders import Recorders
from sam3_lora.training.wandb_settings import wandb_problems
from sam3_lora.visualization.curves import Chart, Line, draw_charts

CPU = torch.device("cpu")
FULL = {"base": "facebook/sam3", "preset": "balanced", "memory": {}}


def events(folder, steps, loss=lambda step: 1.0, **values):
    """Write the progress file of a run of two steps an epoch."""
    (folder / "logs").mkdir(exist_ok=True)
    append_event(folder / "logs", "start", epochs=2)
    for number in steps:
        place = {"epoch": (number + 1) // 2, "step": (number - 1) % 2 + 1, "steps": 2}
        append_event(folder / "logs", "step", **place, loss=loss(number), rates=[0.1 / number], **values)


class TestCurves:
    def test_a_line_goes_through_its_points_and_stops_at_what_is_no_number(self):
        red = (255, 0, 0)
        line = Line("loss", red, [(0, 0.0), (1, 1.0), (2, math.nan), (3, 1.0), (4, 1.0)], weight=4)
        picture = draw_charts([Chart("Loss", [line], top=1.0)], 4, "epoch")
        assert picture.size == (900, 300)
        x, top = [78 + round(k * (900 - 78 - 24) / 4) for k in range(5)], 44
        middle = (x[0] + x[1]) // 2, (top + 300 - 46) // 2
        assert picture.getpixel(middle) == pytest.approx(red, abs=20)  # smoothed
        assert picture.getpixel(((x[3] + x[4]) // 2, top)) == pytest.approx(red, abs=20)
        between = picture.crop((x[1] + 10, top, x[3] - 10, 250))
        assert all(g > 200 for _, (_, g, _) in between.getcolors(1_000_000))  # nothing but the grid

    def test_a_run_that_was_interrupted_in_its_first_epoch_has_curves(self, tmp_path):
        events(tmp_path, [1])
        with Image.open(write_curves(tmp_path)) as picture:
            assert picture.size == (900, 600)  # loss and learning rate
        assert {file.name for file in tmp_path.iterdir()} == {"logs", "curves.png"}  # no half

    def test_a_loss_that_is_no_number_and_one_that_is_huge_can_be_drawn(self, tmp_path):
        events(tmp_path, [1, 2, 3], loss=lambda step: [1.0, math.inf, 1e30][step - 1])
        write_curves(tmp_path)

    def test_means_leave_out_what_is_no_number_and_blocks_keep_the_last_place(self):
        steps = [
            Step(1, number, 6, loss) for number, loss in enumerate([1.0, 3.0, math.nan, 5.0, 7.0, 9.0], 1)
        ]
        assert mean_losses(steps) == {1: 5.0}
        assert [(step.step, step.loss) for step in thinned(steps, most=3)][:1] == [(2, 2.0)]
        assert thinned(steps, most=6) == steps


def test_a_step_that_was_made_again_has_one_row_and_new_terms_get_a_column(tmp_path):
    events(tmp_path, [1, 2], terms={"loss_bbox": 0.5})
    events(tmp_path, [2, 3], terms={"loss_bbox": 0.25, "loss_mask": 2.0}, loss=lambda step: 10.0 * step)
    write_tables(tmp_path)
    rows = list(csv.DictReader((tmp_path / "logs" / "steps.csv").open()))
    assert [(row["epoch"], row["step"], row["loss"]) for row in rows] == [
        ("1", "1", "1.0"),
        ("1", "2", "20.0"),
        ("2", "1", "30.0"),
    ]
    assert [row["loss_mask"] for row in rows] == ["", "2.0", "2.0"]


class TestLoadingTime:
    @pytest.mark.parametrize(
        ("waited", "computed", "slow"), [(0.6, 0.4, True), (0.5, 0.5, False), (0.0, 1.0, False)]
    )
    def test_more_than_half_of_the_time_is_slow(self, waited, computed, slow):
        loading = LoadingTime(steps=3)
        assert [loading.step(waited, computed) for _ in range(2)] == [None, None]
        found = loading.step(waited, computed)
        assert (found is not None) is slow
        if slow:
            assert found == pytest.approx((waited, computed))
            assert loading.step(waited, computed) is None  # once

    def test_one_step_that_waits_long_is_not_enough(self):
        loading = LoadingTime(steps=4)
        assert [loading.step(waited, 1.0) for waited in (0.1, 3.0, 0.1, 0.1)] == [None] * 4

    @pytest.mark.parametrize(
        ("loading", "cores", "said", "unsaid"),
        [
            pytest.param(
                Loading(2, 1, 4, (900, 900), 1008), 16, "num_train_workers=8", "smaller", id="cores left"
            ),
            pytest.param(
                Loading(7, 1, 4, (900, 900), 1008), 8, "local disk", "num_train_workers=8", id="none left"
            ),
            pytest.param(
                Loading(2, 4, 4, (3000, 4000), 1008),
                16,
                "the images are 4000 x 3000, and the model sees 1008 x 1008",
                "-> training.num_train_workers=8",
                id="large files",
            ),
        ],
    )
    def test_the_advice_follows_from_cores_workers_and_sizes(self, loading, cores, said, unsaid):
        text = slow_loading(3.0, 1.0, loading, cores)
        assert "a step takes 4.00 s, of which it computes 1.00 s (25%)" in text
        assert said in text
        assert unsaid not in text


class TestOutOfMemory:
    def test_errors_of_cuda_of_torch_s_cpu_allocator_and_of_python_are_told_from_others(self):
        on_cpu = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
        for error in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(on_cpu), MemoryError()):
            assert is_memory_error(error)
        assert not is_memory_error(RuntimeError("shapes do not match"))

    def test_the_estimate_says_what_dominates_and_changes_that_keep_the_training_come_first(self):
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        text = str(memory_shortage(error, "epoch 1, step 2 of 9", CPU, BatchSize(4, 10, 20), FULL))
        found = estimate("balanced", prompts=10, objects=20, batch=4)
        assert "in epoch 1, step 2 of 9: it asked for 2.15 GB more" in text
        assert f"estimated for it: {found.device_bytes / 1e9:.2f} GB on a GPU" in text
        assert f"most of it: activations {found.breakdown['activations'] / 1e9:.2f} GB, weights" in text
        first, *others = [line for line in text.splitlines() if line[2:3].isdigit()]
        assert first.startswith(
            "  1. training.batch_size=1, and 4 x as many training.gradient_accumulation_steps"
        )
        assert len(others) == 2

    def test_the_cheapest_changes_are_those_of_the_estimate(self):
        advice = estimate("balanced", prompts=10, objects=20, batch=4, memory={"mask_points": None}).advice
        assert [change.same_training for change in cheapest(advice, 3)] == [True, False, False]
        assert cheapest(advice, 3)[1].saves_bytes == max(a.saves_bytes for a in advice if not a.same_training)

    @pytest.mark.parametrize(
        ("model", "reason"),
        [
            ({"base": "tiny", "preset": "balanced"}, "base tiny was not counted"),
            ({**FULL, "overrides": {"r": 4}}, "overrides was not counted"),
        ],
    )
    def test_where_nothing_was_counted_the_numbers_of_the_batch_are_there(self, model, reason):
        text = str(memory_shortage(MemoryError(), "its start", CPU, BatchSize(2, 3, 1), model))
        assert f"no estimate ({reason})" in text
        assert "training.batch_size=1 with training.gradient_accumulation_steps=2" in text


class TestDivergence:
    PLACE = Place(3, 4, 9, ["'a.png' (id 7)"])

    def text(self, model, amp=None):
        settings = Settings([1e-3], 1.0, amp)
        return str(loss_diverged(self.PLACE, {"loss_ce": math.nan}, 5, model, settings, "nothing"))

    def test_a_sound_adapter_points_to_the_images(self):
        text = self.text(nn.Linear(2, 2))
        assert "in epoch 3, step 4 of 9: loss_ce is nan" in text
        assert "'a.png' (id 7)" in text
        assert "-> look at these images" in text

    def test_float16_points_to_bfloat16(self):
        assert "float16 ends at 65504" in self.text(nn.Linear(2, 2), amp="float16")

    def test_large_weights_point_to_the_learning_rate(self):
        model = nn.Linear(2, 2)
        nn.init.constant_(model.weight, -1e6)
        text = self.text(model)
        assert "largest value 1e+06, in weight" in text
        assert "a lower training.lr, such as 1e-04" in text

    def test_the_first_bad_tensor_is_a_trained_one(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        assert first_bad_tensor(model) is None
        for layer in model:
            nn.init.constant_(layer.weight, math.inf)
        model[0].weight.requires_grad_(False)
        assert first_bad_tensor(model) == "1.weight"


def test_a_recorder_that_fails_is_left_out_and_the_others_go_on(caplog):
    class Full:
        def numbers(self, values, step):
            raise OSError("no space left on device")

    class Kept:
        def __init__(self):
            self.seen = []

        def numbers(self, values, step):
            self.seen.append(step)

    recorders, kept = Recorders(), Kept()
    recorders.add(Full())
    recorders.add(kept)
    for step in (1, 2):
        recorders.numbers({"loss": 1.0}, step)
    assert kept.seen == [1, 2]
    assert [record.message for record in caplog.records] == [
        "Full is left out from here on: no space left on device"
    ]


@pytest.mark.parametrize("value", [3, True, [], ""])
def test_wandb_takes_the_name_of_a_project_or_keywords(value):
    assert wandb_problems(value) == [
        f"training.wandb must be the name of a project, or keywords of wandb.init, got {value!r}"
    ]


def test_wandb_offline_keeps_numbers_and_pictures_and_goes_on_with_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from sam3_lora.training.recorders import WandbRecorder

    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "logs").mkdir()
    for step in (1, 2):
        recorder = WandbRecorder("project", tmp_path)
        recorder.numbers({"Train/loss": 0.5}, step)
        recorder.picture("Validation/predictions", Image.new("RGB", (8, 8)), step)
        recorder.close()
    identity = (tmp_path / "logs" / "wandb_id").read_text()
    runs = list((tmp_path / "wandb").glob(f"offline-run-*-{identity}"))
    assert runs
    kept = b"".join(file.read_bytes() for run in runs for file in run.glob("*.wandb"))
    assert b"Train/loss" in kept
    assert [file for run in runs for file in run.rglob("*.png")]


def test_the_progress_file_tells_of_a_warning(tmp_path):
    from sam3_lora.training.progress import ProgressReader

    seen = []
    reader = ProgressReader(tmp_path, seen.append)
    append_event(tmp_path, "start", epochs=1)
    append_event(tmp_path, "warning", message="slow loader")
    append_event(tmp_path, "step", epoch=1, step=1, steps=1, loss=1.0, rates=[0.1], seconds=2.0)
    reader.read()
    assert [(state.warnings, state.rates) for state in seen] == [(("slow loader",), [0.1])]
    assert json.loads((tmp_path / "progress.jsonl").read_text().splitlines()[-1])["seconds"] == 2.0
