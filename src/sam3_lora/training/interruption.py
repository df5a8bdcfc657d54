"""The official Trainer, able to save and go on in the middle of an epoch, and to stop there when a signal asks."""

from __future__ import annotations

import builtins
import logging
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from sam3_lora.base.cpu import provide_triton
from sam3_lora.errors import ConfigError
from sam3_lora.training.resumable_data import make_resumable, random_state, set_random_state
from sam3_lora.training.signals import (
    STOP_SIGNALS,
    SteadyWorker,
    StopRequests,
    stop_signals_held,
    stop_signals_to,
)

provide_triton()

import sam3.train.trainer as official  # noqa: E402
from sam3.train.trainer import Trainer  # noqa: E402
from sam3.train.utils.train_utils import AverageMeter  # noqa: E402

#: Key of a checkpoint that was written in the middle of an epoch: its place in it and the state of each process.
MIDDLE = "middle_of_epoch"

_METER = ("val", "avg", "sum", "count")


class InterruptibleTrainer(Trainer):
    """The official Trainer with checkpoints between steps.

    - Every ``save_every_steps`` steps of the optimizer, and when SIGINT, SIGTERM, SIGUSR1 or SIGUSR2 has come, it
      writes ``checkpoint.pt`` after the step that is going on. It goes on from there with the same bytes.
    - After a signal it then hands the signal to the handler that was there before, which under Slurm is submitit's and
      asks for the job to be queued again; where there was none it exits with 128 + the number of the signal.
    - With several processes they agree after each step, so that all leave at the same one.

    Args:
        save_every_steps: ``None`` saves after each epoch only.
        keywords: Those of :class:`sam3.train.trainer.Trainer`.
    """

    def __init__(self, *, save_every_steps: int | None = None, **keywords: Any) -> None:
        if save_every_steps is not None and (
            isinstance(save_every_steps, bool)
            or not isinstance(save_every_steps, int)
            or save_every_steps < 1
        ):
            raise ConfigError(
                f"training.save_every_steps must be 1 or more, or null for the ends of epochs, got {save_every_steps!r}"
            )
        self._save_every_steps = save_every_steps
        self._requests = StopRequests()
        self._handlers_before: Mapping[int, Any] | None = None  # None: no handlers of ours are in place
        self._resumed: dict[str, Any] | None = None
        self._restored: dict[str, Any] | None = None
        self._validated_epoch: int | None = None
        self._checkpoint_extra: dict[str, Any] = {}
        self._losses: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        super().__init__(**keywords)

    def run(self) -> None:
        with stop_signals_to(self._requests.note) as self._handlers_before:
            super().run()

    def train_epoch(self, train_loader: Any) -> dict[str, Any]:
        resumed, self._resumed = self._resumed, None
        first = resumed["steps"] if resumed else 0
        if resumed and self._order is not None:
            self._order.skip = first * train_loader.batch_size
        self._restored = resumed["processes"][self.distributed_rank] if resumed else None
        discard = 0 if self._order is not None else first
        steps = _Steps(train_loader, self._after_train_step, first, discard, self._restored)
        with _numbered_from(steps):
            result: dict[str, Any] = super().train_epoch(steps)
        return result

    def save_checkpoint(self, epoch: float, checkpoint_names: list[str] | None = None) -> None:
        super().save_checkpoint(epoch, checkpoint_names)
        if checkpoint_names is None:  # the end of an epoch, whose last step, or only one, no other follows
            self._obey(self._agreed_signals())

    def val_epoch(self, val_loader: Any, phase: str) -> dict[str, Any]:
        # What was trained is saved before a validation, which is made again when the run goes on.
        steps = _Steps(val_loader, lambda done: self._obey(self._agreed_signals()))
        result: dict[str, Any] = super().val_epoch(steps, phase)
        return result

    def is_intermediate_val_epoch(self, epoch: int) -> bool:
        # The official trainer validates the epoch before again when it resumes: needless in the middle of the next.
        return epoch != self._validated_epoch and bool(super().is_intermediate_val_epoch(epoch))

    def _setup_dataloaders(self) -> None:
        super()._setup_dataloaders()
        ours = hasattr(self.train_dataset, "dataset") and hasattr(self.train_dataset, "sampler")
        self._order = make_resumable(self.train_dataset, self._item_seed()) if ours else None

    def _run_step(
        self, batch: Any, phase: str, loss_mts: Any, extra_loss_mts: Any, raise_on_error: bool = True
    ) -> None:
        if self._restored is not None:
            for meters, saved in zip((loss_mts, extra_loss_mts), self._restored["losses"], strict=True):
                for name, values in saved.items():
                    vars(meters.setdefault(name, AverageMeter(name, self.device, ":.2e"))).update(values)
            self._restored = None
        self._losses = loss_mts, extra_loss_mts
        super()._run_step(batch, phase, loss_mts, extra_loss_mts, raise_on_error)

    def _after_train_step(self, done: int) -> None:
        signals = self._agreed_signals()
        step = self.steps["train"] // self.gradient_accumulation_steps
        if signals or (self._save_every_steps and step % self._save_every_steps == 0):
            self._save_between_steps(done)
        self._obey(signals, done)

    def _save_between_steps(self, done: int) -> None:
        random_before = random_state()
        state = {
            "random": random_before,
            "losses": [
                {name: {key: getattr(meter, key) for key in _METER} for name, meter in meters.items()}
                for meters in self._losses
            ],
        }
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, state)
        self._save_last_adapter(done)
        self._checkpoint_extra = {MIDDLE: {"steps": done, "processes": states}}
        try:
            self.save_checkpoint(self.epoch, ["checkpoint"])
        finally:
            self._checkpoint_extra = {}
        set_random_state(random_before)  # whatever saving drew

    def _go_on_between_steps(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on where a checkpoint was written, after the official trainer has loaded the rest of it."""
        self._resumed = checkpoint.get(MIDDLE)
        if self._resumed is not None:
            self._validated_epoch = self.epoch - 1
            logging.info(f"Going on after step {self._resumed['steps']} of epoch {self.epoch + 1}")

    def _agreed_signals(self) -> list[int]:
        """Return the stop signals that any of the processes has got, the same in each of them."""
        if self._handlers_before is None:
            return []
        flags = self._requests.flags()
        if dist.get_world_size() > 1:
            shared = torch.tensor(flags, device=self.device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            flags = shared.tolist()
        return [number for number, flag in zip(STOP_SIGNALS, flags, strict=True) if flag]

    def _obey(self, signals: list[int], done: int | None = None) -> None:
        if not signals:
            return
        self._requests.clear()
        dist.barrier()  # nobody leaves before the checkpoint is there
        for number in signals:
            if handler := (self._handlers_before or {}).get(number):
                handler(number, None)
            else:
                name = signal.Signals(number).name
                saved = not self.skip_saving_ckpts
                logging.info(
                    f"Stopping for {name}{'; started again, the run goes on from here' if saved else ''}"
                )
                self._report("stopped", signal=name, epoch=int(self.epoch) + 1, step=done, saved=saved)
                raise SystemExit(128 + number)

    def _item_seed(self) -> int:
        """Return the seed of the augmentation; a subclass knows it."""
        return 0

    def _save_last_adapter(self, done: int) -> None:
        """Save the adapter too, after so many steps of the epoch; a subclass knows how."""

    def _report(self, kind: str, **values: Any) -> None:
        """Tell whoever watches the run; a subclass knows how."""


class _Steps:
    """A loader with a call between two of its batches: when the official loop asks for the next one, a step is over."""

    def __init__(
        self,
        loader: Any,
        between: Callable[[int], None],
        first: int = 0,
        discard: int = 0,
        restored: Mapping[str, Any] | None = None,
    ) -> None:
        self._loader = loader
        self._between = between
        self._discard = discard
        self._restored = restored
        self.first = first

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        if hasattr(self._loader, "worker_init_fn"):
            self._loader.worker_init_fn = SteadyWorker(self._loader.worker_init_fn)
        with stop_signals_held():
            batches = iter(self._loader)
        for _ in range(self._discard):
            next(batches)
        if self._restored is not None:  # after iter(), which draws the workers' seed
            set_random_state(self._restored["random"])
        for done, batch in enumerate(batches, self.first + 1):
            yield batch
            if done < len(self):
                self._between(done)


@contextmanager
def _numbered_from(steps: _Steps) -> Iterator[None]:
    """Let the official loop count the batches of ``steps`` from its first one.

    The loop gets its number from ``enumerate``, and from that the place in the schedule (sam3 0.1.4, train_epoch).
    """
    official.enumerate = lambda things: builtins.enumerate(things, steps.first if things is steps else 0)
    try:
        yield
    finally:
        del official.enumerate
