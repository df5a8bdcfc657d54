"""The command line: instant help, clear errors, exit codes, one JSON document, readable progress."""

import json
import os
import re
import resource
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from sam3_lora.cli import main
from sam3_lora.cli.progress import describe, fraction_done
from sam3_lora.components import COMPONENT_MAP_VERSION, COMPONENTS
from sam3_lora.errors import DataError
from sam3_lora.presets import PRESETS
from sam3_lora.training.progress import Progress

VERBS = ["train", "predict", "evaluate", "demo", "presets", "components", "plan", "estimate", "doctor"]
TRAIN = ["train", "--data", "my data", "--output", "runs/a"]


def in_new_process(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


HELP_THEN_MODULES = """
import sys
from sam3_lora.cli import main
code = main(sys.argv[1:])
print()
print(code, *sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize("verb", [[], *([verb] for verb in VERBS)], ids=["no verb", *VERBS])
def test_help_imports_nothing_heavy(verb):
    output = in_new_process(HELP_THEN_MODULES, *verb, "--help")
    code, *modules = output.splitlines()[-1].split()
    assert code == "0"
    assert output.startswith("usage: sam3-lora")
    assert not {"torch", "numpy", "PIL", "rich", "peft", "sam3", "omegaconf", "yaml"} & set(modules)


def test_help_takes_less_than_300_milliseconds():
    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        in_new_process(HELP_THEN_MODULES, "train", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.3


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "sam3_lora", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("sam3-lora ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param(["trian"], "unknown command 'trian'; did you mean 'train'?", id="verb"),
        pytest.param(["xyz"], "unknown command 'xyz'", id="verb like no other"),
        pytest.param(["data", "chek", "d"], "unknown command 'chek'; did you mean 'check'?", id="verb of a group"),
        pytest.param(["data"], "the following arguments are required: COMMAND", id="no verb of a group"),
        pytest.param([], "the following arguments are required: COMMAND", id="no verb"),
        pytest.param(["train", "--data", "d"], "the following arguments are required: --output", id="no output"),
        pytest.param(["train", "--resume", "r", "--output", "o"], "--output cannot go with --resume", id="resume elsewhere"),
        pytest.param([*TRAIN, "--preset", "balnced"], "unknown preset 'balnced'; did you mean 'balanced'?", id="preset"),
        pytest.param([*TRAIN, "--preset", "xyz"], "unknown preset 'xyz'; known are minimal, balanced, full, light, vision, text, detr, segmentation_head, tracker_safe", id="preset like no other"),
        pytest.param([*TRAIN, "--max-epoch", "3"], "unknown option '--max-epoch'; did you mean '--max-epochs'?", id="option"),
        pytest.param([*TRAIN, "--max-epoch=3"], "unknown option '--max-epoch'; did you mean '--max-epochs'?", id="option with ="),
        pytest.param([*TRAIN, "more"], "unexpected argument 'more'", id="stray word"),
        pytest.param([*TRAIN, "--max-epochs", "0"], "--max-epochs: needs a whole number of 1 or more, got '0'", id="no epochs"),
        pytest.param([*TRAIN, "--batch-size", "two"], "--batch-size: needs a whole number of 1 or more, got 'two'", id="no number"),
        pytest.param([*TRAIN, "--seed", "-1"], "--seed: needs a whole number of 0 or more, got '-1'", id="negative seed"),
        pytest.param([*TRAIN, "--lr", "5"], "--lr: needs a number between 0 and 1, such as 1e-4, got '5'", id="large rate"),
        pytest.param([*TRAIN, "--lr", "nan"], "--lr: needs a number between 0 and 1, such as 1e-4, got 'nan'", id="NaN rate"),
        pytest.param([*TRAIN, "--set", "r"], "--set: needs key=value, such as r=16, got 'r'", id="setting without value"),
        pytest.param([*TRAIN, "--set", "preset=full"], "--set: preset is an option of its own: --preset full", id="option as a setting"),
        pytest.param(["plan", "--set", "model=x"], "--set: model is no setting of an adapter", id="keyword that is no setting"),
        pytest.param(["plan", "--preset", "lite"], "unknown preset 'lite'; did you mean 'light'?", id="preset of a plan"),
        pytest.param(["predict", "a.png", "--promt", "x"], "unknown option '--promt'; did you mean '--prompt'?", id="misspelt required option"),
        pytest.param([*TRAIN, "nonsense"], "unexpected argument 'nonsense'", id="word that is no key=value"),
        pytest.param(["demo", "training.lr=1"], "unexpected argument 'training.lr=1'", id="key of a verb without any"),
        pytest.param(["demo", "--nonsense"], "unknown option '--nonsense'\n", id="no close option"),
        pytest.param(["demo", "--sed", "1"], "unknown option '--sed'; did you mean '--seed'?", id="option of another verb"),
    ],
)  # fmt: skip
def test_wrong_usage_ends_with_2_and_the_close_match(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


class Launch:
    """Stands in for the training process, and remembers what it was asked for."""

    def __init__(self, progress=(), report=(), error=None):
        self.progress, self.report, self.error = progress, report, error

    def train(self, settings, on_progress, on_report):
        self.settings = settings
        for state in self.progress:
            on_progress(state)
        for done in self.report:
            on_report(done, 8)
        if self.error is not None:
            raise self.error
        return SimpleNamespace(
            output=Path("runs/my run"),
            adapter=Path("runs/my run/adapters/best"),
            base=self.settings.base,
            metrics={"bbox_AP50": 0.8123, "segm_AP50": 0.7},
            trainable_parameters=4_128_768,
            total_parameters=840_000_000,
            stopped_early=3 if settings.config.get("training.early_stopping_patience") else None,
            job=None,
            report=Path("runs/my run/report.html") if settings.report else None,
        )


@pytest.fixture
def launch(monkeypatch):
    from sam3_lora import finetune as real

    for name, value in {"CI": "", "NO_COLOR": "", "TERM": "xterm"}.items():  # whatever runs the tests
        monkeypatch.setenv(name, value)

    def stand_in(**options):
        fake = Launch(**options)
        monkeypatch.setattr(real, "train", fake.train)
        return fake

    return stand_in


def progress(epoch, step, metrics=None, loss=1.0, settings=None):
    return Progress(
        epoch=epoch, epochs=2, step=step, steps=4, loss=loss, metrics=metrics or {}, settings=settings or {}
    )


def test_train_passes_every_option_on(launch):
    fake = launch()
    options = (
        "--preset full --base tiny --max-epochs 3 --batch-size 2 --lr 1e-3 --seed 7 --num-gpus 2 --overwrite"
    )
    settings = ["--set", "r=16", "--set", "use_dora=True", "--set", "training.scheduler=cosine"]
    assert main([*TRAIN, *options.split(), *settings]) == 0
    got = fake.settings
    assert (got.data, got.output) == (Path("my data"), Path("runs/a"))
    assert (got.preset, got.base, got.max_epochs, got.batch_size) == ("full", "tiny", 3, 2)
    assert (got.lr, got.seed, got.num_gpus, got.overwrite) == (1e-3, 7, 2, True)
    assert got.overrides == {"r": 16, "use_dora": True}
    assert got.config == {"training.scheduler": "cosine"}


def test_train_takes_any_key_of_the_config_behind_or_between_its_options(launch):
    fake = launch()
    words = [
        "training.lr_scale=0.5",
        *TRAIN[1:],
        "schedule=constant",
        "--seed",
        "7",
        "+trainer.adapter_freq=2",
    ]
    assert main(["train", *words, "--set", "training.weight_decay=0.1"]) == 0
    assert (fake.settings.seed, fake.settings.overrides) == (7, {})
    assert fake.settings.config == {
        "training.lr_scale": 0.5,
        "schedule": "constant",
        "+trainer.adapter_freq": 2,
        "training.weight_decay": 0.1,
    }


def test_a_key_that_is_set_twice_to_two_values_is_an_error(launch, capsys):
    launch()
    assert main([*TRAIN, "training.weight_decay=0.2", "--set", "training.weight_decay=0.1"]) == 1
    assert "training.weight_decay is set twice, to 0.2 and with --set to 0.1" in capsys.readouterr().err


def test_train_without_options_takes_the_official_base_and_the_balanced_preset(launch):
    fake = launch()
    assert main(TRAIN) == 0
    got = fake.settings
    assert (got.preset, got.base, got.seed, got.num_gpus, got.overwrite) == (
        "balanced",
        "facebook/sam3",
        None,
        1,
        False,
    )
    assert (got.max_epochs, got.batch_size, got.lr) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16", 16),
        ("1e-4", 1e-4),
        ("true", True),
        ("False", False),
        ("None", None),
        ('["attention","mlp"]', ["attention", "mlp"]),
        ("gaussian", "gaussian"),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_set_reads_json_and_python_words_and_leaves_the_rest_as_text(text, value, launch):
    fake = launch()
    main([*TRAIN, "--set", f"key={text}"])
    assert fake.settings.overrides == {"key": value}


def test_train_ends_with_a_table_and_what_to_do_next(launch, capsys):
    launch()
    main([*TRAIN, "--base", "tiny"])
    output = capsys.readouterr().out
    assert "bbox AP50" in output
    assert "0.812" in output
    assert "Trained  4,128,768 of 840,000,000 parameters (0.49%)" in output
    assert "Report   runs/my run/report.html" in output
    assert "Curves   tensorboard --logdir 'runs/my run/tensorboard'" in output
    assert "sam3_lora.load_adapter(sam3_lora.load_base('tiny'), 'runs/my run/adapters/best')" in output


def test_no_report_is_printed_where_none_is_made(launch, capsys):
    fake = launch()
    assert main([*TRAIN, "--no-report"]) == 0
    assert fake.settings.report is False
    assert "Report" not in capsys.readouterr().out


def test_json_is_all_that_goes_to_standard_output(launch, capsys):
    launch(progress=[progress(1, 1)])
    assert main([*TRAIN, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "output": "runs/my run",
        "adapter": "runs/my run/adapters/best",
        "metrics": {"bbox_AP50": 0.8123, "segm_AP50": 0.7},
        "trainable_parameters": 4_128_768,
        "total_parameters": 840_000_000,
        "stopped_early": None,
        "job": None,
        "report": "runs/my run/report.html",
    }
    assert "epoch 1/2  step 1/4  loss 1" in captured.err


def test_a_run_that_stopped_early_says_so_at_its_end(launch, capsys):
    launch()
    assert main([*TRAIN, "training.early_stopping_patience=2"]) == 0
    assert (
        "Stopped early  after epoch 3: no rise of the best metric for long enough" in capsys.readouterr().out
    )


def test_progress_outside_a_terminal_is_a_line_per_validation(launch, capsys):
    quiet = [progress(1, step) for step in (1, 2, 3, 4)]
    launch(progress=[*quiet, progress(1, 4, {"bbox_AP50": 0.5, "segm_AP50": 0.25}, loss=0.123456)])
    main(TRAIN)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "epoch 1/2  step 1/4  loss 1"  # nothing is known of the time yet
    assert second.startswith("epoch 1/2  step 4/4  loss 0.1235  bbox AP50 0.500  segm AP50 0.250  ")
    assert second.endswith(" s left")


def test_what_is_in_force_is_said_once_before_the_first_step(launch, capsys):
    settings = {"Precision": "float32 on cpu", "Batch": "4 images an optimizer step"}
    launch(
        progress=[progress(1, 1, settings=settings), progress(1, 2, {"bbox_AP50": 1.0}, settings=settings)]
    )
    main(TRAIN)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["Precision: float32 on cpu", "Batch: 4 images an optimizer step"]
    assert len(lines) == 4


def test_the_report_at_the_end_shows_progress_too(launch, capsys):
    launch(progress=[progress(2, 4)], report=(4, 8))
    main(TRAIN)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == [f"{done}/8 images with the base, for the report" for done in (4, 8)]


def test_in_a_terminal_the_report_has_a_bar_below_that_of_the_training(launch, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    launch(progress=[progress(2, 4)], report=(4, 8))
    assert main(TRAIN) == 0
    training, report = [line for line in capsys.readouterr().err.splitlines() if "100%" in line][-2:]
    assert "epoch 2/2  step 4/4" in training
    assert "8/8 images with the base, for the report" in report


@pytest.mark.parametrize("name", ["NO_COLOR", "CI"])
def test_a_terminal_that_wants_plain_text_gets_lines(launch, capsys, monkeypatch, name):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv(name, "1")
    launch(progress=[progress(2, 4)])
    assert main(TRAIN) == 0
    assert capsys.readouterr().err == "epoch 2/2  step 4/4  loss 1\n"


def test_rate_and_memory_are_shown_in_a_log_and_below_the_bar_of_a_terminal(launch, capsys, monkeypatch):
    state = replace(
        progress(2, 4),
        rates=[1e-4, 2e-4],
        memory_of="GPU memory",
        memory_bytes=3 * 10**9,
        peak_bytes=5 * 10**9,
    )
    launch(progress=[state])
    main(TRAIN)
    details = "lr 0.0002  GPU memory 3.0 GB, peak 5.0"
    assert capsys.readouterr().err == f"epoch 2/2  step 4/4  loss 1  {details}\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    main(TRAIN)
    assert details in capsys.readouterr().err


def test_a_warning_is_printed_once(launch, capsys):
    launch(progress=[replace(progress(1, step), warnings=("slow loader",)) for step in (1, 2)])
    main(TRAIN)
    assert capsys.readouterr().err.splitlines().count("warning: slow loader") == 1


def test_the_time_that_is_left_counts_from_where_a_run_went_on(launch, capsys, monkeypatch):
    clock = iter([100.0, 160.0])
    monkeypatch.setattr("sam3_lora.cli.progress.time.monotonic", lambda: next(clock))
    launch(progress=[progress(2, 1), progress(2, 2)])  # an eighth of the run in a minute
    main(TRAIN)
    assert capsys.readouterr().err.splitlines()[-1] == "epoch 2/2  step 2/4  loss 1  2 min 00 s left"


def test_progress_without_a_loss_leaves_it_out():
    assert describe(progress(2, 1, loss=None)) == "epoch 2/2  step 1/4"


@pytest.mark.parametrize(("epoch", "step", "done"), [(1, 1, 0.125), (1, 4, 0.5), (2, 4, 1.0)])
def test_progress_counts_the_steps_of_all_epochs(epoch, step, done):
    assert fraction_done(progress(epoch, step)) == done


def test_an_error_is_one_message_and_1(launch, capsys):
    launch(error=DataError("my data does not exist; give another"))
    assert main(TRAIN) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: my data does not exist; give another\n")


def test_warnings_of_torch_and_sam3_are_hidden_and_others_are_not(launch, monkeypatch, recwarn):
    fake = launch()

    def train_with_warnings(settings, on_progress, on_report):
        for module in ("sam3.model.video", "torch.jit._script", "my_plugin"):
            warnings.warn_explicit(module, UserWarning, f"{module}.py", 1, module=module)
        return fake.train(settings, on_progress, on_report)

    monkeypatch.setattr(sys, "warnoptions", [])
    monkeypatch.setattr("sam3_lora.finetune.train", train_with_warnings)
    assert main(TRAIN) == 0
    assert [str(warning.message) for warning in recwarn] == ["my_plugin"]


def test_an_interrupt_is_short_and_130(launch, capsys):
    launch(error=KeyboardInterrupt())
    assert main(TRAIN) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_mistake_of_ours_keeps_its_traceback(launch):
    launch(error=ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(TRAIN)


METRICS = {
    "base": {"bbox_AP50": 0.02, "segm_AP50": 0.01, "bbox_AP": 0.01, "segm_AP": 0.005},
    "adapter": {"bbox_AP50": 0.9, "segm_AP50": 0.85, "bbox_AP": 0.7, "segm_AP": 0.6},
    "trainable_parameters": 130_000,
    "total_parameters": 5_000_000,
    "adapter_bytes": 543_210,
    "cpu_seconds": 180.4,
}


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """Stand in for the demo; it leaves some files in the output folder and returns METRICS."""

    def run_demo(output, seed, on_progress):
        (output / "adapters/best").mkdir(parents=True)
        for name in ("metrics.json", "before_after.png", "run.yaml", ".sam3-lora-run.json"):
            (output / name).touch()
        on_progress(progress(1, 1))
        return METRICS

    monkeypatch.setitem(sys.modules, "sam3_lora.demo", SimpleNamespace(run_demo=run_demo))
    monkeypatch.chdir(tmp_path)


def test_demo_compares_base_and_adapter_and_names_the_files_to_look_at(demo, capsys):
    assert main(["demo"]) == 0
    output = capsys.readouterr().out
    assert [word for word in output.split() if word[:2] == "0."] == (
        "0.020 0.900 0.010 0.850 0.010 0.700 0.005 0.600".split()
    )
    assert output.endswith(
        "Trained   130,000 of 5,000,000 parameters (2.60%)\n"
        "Adapter   543 kB\n"
        "CPU time  180 s\n"
        "Look at   runs/demo/before_after.png\n"
        "          runs/demo/metrics.json\n"
        "          runs/demo/adapters/best\n"
    )


def test_demo_json_is_the_metrics_file(demo, capsys):
    assert main(["demo", "--output", "out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == METRICS


def test_presets_are_listed_with_components_rank_and_reason(capsys):
    assert main(["presets"]) == 0
    output = capsys.readouterr().out
    for name, preset in PRESETS.items():
        assert name in output
        assert preset.reason.split()[0] in output
    assert re.search(r"vision_encoder +│ 8 ", output)


def test_presets_as_json(capsys):
    assert main(["presets", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert list(listed) == list(PRESETS)
    assert listed["balanced"]["components"] == dict(PRESETS["balanced"].components)
    assert listed["balanced"]["trainable_parameters"] == 4_128_768
    assert [listed[name]["last_n_vision_blocks"] for name in ("light", "full")] == [4, None]
    assert listed["balanced"]["reason"] == PRESETS["balanced"].reason


def test_a_plan_is_a_table_and_what_follows_from_it(capsys):
    assert (
        main(["plan", "--base", "tiny", "--preset", "minimal", "--set", 'modules_to_save=["pixel_decoder"]'])
        == 0
    )
    output = capsys.readouterr().out
    assert "Adapter on tiny (preset minimal, 1 changed)" in output
    assert re.search(r"detr_decoder +│ attention +│ 36 +│ 8 +│ 16 +│ 36,864 ", output)
    assert re.search(r"Trains +163,392 of 5,068,582 parameters \(3\.22%\), in 42 modules", output)
    assert "Besides   111,168 of these are whole modules or biases" in output
    assert (
        "DDP       find_unused_parameters needed, and set by itself: no step uses segmentation_head" in output
    )
    assert (
        "three levels need only two upsampling steps:\n            segmentation_head.pixel_decoder.conv_layers.2"
        in output
    )


def test_a_plan_as_json(capsys):
    assert main(["plan", "--base", "tiny", "--preset", "minimal", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["trainable_parameters"], plan["modules"], plan["adapter_bytes"]) == (52_224, 42, 220_600)
    assert plan["ddp"] == {
        "find_unused_parameters": False,
        "reason": "every trained tensor takes part in every step",
    }
    assert plan["dead_modules"]["geometry_encoder.points_pool_project"] == "detection has no point prompts"
    assert plan["share"] == plan["trainable_parameters"] / plan["total_parameters"]


def test_a_plan_that_cannot_be_made_is_one_error(capsys):
    assert main(["plan", "--base", "tiny", "--set", "rank=8", "--set", "r=8x"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: 5 problems:\n  unknown override 'rank'; it is r here\n")


def test_components_are_listed_with_kinds_sizes_and_what_is_left_out(capsys):
    assert main(["components"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"vision_encoder +│ mlp +│ 64 +│ 368,640 ", output)
    assert "Left out  PEFT has no LoRA for ConvTranspose2d:" in output


def test_components_as_json(capsys):
    assert main(["components", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert list(listed["components"]) == list(COMPONENTS)
    assert listed["components"]["scoring"]["proj"] == {
        "modules": 2,
        "parameters_at_r_1": 1024,
        "example": "dot_prod_scoring.prompt_proj",
    }
    assert len(listed["dead_modules"]) == 9
    assert listed["component_map_version"] == COMPONENT_MAP_VERSION


def test_a_reader_that_stops_early_is_no_error(tmp_path):
    code = "import sys; from sam3_lora.cli import main; sys.exit(main(['presets', '--json']))"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
