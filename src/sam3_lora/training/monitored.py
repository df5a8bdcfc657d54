"""The official Trainer, judged by one metric: it keeps the best adapter, and may average weights and stop early."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from sam3_lora.base.cpu import provide_triton
from sam3_lora.errors import ConfigError, as_report
from sam3_lora.evaluation.thresholds import best_thresholds
from sam3_lora.output import write_json_atomic, write_text_atomic
from sam3_lora.training.asked import given_prompts
from sam3_lora.training.averaging import WeightAverage
from sam3_lora.training.monitor import METRICS, chosen_metric, meters_of, monitor_problems
from sam3_lora.training.observation import ObservedTrainer
from sam3_lora.training.progress import BEST_METRICS_FILE

provide_triton()

from sam3.eval.coco_writer import PredictionDumper  # noqa: E402

#: Beside the dumps of the last validation: those of the validation after which the best adapter was saved.
BEST_DUMPS = "best"


class MonitoredTrainer(ObservedTrainer):
    """The official Trainer with a best adapter.

    - ``adapters/best`` and ``logs/best_metrics.json`` when ``best_metric`` rises, and ``dumps/best``: the predictions of
      that validation, which the next one would overwrite. It records the threshold of each class that was best there.
    - With ``ema_decay`` validations and adapter folders have the moving average of the trained weights; the checkpoint
      holds the weights as they are trained, and the average.
    - With ``early_stopping_patience`` the run ends after so many validations without a rise.

    Args:
        best_metric: ``segm_AP``, ``segm_AP50``, ``bbox_AP`` or ``bbox_AP50``; ``auto`` is ``segm_AP``, or ``bbox_AP`` for a
            model without a segmentation head, which has no meters of masks either; ``None`` keeps no best adapter.
        ema_decay: Between 0 and 1; ``None`` keeps no average.
        early_stopping_patience: 1 or more; ``None`` trains all epochs.
        keywords: Those of :class:`ObservedTrainer` and of the official Trainer.

    Raises:
        ConfigError: With all that is wrong with the three.
    """

    max_epochs: int

    def __init__(
        self,
        *,
        best_metric: str | None = "auto",
        ema_decay: float | None = None,
        early_stopping_patience: int | None = None,
        **keywords: Any,
    ) -> None:
        masks = keywords["model"].get("enable_segmentation", True)
        settings = {
            "training.best_metric": best_metric,
            "training.enable_segmentation": masks,
            "training.ema_decay": ema_decay,
            "training.early_stopping_patience": early_stopping_patience,
        }
        if problems := monitor_problems(settings):
            raise ConfigError(as_report(problems))
        self.best_metric = chosen_metric(best_metric, masks)
        self.ema_decay = ema_decay
        self.early_stopping_patience = early_stopping_patience
        self._average: WeightAverage | None = None
        self._stopped_early = False
        super().__init__(**{**keywords, "meters": meters_of(keywords.get("meters"), masks)})

    def run_val(self) -> None:
        if not self._stopped_early:  # else the last epoch has been validated
            super().run_val()

    def val_epoch(self, val_loader: Any, phase: str) -> dict[str, Any]:
        with self._averaged():
            return super().val_epoch(val_loader, phase)

    def _construct_optimizers(self) -> None:
        super()._construct_optimizers()
        if self.ema_decay is not None:
            self._average = average = WeightAverage(self.model, self.ema_decay)
            # Not called for a step that loss scaling skips.
            self.optim.optimizer.register_step_post_hook(lambda *_: average.update())

    def _monitor_state(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside the official contents, of which the best value so far is a part."""
        return {} if self._average is None else {"average": self._average.state_dict()}

    def _load_monitor_state(self, checkpoint: Mapping[str, Any]) -> None:
        if self._average is not None:
            self._average.load_state_dict(checkpoint["average"])

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self._average is None else self._average.in_use()

    def _log_meters_and_save_best_ckpts(self, phases: list[str]) -> dict[str, Any]:
        outputs: dict[str, Any] = super()._log_meters_and_save_best_ckpts(phases)
        # Only rank 0 holds the merged predictions; the others get an empty meter.
        metrics = {name: float(outputs[key]) for name, key in METRICS.items() if key in outputs}
        if metrics and self.distributed_rank == 0:
            self._report("metrics", epoch=int(self.epoch) + 1, **metrics)
            self._keep_best(metrics)
        if "val" in phases:
            self._stop_if_no_better()
        return outputs

    def _keep_best(self, metrics: Mapping[str, float]) -> None:
        value = metrics.get(self.best_metric or "")
        if value is None or self.mode == "val":
            return
        if value <= self.best_meter_values.get("best", float("-inf")):
            self.best_meter_values["since_best"] = self.best_meter_values.get("since_best", 0) + 1
            return
        # Plain numbers: a numpy scalar would make the checkpoint unreadable for the official resume.
        self.best_meter_values["best"] = value
        self.best_meter_values["since_best"] = 0
        self.best_meter_values["best_epoch"] = int(self.epoch) + 1
        self._save_adapters(["best"], metrics, self._thresholds())
        best = {"epoch": int(self.epoch) + 1, "best_metric": self.best_metric, **metrics}
        write_json_atomic(Path(self.logging_conf.log_dir, BEST_METRICS_FILE), best)
        self._keep_dumps()

    def _stop_if_no_better(self) -> None:
        """End the run after this epoch if its best validation is ``early_stopping_patience`` validations ago."""
        if self.early_stopping_patience is None or self.mode == "val" or self.epoch >= self.max_epochs - 1:
            return
        # Only rank 0 knows the metrics. A resumed run counts on from the checkpoint, which was written before the
        # validation that it makes again.
        waited = torch.tensor(self.best_meter_values.get("since_best", 0), device=self.device)
        torch.distributed.broadcast(waited, 0)
        if int(waited) < self.early_stopping_patience:
            return
        self._stopped_early = True
        self.max_epochs = int(self.epoch) + 1  # ends the official loop as its last epoch does
        best_epoch = self.best_meter_values.get("best_epoch")
        logging.info(
            f"Stopping early after epoch {self.max_epochs}: {self.best_metric} has not risen in the "
            f"{self.early_stopping_patience} validations since epoch {best_epoch}"
        )
        self._report(
            "stopped_early", epoch=self.max_epochs, best_epoch=best_epoch, best_metric=self.best_metric
        )

    def _keep_dumps(self) -> None:
        for dump in self._dumps().values():
            kept = dump.parents[1] / BEST_DUMPS / dump.name
            kept.parent.mkdir(exist_ok=True)
            write_text_atomic(kept, dump.read_text(encoding="utf-8"))

    def _dumps(self) -> dict[str, Path]:
        """Return the files with the predictions of this validation, by what they are of: ``bbox`` and ``segm``."""
        return {
            meter.iou_type: Path(meter.dump_dir, f"coco_predictions_{meter.iou_type}.json")
            for meter in self.meters["val"]["valid"].values()
            if isinstance(meter, PredictionDumper) and meter.merge_predictions
        }

    def _thresholds(self) -> dict[str, float]:
        """Return the best score threshold of each prompt, by the predictions of this validation."""
        dumps, truth = self._dumps(), self.data_conf.val.dataset.get("ann_file")
        if not dumps or truth is None:
            return {}
        dump = dumps["segm"] if "segm" in dumps else dumps["bbox"]
        predictions = json.loads(dump.read_text(encoding="utf-8"))
        asked = given_prompts(self.data_conf)
        best = best_thresholds(Path(truth), predictions)
        return {asked.get(name, name): found.threshold for name, found in best.items()}

    def _save_adapters(
        self,
        names: list[str],
        metrics: Mapping[str, float] | None = None,
        thresholds: Mapping[str, float] | None = None,
        **about: Any,
    ) -> None:
        """Save the adapter under these names; a subclass knows how."""
