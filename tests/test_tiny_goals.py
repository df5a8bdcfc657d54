"""The shipped weights of the tiny SAM3 reach the goals in ``scripts/check_tiny.py``."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from sam3_lora.base.tiny import load_tiny_sam3

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(scope="module")
def check_tiny():
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("check_tiny")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def measured(check_tiny):
    torch.set_num_threads(1)
    return check_tiny.measure(load_tiny_sam3())


@pytest.mark.parametrize("key", ["bbox_AP", "bbox_AP50", "segm_AP", "segm_AP50"])
@pytest.mark.parametrize("name", ["plain", "varied"])
def test_the_tiny_base_finds_what_it_was_pretrained_on(check_tiny, measured, name, key):
    assert measured.sets[name][key] >= check_tiny.GOALS[name][key]


def test_the_tiny_base_is_silent_on_words_that_it_has_never_seen(check_tiny, measured):
    assert measured.false_fire <= check_tiny.MAX_FALSE_FIRE


def test_no_missed_goal_is_reported(measured):
    assert measured.missed() == []
