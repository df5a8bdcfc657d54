"""The report of a run folder. What the run has measured is read; only the base is measured once more."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sam3_lora.adapter import WEIGHTS_FILE
from sam3_lora.base.loading import load_base
from sam3_lora.data.coco import Split, read_split
from sam3_lora.evaluation.metrics import evaluate_split
from sam3_lora.evaluation.scores import CocoResult
from sam3_lora.inference import bfloat16_on_cuda
from sam3_lora.report.facts import amount_of, prompts_in_words, size_on_disk
from sam3_lora.report.page import REPORT_FILE, write_report
from sam3_lora.report.pictures import choose_pictures
from sam3_lora.training.history import History, ReportError, read_history
from sam3_lora.training.monitor import METRICS
from sam3_lora.training.monitored import BEST_DUMPS
from sam3_lora.training.progress import BEST_METRICS_FILE
from sam3_lora.training.splits import split_files

_BASE_NOTE = "base: measured after the training, on the same images and with the same settings as the validations of the run."


@dataclass(frozen=True)
class Measured:
    """What a model reached on ``valid/``: the numbers of a column, its COCO results, and how they came about."""

    metrics: Mapping[str, float]
    predictions: Sequence[CocoResult] = field(repr=False)
    note: str = ""


def report_of_run(
    run_folder: str | Path,
    dataset: str | Path | None = None,
    *,
    title: str | None = None,
    models: Mapping[str, Measured] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write ``report.html`` into a finished run and return its path.

    Args:
        run_folder: The output folder of ``train`` or ``demo``.
        dataset: Where the dataset is now; by default where it was trained from.
        title: Heading; by default one with the name of the folder.
        models: Column -> what it reached, the base first. By default "adapter" is the validation after which the run
            saved its best adapter, and "base" is measured now, which takes as long as one validation.
        on_progress: Called with the number of images done and of all while the base is measured.

    Raises:
        ReportError: If the folder holds no finished run.
        DataError: If the dataset is not there any more.
    """
    run_folder = Path(run_folder)
    history = read_history(run_folder)
    config = _config(run_folder)
    train, valid = _splits(config, None if dataset is None else Path(dataset))
    if models is None:
        adapter = _best_validation(run_folder, history)  # first: it is the one that may be missing
        models = {"base": _measure_base(config, valid, adapter.metrics, on_progress), "adapter": adapter}
    return write_report(
        run_folder / REPORT_FILE,
        title=title or f"Training run “{run_folder.resolve().name}”",
        facts=_facts(config, history, train, valid, run_folder),
        metrics={column: model.metrics for column, model in models.items()},
        history=history,
        pictures=choose_pictures(
            valid.annotation_file,
            valid.folder,
            {column: model.predictions for column, model in models.items()},
        ),
        notes=[model.note for model in models.values() if model.note],
    )


def _splits(config: Mapping[str, Any], dataset: Path | None) -> tuple[Split, Split]:
    """Return the training and the validation images, of the dataset that is given or else where the run had them."""
    if dataset is not None:
        return read_split(dataset / "train"), read_split(dataset / "valid")
    files = split_files(config["training"])
    return read_split(*files["train"]), read_split(*files["valid"])


def _config(run_folder: Path) -> dict[str, Any]:
    path = run_folder / "config_resolved.yaml"
    if not path.is_file():
        raise ReportError(f"no {path.name} in {run_folder}; give the folder that 'train' or 'demo' filled")
    config: Any = OmegaConf.to_container(OmegaConf.load(path))
    if missing := [key for key in ("paths", "base", "adapter", "training") if key not in config]:
        raise ReportError(
            f"{path} has no {', '.join(missing)}: it is not built on one of the sam3_lora configs"
        )
    return dict(config)


def _best_validation(run_folder: Path, history: History) -> Measured:
    """Return what the trainer measured when it saved ``adapters/best``; other dumps are of its last validation."""
    metrics_file = run_folder / "logs" / BEST_METRICS_FILE
    dumps = [
        run_folder / "dumps" / BEST_DUMPS / f"coco_predictions_{iou_type}.json"
        for iou_type in ("segm", "bbox")
    ]
    predictions = next((file for file in dumps if file.is_file()), None)  # a run on boxes only has no masks
    if not metrics_file.is_file() or predictions is None:
        raise ReportError(
            f"{run_folder} has no best adapter with its predictions: the run ended before its first validation, or "
            "was made by an older sam3-lora"
        )
    metrics = json.loads(metrics_file.read_text(encoding="utf-8"))
    return Measured(
        {name: metrics[name] for name in METRICS if name in metrics},
        json.loads(predictions.read_text(encoding="utf-8")),
        f"adapter: measured by the run itself, in the validation after epoch {history.best_epoch}, when adapters/best "
        f"was saved. That epoch was chosen on these images, so new images may be found a little less well.",
    )


def _measure_base(
    config: Mapping[str, Any],
    valid: Split,
    wanted: Collection[str],
    on_progress: Callable[[int, int], None] | None,
) -> Measured:
    base = config["base"]
    model = load_base(base["name"])
    # As the trainer resolves "auto".
    with bfloat16_on_cuda(model.device, enabled=config["training"]["amp_enabled"] is not False):
        result = evaluate_split(
            model,
            valid.folder,
            valid.annotation_file,
            resolution=base["resolution"],
            batch_size=config["training"]["batch_size"],
            device=model.device,
            on_progress=on_progress,
            prompt_of=config.get("prompts", {}).get("names"),
        )
    metrics = {name: value for name, value in result.overall.defined().items() if name in wanted}
    return Measured(metrics, result.predictions, _BASE_NOTE)


def _learning_rate(training: Mapping[str, Any]) -> str:
    """Return the highest rate, and those of parts that have another one."""
    scale = training["lr_scale"]
    others = {"vision encoder": "lr_vision_backbone", "text encoder": "lr_language_backbone"}
    usual = training["lr_transformer"]
    apart = [f"{part} {training[key] * scale:g}" for part, key in others.items() if training[key] != usual]
    return f"{usual * scale:g}" + (f" ({', '.join(apart)})" if apart else "")


def _facts(
    config: Mapping[str, Any], history: History, train: Split, valid: Split, run_folder: Path
) -> dict[str, str]:
    adapter, training, start = config["adapter"], config["training"], history.start or {}
    changes = ", ".join(f"{name} = {value}" for name, value in adapter["overrides"].items())
    trainable, total = start["trainable_parameters"], start["total_parameters"]
    epochs = f"{len(history.metrics)} of {start['epochs']}"
    if history.best_epoch is not None:
        epochs += f", best after {history.best_epoch} (by {history.best_metric})"
    facts = {
        "Preset": adapter["preset"] + (f", with {changes}" if changes else ""),
        "Base model": config["base"]["name"],
        "Adapted modules": f"{start['adapted_modules']:,}" if "adapted_modules" in start else "not recorded",
        "Trained parameters": f"{trainable:,} of {total:,} ({trainable / total:.2%})",
        "Adapter on disk": size_on_disk(run_folder / "adapters" / "best" / WEIGHTS_FILE),
        "Training data": amount_of(train),
        "Validation data": amount_of(valid),
        "Epochs": epochs,
        **({} if training.get("enable_segmentation", True) else {"Trained on": "boxes only"}),
        "Learning rate": _learning_rate(training),
        "Images per step": f"{training['batch_size'] * training['gradient_accumulation_steps']:,} on each process",
        "Seed": str(training["seed"]),
        "Prompts": prompts_in_words(valid.prompts),
    }
    return facts
