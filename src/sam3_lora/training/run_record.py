"""What the first process of a run records: numbers and pictures for the recorders, tables and curves in its folder."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from PIL import Image

from sam3_lora.errors import Sam3LoraError
from sam3_lora.training.curves import write_curves, write_tables
from sam3_lora.training.history import read_history
from sam3_lora.training.recorders import Recorders, TensorBoardRecorder, WandbRecorder, WandbSettings
from sam3_lora.visualization import GROUND_TRUTH, choose_images, comparison_sheet, rows_from_results

_PICTURES = 4  # of the validation images, always the same
_SECONDS_BETWEEN_TABLES = 60.0
_GB = 1e9


class RunRecord:
    """Takes the events of a run as they happen.

    Args:
        trainer: The official one, set up and with its checkpoint loaded.
        first_step: That the run goes on from.
        csv: Whether to write tables.
        wandb: As ``training.wandb``.
    """

    def __init__(self, trainer: Any, first_step: int, csv: bool, wandb: WandbSettings) -> None:
        self._run_folder = Path(trainer.logging_conf.log_dir).parent
        self._valid = OmegaConf.select(OmegaConf.create(trainer.data_conf), "val.dataset")
        self._csv = csv
        self._step = first_step
        self._next_tables = time.monotonic() + _SECONDS_BETWEEN_TABLES
        self._recorders = Recorders()
        if (board := trainer.logger.tb_logger) is not None and board.writer is not None:
            self._recorders.add(TensorBoardRecorder(board.writer))
        if wandb:
            self._recorders.add(WandbRecorder(wandb, self._run_folder, _shown_config(self._run_folder)))

    def step(self, number: int, values: Mapping[str, Any]) -> None:
        """Take a step of the optimizer: its number since the start of the run, and its progress event."""
        self._step = number
        memory = str(values["memory_of"])
        numbers = {"Train/loss": values["loss"]}
        numbers |= {f"Train/{name}": value for name, value in values["terms"].items()}
        numbers |= {f"LearningRate/group {i}": rate for i, rate in enumerate(values["rates"], 1)}
        numbers[f"Memory/{memory} in use (GB)"] = values["memory_bytes"] / _GB
        numbers[f"Memory/{memory} at the peak (GB)"] = values["peak_bytes"] / _GB
        for key, name in (("seconds", "step (s)"), ("waited", "of it waiting for images (s)")):
            if key in values:
                numbers[f"Time/{name}"] = values[key]
        self._recorders.numbers(numbers, number)
        if self._csv and time.monotonic() >= self._next_tables:
            self._write(tables_only=True)

    def validated(self, epoch: int) -> None:
        """Take the results of the validation after an epoch from where the run has put them."""
        metrics = read_history(self._run_folder).metrics.get(epoch, {})
        self._recorders.numbers({f"Validation/{name}": value for name, value in metrics.items()}, self._step)
        try:
            if (sheet := self._sheet(epoch)) is not None:
                self._recorders.picture("Validation/predictions", sheet, self._step)
        except (OSError, ValueError, KeyError) as error:
            logging.warning(f"No pictures of this validation: {error}")
        self._write()

    def close(self) -> None:
        """Write what is left, however the run ended."""
        self._write()
        self._recorders.close()

    def _sheet(self, epoch: int) -> Image.Image | None:
        """Return the same few validation images each time, with their objects and what was found."""
        dumps = [
            self._run_folder / "dumps" / kind / f"coco_predictions_{kind}.json" for kind in ("segm", "bbox")
        ]
        dump = next((file for file in dumps if file.is_file()), None)
        if dump is None or self._valid is None or "ann_file" not in self._valid:
            return None
        annotations = Path(self._valid.ann_file)
        chosen = choose_images(json.loads(annotations.read_text(encoding="utf-8")), _PICTURES)
        column = f"after epoch {epoch}"
        results = {column: json.loads(dump.read_text(encoding="utf-8"))}
        rows = rows_from_results(annotations, Path(self._valid.img_folder), results, chosen)
        return comparison_sheet(rows, (GROUND_TRUTH, column)) if rows else None

    def _write(self, tables_only: bool = False) -> None:
        began = time.monotonic()
        try:
            if self._csv:
                write_tables(self._run_folder)
            if not tables_only:
                write_curves(self._run_folder)
        except (OSError, Sam3LoraError) as error:  # a full disk must not end what can still be trained
            logging.warning(f"Curves and tables were not written: {error}")
        took = time.monotonic() - began
        self._next_tables = began + max(_SECONDS_BETWEEN_TABLES, 100 * took)


def _shown_config(run_folder: Path) -> dict[str, Any]:
    """Return the parts of the config that are usually changed."""
    path = run_folder / "config_resolved.yaml"
    config: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
    return {name: config[name] for name in ("base", "adapter", "training", "memory") if name in config}
