"""Hydra plug-in: the official ``python -m sam3.train.train -c NAME`` finds our configs and the user's own files."""

from __future__ import annotations

import sys
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class Sam3LoraSearchPath(SearchPathPlugin):
    """Append our configs, the working directory and the file system, in this order; the first match wins.

    Acts in the official training script only: every Hydra program in the environment loads every plug-in.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        primary = next((entry.path for entry in search_path.get_path() if entry.provider == "main"), None)
        if primary != "pkg://sam3.train":
            return
        from sam3_lora.training.config_errors import explain_config_errors  # in no other program of Hydra's

        explain_config_errors(sys.argv)
        search_path.append(provider="sam3-lora", path="pkg://sam3_lora.configs")
        search_path.append(provider="sam3-lora-cwd", path=f"file://{Path.cwd()}")
        # Hydra strips the leading slash of -c /abs/run.yaml and looks for the rest here.
        search_path.append(provider="sam3-lora-absolute", path="file:///")
