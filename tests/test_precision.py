"""Autocast: asked for, or chosen by the hardware."""

import pytest
import torch

from sam3_lora.errors import ConfigError
from sam3_lora.training.precision import chosen_amp


@pytest.fixture
def gpu(monkeypatch):
    def has(cuda, bfloat16=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)

    return has


@pytest.mark.parametrize(
    ("cuda", "bfloat16", "enabled", "dtype", "chosen"),
    [
        pytest.param(False, False, "auto", "auto", (False, "bfloat16"), id="CPU"),
        pytest.param(False, False, True, "auto", (True, "bfloat16"), id="CPU, asked for"),
        pytest.param(True, True, "auto", "auto", (True, "bfloat16"), id="a GPU with bfloat16"),
        pytest.param(True, False, "auto", "auto", (True, "float16"), id="a GPU without"),
        pytest.param(True, True, True, "float16", (True, "float16"), id="float16 asked for"),
        pytest.param(True, True, False, "auto", (False, "bfloat16"), id="off"),
    ],
)
def test_autocast_is_what_was_asked_for_or_what_the_hardware_has(gpu, cuda, bfloat16, enabled, dtype, chosen):
    gpu(cuda, bfloat16)
    assert chosen_amp(enabled, dtype) == chosen


@pytest.mark.parametrize(
    ("enabled", "dtype", "problem"),
    [
        pytest.param(
            "yes", "auto", r"training\.amp_enabled must be true, false or auto, got 'yes'", id="amp"
        ),
        pytest.param(True, "bf16", "got 'bf16'; did you mean 'bfloat16'", id="dtype"),
        pytest.param(True, "float16", "float16 needs CUDA", id="float16 on the CPU"),
    ],
)
def test_what_cannot_be_is_refused(gpu, enabled, dtype, problem):
    gpu(cuda=False)
    with pytest.raises(ConfigError, match=problem):
        chosen_amp(enabled, dtype)
