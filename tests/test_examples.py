"""The examples that need no more than some seconds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_two_adapters_act_differently_switch_and_combine(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "two_adapters.py")]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=120, check=True
    )
    assert "adapters: decoder_only everywhere active: decoder_only" in done.stdout
    scores = dict(re.findall(r"^(.+): 'red circle' with a score of ([\d.]+)$", done.stdout, re.MULTILINE))
    assert list(scores) == [
        "base",
        "decoder_only",
        "everywhere",
        "everywhere, half in the vision encoder",
        "mixed",
    ]
    assert len(set(scores.values())) == len(scores)
    assert float(scores["base"]) > 0.9
    assert done.stdout.endswith("adapters after unload: none\n")
    assert not list(tmp_path.iterdir())
