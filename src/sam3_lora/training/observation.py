"""The official Trainer, with a record of what it does and a reason when it cannot go on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from sam3_lora.errors import ConfigError, as_report
from sam3_lora.training.divergence import (
    Place,
    Settings,
    adapter_diverged,
    bad_cost,
    bad_terms,
    first_bad_tensor,
    loss_diverged,
    matching_diverged,
)
from sam3_lora.training.interruption import InterruptibleTrainer
from sam3_lora.training.loading_time import Loading, LoadingTime, slow_loading
from sam3_lora.training.memory_check import BatchSize
from sam3_lora.training.memory_use import MemoryUse, is_memory_error, memory_shortage
from sam3_lora.training.recorders import WandbSettings
from sam3_lora.training.run_record import RunRecord
from sam3_lora.training.step_time import StepTime
from sam3_lora.training.wandb_settings import wandb_problems

_TERM = "Losses/train_all_"  # before the name of a term; "all" is the dict_key of the training batches
_TOTAL = "core_loss"


class ObservedTrainer(InterruptibleTrainer):
    """Added to what can be interrupted:

    - An event for each step with its loss, terms, learning rates, memory and times, also for TensorBoard, a CSV and
      Weights & Biases; after each validation pictures of its predictions; ``curves.png`` however the run ends.
    - A loss or adapter that is not finite ends the run before it is saved, with images, term and what to change.
    - So does memory that runs out, with the estimate and what would need less.
    - A warning, once, if most of the time goes into waiting for images.

    Args:
        csv: Write ``logs/steps.csv`` and ``logs/validations.csv``.
        wandb: Name of a project of Weights & Biases, or keywords of ``wandb.init``.
        keywords: Those of :class:`InterruptibleTrainer`.

    Raises:
        ConfigError: If Weights & Biases is asked for and not installed, or a value is of another kind.
    """

    def __init__(self, *, csv: bool = False, wandb: WandbSettings = None, **keywords: Any) -> None:
        problems = wandb_problems(wandb)
        if not isinstance(csv, bool):
            problems.append(f"training.csv must be true or false, got {csv!r}")
        if problems:
            raise ConfigError(as_report(problems))
        self._csv, self._wandb = csv, wandb
        self._record: RunRecord | None = None  # on rank 0, while it runs
        self._doing = "its start"
        self._saved = ""
        self._size: BatchSize | None = None
        self._loading = LoadingTime()
        self._passes: list[dict[str, float]] = []
        self._steps_per_epoch = self._step_of_epoch = self._step_of_start = 0
        super().__init__(**keywords)

    def run(self) -> None:
        self._memory_use, self._times = MemoryUse(self.device), StepTime(self.device)
        if self._resumed is not None:
            self._saved = f"after step {self._resumed['steps']} of epoch {self.epoch + 1}"
        elif self.epoch > 0:
            self._saved = f"after epoch {self.epoch}"
        if self.distributed_rank == 0 and self.mode != "val":
            first = self.steps["train"] // self.gradient_accumulation_steps
            self._record = RunRecord(self, first, self._csv, self._wandb)
        try:
            with self._memory_explained():
                super().run()
        finally:
            if self._record is not None:
                self._record.close()

    def run_val(self) -> None:
        self._doing = f"the validation after epoch {int(self.epoch) + 1}"
        super().run_val()
        if self._record is not None:
            self._record.validated(int(self.epoch) + 1)

    def train_epoch(self, train_loader: Any) -> dict[str, Any]:
        self._steps_per_epoch = len(train_loader)
        self._step_of_start = 0
        self._times.forget()
        result: dict[str, Any] = super().train_epoch(train_loader)
        return result

    def save_checkpoint(self, epoch: float, checkpoint_names: list[str] | None = None) -> None:
        if checkpoint_names is None:
            self._saved = f"after epoch {int(epoch)}"
        super().save_checkpoint(epoch, checkpoint_names)

    def _save_between_steps(self, done: int) -> None:
        super()._save_between_steps(done)
        self._saved = f"after step {done} of epoch {int(self.epoch) + 1}"

    def _run_step(
        self, batch: Any, phase: str, loss_mts: Any, extra_loss_mts: Any, raise_on_error: bool = True
    ) -> None:
        self._times.batch_is_there()
        self._passes = []
        done = self.steps[phase] // self.gradient_accumulation_steps
        self._step_of_epoch = done % self._steps_per_epoch + 1
        self._doing = str(self._place([]))
        super()._run_step(batch, phase, loss_mts, extra_loss_mts, raise_on_error)
        self._tell_step()
        self._step_of_start += 1

    def _after_train_step(self, done: int) -> None:
        computed = self._times.is_over()
        if computed is not None and (slow := self._loading.step(*computed)):
            self._warn(slow_loading(*slow, self._how_it_loads()))
        super()._after_train_step(done)
        self._times.batch_is_asked_for()

    def _step(self, batch: Any, model: Any, phase: str) -> Any:
        self._size = BatchSize.of(next(iter(batch.values())))
        if phase != "train":
            return super()._step(batch, model, phase)
        try:
            result = super()._step(batch, model, phase)
        except ValueError as error:
            if term := bad_cost(error):
                raise matching_diverged(
                    self._place(self._images()), term, self.model, self._in_force(), self._kept()
                ) from error
            raise
        self._look_at(result)
        return result

    def _look_at(self, result: Any) -> None:
        """Keep the terms of the loss of a pass, or say why the run ends here."""
        losses, _, extra = result
        (loss,) = losses.values()
        terms = {name.removeprefix(_TERM): value for name, value in extra.items()}
        terms = {name: value for name, value in terms.items() if name != _TOTAL} | {"loss": loss}
        values = torch.stack([value.detach().float().reshape(()) for value in terms.values()]).tolist()
        numbers = dict(zip(terms, values, strict=True))
        if bad_terms({"loss": numbers["loss"]}):
            raise loss_diverged(
                self._place(self._images()),
                bad_terms(numbers),
                len(numbers),
                self.model,
                self._in_force(),
                self._kept(),
            )
        self._passes.append(
            {
                name: value
                for name, value in numbers.items()
                if "_aux_" not in name and not name.endswith("_o2m")
            }
        )

    def _refuse_bad_adapter(self) -> None:
        """Do nothing if the trained values are finite; called before they are saved."""
        if name := first_bad_tensor(self.model):
            place = self._place(self._images(before=1))
            raise adapter_diverged(place, name, self.model, self._in_force(), self._kept())

    def _tell_step(self) -> None:
        means = {
            name: sum(terms[name] for terms in self._passes) / len(self._passes) for name in self._passes[0]
        }
        loss = means.pop("loss")
        values = {
            "epoch": int(self.epoch) + 1,
            "step": self._step_of_epoch,
            "steps": self._steps_per_epoch,
            "loss": loss,
            "terms": means,
            "rates": self._rates(),
            **self._memory_use.read(),
            **self._times.read(),
        }
        self._report("step", **values)
        if self._record is not None:
            self._record.step(self.steps["train"] // self.gradient_accumulation_steps, values)

    def _rates(self) -> list[float]:
        """Return the learning rates of this step, which the official loop sets after its backward pass."""
        exact_epoch = self.epoch + float(self._step_of_epoch - 1) / self._steps_per_epoch
        if (where := exact_epoch / self.max_epochs) < 1:
            self.optim.step_schedulers(where, step=int(exact_epoch * self._steps_per_epoch))
        groups = self.optim.optimizer.param_groups
        return [group["lr"] for group in groups if any(p.requires_grad for p in group["params"])]

    def _place(self, images: list[str]) -> Place:
        return Place(int(self.epoch) + 1, self._step_of_epoch, self._steps_per_epoch, images)

    def _images(self, before: int = 0) -> list[str]:
        """Return the names and ids of the images of this pass, or of all passes so many steps before."""
        if self._order is None:
            return ["not known of this dataset"]
        size = int(self.train_dataset.batch_size)
        start = (self._step_of_start - before) * size
        indices = self._order.taken[start : start + size]
        if not before:  # as the official collate function deals them out
            indices = indices[len(self._passes) :: self.gradient_accumulation_steps]
        return [_image(self.train_dataset.dataset, index) for index in indices]

    def _in_force(self) -> Settings:
        clip = OmegaConf.select(OmegaConf.create(self.optim_conf.gradient_clip or {}), "max_norm")
        amp = self.optim_conf.amp
        return Settings(self._rates(), clip, amp.amp_dtype if amp.enabled else None)

    def _kept(self) -> str:
        if not self._saved:
            return "nothing had been saved yet"
        what = "adapters/last stays as it was"
        if not self.skip_saving_ckpts:
            what = "adapters/last and checkpoints/checkpoint.pt stay as they were"
        return f"{what} {self._saved}"

    @contextmanager
    def _memory_explained(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_memory_error(error):
                raise
            raise memory_shortage(error, self._doing, self.device, self._size, self.model_conf) from error

    def _how_it_loads(self) -> Loading:
        sizes = _image_sizes(self.data_conf)
        return Loading(
            workers=int(self.train_dataset.num_workers),
            processes=dist.get_world_size(),
            images_a_step=int(self.train_dataset.batch_size),
            image_hw=(int(median(h for h, _ in sizes)), int(median(w for _, w in sizes))) if sizes else None,
            resolution=self.model_conf.get("resolution"),
        )

    def _warn(self, message: str) -> None:
        logging.warning(message)
        self._report("warning", message=message)


def _image(dataset: Any, index: int) -> str:
    """Return file name and id of an item of an official dataset."""
    inner = getattr(dataset, "_dataset", dataset)  # SeededItems
    try:
        image = inner.coco.loadImagesFromDatapoint(int(inner.ids[index]))[0]
    except AttributeError:  # a dataset of another kind
        return f"item {index}"
    return f"{image['file_name']!r} (id {image['original_img_id']})"


def _image_sizes(data: Any) -> list[tuple[int, int]]:
    """Return height and width of the training images, as their annotation file has them."""
    file = OmegaConf.select(OmegaConf.create(data), "train.dataset.ann_file")
    if file is None:
        return []
    images = json.loads(Path(file).read_text(encoding="utf-8"))["images"]
    return [(image["height"], image["width"]) for image in images]
