import subprocess
import sys

import pytest

from sam3_lora import errors
from sam3_lora.errors import as_report, did_you_mean


@pytest.mark.parametrize(
    "name",
    [
        "ConfigError",
        "TargetError",
        "AdapterError",
        "DataError",
        "CheckpointError",
        "OutputError",
        "DivergenceError",
        "MemoryShortage",
    ],
)
def test_every_error_is_a_documented_sam3_lora_error(name):
    error = getattr(errors, name)
    assert issubclass(error, errors.Sam3LoraError)
    assert error.__doc__


@pytest.mark.parametrize("name", ["ConfigError", "TargetError"])
def test_wrong_arguments_are_value_errors_too(name):
    assert issubclass(getattr(errors, name), ValueError)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("balancd", "; did you mean 'balanced'?", id="one letter short"),
        pytest.param("zzz", "", id="nothing is close"),
    ],
)
def test_did_you_mean_suggests_only_a_close_match(name, expected):
    assert did_you_mean(name, ["minimal", "balanced", "full"]) == expected


def test_a_report_of_one_problem_is_one_line():
    assert as_report(["r is 0"]) == "r is 0"


def test_a_report_of_many_problems_counts_them_and_lists_each():
    assert as_report(["r is 0", "alpha is nan"]) == "2 problems:\n  r is 0\n  alpha is nan"


def test_a_long_report_says_how_many_it_left_out():
    lines = as_report([f"problem {i}" for i in range(35)], limit=3).splitlines()
    assert lines == ["35 problems:", "  problem 0", "  problem 1", "  problem 2", "  and 32 more"]


@pytest.mark.parametrize("module", ["errors", "components", "presets", "plan", "model_card"])
def test_names_and_numbers_load_without_torch(module):
    heavy = {"torch", "peft", "numpy", "sam3"}
    code = f"import sys, sam3_lora.{module}; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
