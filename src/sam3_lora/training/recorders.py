"""Where the numbers and pictures of a run go besides its progress file: TensorBoard, and Weights & Biases if asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

#: What ``training.wandb`` may be: nothing, the name of a project, or keywords of ``wandb.init``.
WandbSettings = str | Mapping[str, Any] | None


class Recorder(Protocol):
    """Takes what a run measures. ``step`` counts the steps of the optimizer from the start of the run."""

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Take scalars by name; a slash groups them."""

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Take a picture."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoardRecorder:
    """Writes to the event file of the official trainer.

    Args:
        writer: A ``SummaryWriter``.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=step, new_style=True)

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        self._writer.add_image(name, np.asarray(image.convert("RGB")), global_step=step, dataformats="HWC")

    def close(self) -> None:
        self._writer.flush()


class WandbRecorder:
    """Writes a run of Weights & Biases; started again in the same folder, it goes on with the same one.

    Whether it is sent or kept (``WANDB_MODE=offline``) and the account are wandb's own settings.

    Args:
        settings: Name of the project, or keywords of ``wandb.init``.
        run_folder: Where wandb keeps its files, and the name of the run.
        config: What is shown as its configuration.
    """

    def __init__(
        self, settings: str | Mapping[str, Any], run_folder: Path, config: Mapping[str, Any] | None = None
    ) -> None:
        import wandb

        keywords = {"project": settings} if isinstance(settings, str) else dict(settings)
        id_file = run_folder / "logs" / "wandb_id"
        known = id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else None
        self._wandb = wandb
        self._run = wandb.init(
            **{
                "dir": str(run_folder),
                "name": run_folder.name,
                "id": known,
                "resume": "allow",
                "config": dict(config or {}),
                **keywords,
            }
        )
        id_file.write_text(self._run.id, encoding="utf-8")

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


class Recorders:
    """Several of them as one; one that fails is left out from then on, with a warning: the training is worth more."""

    def __init__(self) -> None:
        self._all: list[Recorder] = []

    def add(self, recorder: Recorder) -> None:
        self._all.append(recorder)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._each("numbers", values, step)

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        self._each("picture", name, image, step)

    def close(self) -> None:
        self._each("close")

    def _each(self, method: str, *arguments: Any) -> None:
        for recorder in list(self._all):
            try:
                getattr(recorder, method)(*arguments)
            except Exception as error:  # whatever a service or a full disk makes of it
                logging.warning(f"{type(recorder).__name__} is left out from here on: {error}")
                self._all.remove(recorder)
