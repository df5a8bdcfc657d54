"""The benchmarks run; what they measure is for their pages in docs/reference, not for tests."""

import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.slow
def test_the_ratios_of_a_block_are_printed_and_written(benchmark, tmp_path, capsys):
    benchmark("ratios").main(["--parts", "vit-block", "--pairs", "1", "--output", str(tmp_path / "a.json")])
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(rows)
    for row in rows:
        assert row["time"] == row["lowest"] == row["highest"] == row["seconds"][0] / row["seconds"][1] > 0
        assert (row["saved"] is None) == ("inference" in row["part"])
    attention = next(row for row in rows if "attention" in row["of"] and row["to"] == "full fine-tuning")
    assert attention["saved"] == attention["saved_bytes"][0] / attention["saved_bytes"][1] < 0.8


def test_a_number_of_pairs_below_one_is_refused(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark("ratios").main(["--pairs", "0"])
    assert "--pairs must be 1 or more, got 0" in capsys.readouterr().err


@pytest.fixture(scope="module")
def on_a_cpu(tmp_path_factory):
    """What gpu.py writes on a CPU, with the tiny model."""
    file = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(BENCHMARKS / "gpu.py"),
        "--device",
        "cpu",
        "--size",
        "tiny",
    ]
    options = ["--presets", "minimal", "--prompts", "1", "--steps", "1", "--output", str(file)]
    run = subprocess.run(command + options, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(file.read_text()), run.stdout


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu_too(on_a_cpu):
    result, printed = on_a_cpu
    assert {"device", "device_bytes", "versions", "size", "cases", "drift"} == result.keys()
    assert result["device"] == "CPU"
    assert [case["levers"] for case in result["cases"]] == ["as shipped", "all off"]
    for case in result["cases"]:
        assert (case["preset"], case["prompts"], case["outcome"]) == ("minimal", 1, "measured")
        assert case["seconds"] > 0
        assert case["peak_bytes"] is None
        assert f"| minimal | {case['levers']} | 1 | 5 | 1 |" in printed


@pytest.mark.slow
def test_bfloat16_moves_the_outputs_a_little_and_no_frozen_weight(on_a_cpu):
    drift = on_a_cpu[0]["drift"]
    autocast, with_frozen_weights = drift["outputs"].values()
    assert all(0 < distance < 0.1 for distance in autocast.values())
    assert with_frozen_weights == pytest.approx(autocast, abs=0.1)
    assert 0 < drift["bf16_tensors"] < drift["frozen_tensors"]
    assert drift["frozen_tensors_changed"] == []


def test_a_case_that_runs_out_of_memory_is_recorded_as_such(benchmark):
    attempt = benchmark("gpu_step").attempt
    assert attempt(lambda: torch.empty(2**50)).outcome == "out of memory"
    with pytest.raises(RuntimeError, match="size of tensor"):
        attempt(lambda: torch.empty(2) + torch.empty(3))


def test_cases_are_not_begun_after_the_time_is_over(benchmark):
    gpu = benchmark("gpu")
    costs = gpu.measure(gpu.cases(), "tiny", torch.device("cpu"), steps=1, deadline=0.0)
    assert {cost.outcome for cost in costs.values()} == {"not run: no time left"}


def test_the_models_are_each_built_once(benchmark):
    built = [(case.preset, case.levers) for case in benchmark("gpu").cases()]
    assert len(list(itertools.groupby(built))) == len(set(built))


def test_the_gpu_benchmark_has_an_estimate_of_the_cases_to_compare_with(benchmark):
    gpu = benchmark("gpu")
    minimal, balanced = (gpu.estimated_peak(gpu.Case(preset), "full") for preset in ("minimal", "balanced"))
    assert 1.5e9 < minimal < balanced < 5e9
    assert gpu.estimated_peak(gpu.Case("balanced"), "tiny") is None


@pytest.mark.slow
def test_an_index_costs_a_loader_a_tenth_of_the_official_annotations():
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "data.py"), "--images", "3000"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    ratios = [
        float(line.rpartition(" ")[2].replace(",", ""))
        for line in lines
        if line.startswith("official / index")
    ]
    assert len(ratios) == 3
    assert min(ratios) >= 10
