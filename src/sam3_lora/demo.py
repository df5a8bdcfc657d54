"""The demo: teach the tiny base three concepts that it has never seen, and show what that changed."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from sam3_lora.adapter import WEIGHTS_FILE, load_adapter
from sam3_lora.base.checkpoint import TINY
from sam3_lora.base.loading import load_base
from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.evaluation.metrics import evaluate_split
from sam3_lora.evaluation.scores import AP_METRICS, ModelEvaluation
from sam3_lora.output import claim_output, write_json_atomic, write_text_atomic
from sam3_lora.report import Measured, report_of_run
from sam3_lora.training.data import render_demo_dataset
from sam3_lora.training.launch import RUN_FILE, run_official_script
from sam3_lora.training.lock import check_not_running
from sam3_lora.training.progress import OnProgress
from sam3_lora.training.settings import demo_yaml
from sam3_lora.visualization import comparison_sheet, rows_from_results

METRICS_FILE = "metrics.json"
SHEET_FILE = "before_after.png"

_BATCH_SIZE = 6  # the trainer's own, so that its numbers come out again to the last digit

_NOTE = (
    "adapter: the one of the best epoch, read from disk into a fresh base. That epoch was chosen on these images, so new "
    "images may be found a little less well."
)


def run_demo(
    output: str | Path = "runs/demo", seed: int = 0, on_progress: OnProgress | None = None
) -> dict[str, Any]:
    """Render a dataset, train ``balanced`` on it with the official script, reload the adapter and compare.

    Leaves in ``output`` what a training run leaves, ``dataset/``, ``metrics.json`` and ``before_after.png``. The
    adapter is read from disk into a fresh base before it is measured, for ``report.html`` too. Two to three minutes on
    one core.

    Args:
        output: A new or empty folder, or one that the demo made before, which it replaces.
        seed: Of the images and of the training.
        on_progress: Called after every training step and validation.

    Returns:
        What is in ``metrics.json``: ``base`` and ``adapter``, each with ``bbox_AP50``, ``segm_AP50``, ``bbox_AP``,
        ``segm_AP`` and ``cgF1`` on the validation images; ``trainable_parameters``, ``total_parameters``,
        ``adapter_bytes``, and ``cpu_seconds`` of it all.

    Raises:
        OutputError: If ``output`` holds something else, or an earlier demo that still runs.
        TrainingError: If the official script fails.
    """
    output = Path(output)
    check_not_running(output)
    claim_output(output, made_by="demo")
    dataset = output / "dataset"
    render_demo_dataset(dataset, seed)
    run_file = output.resolve() / RUN_FILE
    write_text_atomic(run_file, demo_yaml(output, seed))
    trained = run_official_script(run_file, output.resolve(), on_progress=on_progress)

    model = load_base("tiny", device="cpu")
    base = _evaluate(model, dataset / "valid")
    adapted = load_adapter(model, trained.adapter).get_base_model()
    adapter = _evaluate(adapted, dataset / "valid")

    results = {"base": base.predictions, "adapter": adapter.predictions}
    rows = rows_from_results(dataset / "valid" / ANNOTATION_FILE, dataset / "valid", results)
    comparison_sheet(rows).save(output / SHEET_FILE)
    report_of_run(
        output,
        dataset,
        title="Three concepts that the tiny SAM3 had never seen",
        models={
            "base": Measured(base.overall.defined(), base.predictions),
            "adapter": Measured(adapter.overall.defined(), adapter.predictions, _NOTE),
        },
    )
    metrics = {
        "base": _numbers(base),
        "adapter": _numbers(adapter),
        "trainable_parameters": trained.trainable_parameters,
        "total_parameters": trained.total_parameters,
        "adapter_bytes": (trained.adapter / WEIGHTS_FILE).stat().st_size,
        "cpu_seconds": round(_cpu_seconds(), 1),
    }
    write_json_atomic(output / METRICS_FILE, metrics)
    return metrics


def _evaluate(model: Any, split: Path) -> ModelEvaluation:
    return evaluate_split(
        model,
        split,
        split / ANNOTATION_FILE,
        resolution=TINY.resolution,
        batch_size=_BATCH_SIZE,
        device="cpu",
    )


def _numbers(result: ModelEvaluation) -> dict[str, float]:
    scores = result.overall.defined()
    return {name: scores[name] for name in (*AP_METRICS, "cgF1")}


def _cpu_seconds() -> float:
    """CPU time of this process and of the training processes that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
