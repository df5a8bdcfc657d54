"""The official Trainer with adapter folders, exact seeding and a progress file added."""

from __future__ import annotations

import logging
import os
import pickle
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate

from sam3_lora.adapter import adapted_modules, count_parameters, save_adapter
from sam3_lora.adapter_plan import ddp_reason, unused_parameters
from sam3_lora.base.cpu import enable_cpu_training, provide_triton
from sam3_lora.errors import CheckpointError, ConfigError, DataError, Sam3LoraError, as_report
from sam3_lora.training.accumulation import AccumulatedLoss
from sam3_lora.training.asked import given_prompts, most_prompts, prompts_and_images, verify_training_data
from sam3_lora.training.effective import ineffective_in_file, unknown_keywords
from sam3_lora.training.fingerprint import Fingerprint, differences, fingerprint_of_run
from sam3_lora.training.in_force import in_force
from sam3_lora.training.lock import take_lock
from sam3_lora.training.masks_check import check_masks
from sam3_lora.training.memory_check import MemoryCheck, memory_check
from sam3_lora.training.monitor import METRICS as METRICS
from sam3_lora.training.monitored import MonitoredTrainer
from sam3_lora.training.precision import resolved_amp
from sam3_lora.training.progress import append_event

provide_triton()

from sam3.train.trainer import Trainer, unwrap_ddp_if_wrapped  # noqa: E402

# Parts of the official trainer's config that decide the result.
_COMPARED_ON_RESUME = (
    "model",
    "data",
    "loss",
    "max_epochs",
    "val_epoch_freq",
    "gradient_accumulation_steps",
    "ema_decay",
    "early_stopping_patience",
)


class LoraTrainer(MonitoredTrainer):
    """The official Trainer for a model with LoRA injected. Configs name it as ``trainer._target_``.

    Added to the official one:

    - ``adapters/epoch_N`` and ``adapters/last`` after every epoch, ``adapters/best`` when ``best_metric`` rises, in
      PEFT's format; the checkpoints hold the trainable parameters and the optimizer, not the base.
    - Every epoch starts from a random state derived from (seed, epoch, rank), which the official checkpoint lacks:
      a run that is killed and started again ends with the same bytes. One that is started again with other data or
      settings is refused.
    - It saves between steps, and stops there when a signal asks; it records what it does, and says why it cannot go on:
      :class:`ObservedTrainer`, whose keywords it takes.
    - It keeps the best adapter, may average the weights and may stop early: :class:`MonitoredTrainer`, likewise.
    - With gradient accumulation :class:`AccumulatedLoss` divides by the counts of the whole batch.
    - ``accelerator: auto`` and ``amp.enabled: auto`` choose by whether there is CUDA; without it the CPU works, and
      ``amp.enabled: true`` is bfloat16 autocast there too. ``amp.amp_dtype: auto`` is float16 with loss scaling where the
      GPU has no bfloat16.
    - ``logs/progress.jsonl`` for programs that watch the run.
    - ``logs/run.lock`` keeps a second process out of the run folder.

    Args:
        adapter_dir: Where the adapter folders go.
        adapter_freq: Keep ``epoch_N`` of every so many epochs; 0 keeps none of them.
        save_checkpoints: Whether to write ``checkpoint.pt``, without which a run cannot go on; adapters are written anyway.
        prepare: A Hydra target to call before anything is read, such as one that makes the dataset.
        composed: The file in which the official script has left the whole config, where there is one: a name in it that
            has no effect is refused.
        official: The keywords of :class:`sam3.train.trainer.Trainer` and of the classes above.
    """

    def __init__(
        self,
        *,
        adapter_dir: str,
        adapter_freq: int = 1,
        save_checkpoints: bool = True,
        prepare: Mapping[str, Any] | None = None,
        composed: str | None = None,
        accelerator: str = "auto",
        seed_value: int = 0,
        optim: Mapping[str, Any] | None = None,
        **official: Any,
    ) -> None:
        enable_cpu_training()
        self._logs = Path(official["logging"]["log_dir"])
        # Not among the errors reported: the progress file belongs to the run that goes on.
        self._lock = take_lock(self._logs) if os.environ.get("RANK", "0") == "0" else None
        if accelerator == "auto":
            accelerator = "cuda" if torch.cuda.is_available() else "cpu"
        self._adapter_dir = Path(adapter_dir)
        self._adapter_freq = adapter_freq
        self._find_unused: Any = (official.get("distributed") or {}).get("find_unused_parameters", False)
        self._seed = seed_value
        with _own_errors_reported(self._logs):
            optim = resolved_amp(optim)
            self._settings = {
                "seed": seed_value,
                "optim": optim,
                **{name: official.get(name) for name in _COMPARED_ON_RESUME},
            }
            if problems := [
                *unknown_keywords(official, LoraTrainer.__mro__[: LoraTrainer.__mro__.index(Trainer) + 1]),
                *ineffective_in_file(composed),
            ]:
                raise ConfigError(as_report(problems))
            if prepare is not None:
                instantiate(prepare)
            super().__init__(
                accelerator=accelerator,
                seed_value=seed_value,
                optim=optim,
                skip_saving_ckpts=not save_checkpoints,
                **official,
            )

    def run(self) -> None:
        with _own_errors_reported(self._logs):
            super().run()

    def train_epoch(self, train_loader: Any) -> dict[str, Any]:
        if len(train_loader) == 0:
            raise DataError(
                f"not one full batch in the training data: {len(self.train_dataset.dataset)} images, and the trainer "
                f"takes {train_loader.batch_size} a step on each of {torch.distributed.get_world_size()} processes; "
                "lower batch_size or gradient_accumulation_steps, or add images"
            )
        seed = (self._seed * 100_003 + int(self.epoch) * 1_009 + self.distributed_rank) % 2**31
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        result: dict[str, Any] = super().train_epoch(train_loader)
        return result

    def save_checkpoint(self, epoch: float, checkpoint_names: list[str] | None = None) -> None:
        if checkpoint_names is None:
            names = ["last"]
            if self._adapter_freq and int(epoch) % self._adapter_freq == 0:
                names.append(f"epoch_{int(epoch)}")
            # Before the checkpoint: a run that is killed in between repeats the epoch and writes the same again.
            self._save_adapters(names)
        super().save_checkpoint(epoch, checkpoint_names)

    def _save_checkpoint(self, checkpoint: Mapping[str, Any], checkpoint_path: str) -> None:
        # The official one removes the old file before it renames the new one: a kill in between loses both.
        temporary = f"{checkpoint_path}.tmp"
        with open(temporary, "wb") as file:
            extra = {**self._checkpoint_extra, **self._monitor_state(), "run": self._fingerprint}
            torch.save({**checkpoint, **extra}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, checkpoint_path)

    def _load_resuming_checkpoint(self, ckpt_path: str) -> None:
        try:
            saved = torch.load(ckpt_path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise CheckpointError(
                f"{ckpt_path} is damaged; copy a whole one there, or delete it to train from the start "
                f"({str(error).partition('. ')[0] or 'it ends too early'})"
            ) from error
        if changed := differences(saved.get("run", {}), self._fingerprint):
            raise ConfigError(
                f"{ckpt_path} is of another run; undo the changes, or train into a new folder: {as_report(changed)}"
            )
        super()._load_resuming_checkpoint(ckpt_path)
        self._load_monitor_state(saved)
        self._go_on_between_steps(saved)

    def _item_seed(self) -> int:
        return self._seed

    def _save_last_adapter(self, done: int) -> None:
        self._save_adapters(["last"], steps_of_epoch=done)

    def _save_adapters(
        self,
        names: list[str],
        metrics: Mapping[str, float] | None = None,
        thresholds: Mapping[str, float] | None = None,
        **about: Any,
    ) -> None:
        self._refuse_bad_adapter()
        if self.distributed_rank != 0:
            return
        training = {"epoch": int(self.epoch) + 1, "epochs": self.max_epochs, **about, **self._about_run}
        training |= {"metrics": dict(metrics)} if metrics else {}
        with self._averaged():
            for name in names:
                save_adapter(
                    unwrap_ddp_if_wrapped(self.model),
                    self._adapter_dir / name,
                    prompts=self._prompts,
                    training=training,
                    thresholds=thresholds,
                )

    def _setup_components(self) -> None:
        # Once, since it reads the annotations and asks for the size of every image.
        self._fingerprint: Fingerprint = fingerprint_of_run(
            {**self._settings, "processes": torch.distributed.get_world_size()}
        )
        on_cuda = self.device.type == "cuda" and self.mode != "val"
        self._memory_check: MemoryCheck | None = memory_check(self.model_conf) if on_cuda else None
        self._prompts, images = prompts_and_images(self.data_conf)
        check_masks(self.data_conf)
        self._about_run: dict[str, Any] = {
            "images": images,
            "seed": self._seed,
            "best_metric": self.best_metric,
            **({} if self.ema_decay is None else {"ema_decay": self.ema_decay}),
        }
        if names := given_prompts(self.data_conf):
            self._about_run["prompt_of"] = names
        super()._setup_components()
        self._decide_unused()
        if self.distributed_rank == 0:  # from here on: before come hundreds of lines that print the model
            log = logging.FileHandler(self._logs / "train.log")
            log.setFormatter(logging.Formatter("%(levelname)s %(asctime)s: %(message)s"))
            logging.root.addHandler(log)
        trainable = {name for name, p in self.model.named_parameters() if p.requires_grad}
        # The official way to keep the base out of checkpoints; the builder loads it again at every start.
        self.checkpoint_conf.skip_saving_parameters = [
            n for n in self.model.state_dict() if n not in trainable
        ]
        self.checkpoint_conf.initialize_after_preemption = True

    def _setup_ddp_distributed_training(self, distributed_conf: Any, accelerator: str) -> None:
        distributed_conf.find_unused_parameters = self._find_unused
        super()._setup_ddp_distributed_training(distributed_conf, accelerator)

    def _decide_unused(self) -> None:
        """Decide whether DistributedDataParallel looks for parameters that a step leaves unused, and say why."""
        unused = unused_parameters(self.model)
        if self._find_unused == "auto":
            self._find_unused, reason = bool(unused), ddp_reason(unused)
        elif isinstance(self._find_unused, bool):
            reason = "as asked"
        else:
            raise ConfigError(
                f"training.find_unused_parameters must be auto, true or false, got {self._find_unused!r}"
            )
        self.exchange = f"find_unused_parameters {str(self._find_unused).lower()}: {reason}"

    def _setup_dataloaders(self) -> None:
        super()._setup_dataloaders()
        verify_training_data(self, self._report)
        settings = (
            {}
            if self.train_dataset is None
            else in_force(self, self._about_run["images"], most_prompts(self, len(self._prompts)))
        )
        for name, line in settings.items():
            logging.info(f"{name}: {line}")
        count = count_parameters(self.model)
        self._report(
            "start",
            epochs=self.max_epochs,
            adapted_modules=len(adapted_modules(self.model)),
            trainable_parameters=count.trainable,
            total_parameters=count.total,
            settings=settings,
        )

    def _run_step(
        self, batch: Any, phase: str, loss_mts: Any, extra_loss_mts: Any, raise_on_error: bool = True
    ) -> None:
        passes = batch if isinstance(batch, list) else [batch]
        key = next(iter(passes[0]))
        if isinstance(loss := self._find_loss(key), AccumulatedLoss):
            loss.expect([passed[key].find_targets[0] for passed in passes], self.device)
        super()._run_step(batch, phase, loss_mts, extra_loss_mts, raise_on_error)
        if self._memory_check is not None:  # now, since the official trainer resets the peak after each step
            self._memory_check.measured(torch.cuda.max_memory_allocated())

    def _step(self, batch: Any, model: Any, phase: str) -> Any:
        # The official autocast is for CUDA alone.
        if self._memory_check is not None and phase == "train":
            self._memory_check.see(next(iter(batch.values())))
        amp = self.optim_conf.amp if self.optim_conf else None
        on_cpu = self.device.type == "cpu" and amp is not None and amp.enabled
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on_cpu):
            return super()._step(batch, model, phase)

    def _report(self, kind: str, **values: Any) -> None:
        if self.distributed_rank == 0:
            append_event(self._logs, kind, **values)


@contextmanager
def _own_errors_reported(logs: Path) -> Iterator[None]:
    """Put the text of an error of this library into the progress file: Hydra and DDP wrap it beyond recognition."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, Sam3LoraError):
            cause = cause.__cause__
        if cause is not None:
            logs.mkdir(parents=True, exist_ok=True)
            append_event(logs, "error", message=str(cause))
        raise
