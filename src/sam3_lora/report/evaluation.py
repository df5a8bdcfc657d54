"""The report of an evaluation: the base and any number of adapters on one split."""

from __future__ import annotations

from pathlib import Path

from sam3_lora.adapter import WEIGHTS_FILE
from sam3_lora.data.coco import ANNOTATION_FILE, read_split
from sam3_lora.evaluation.compare import Evaluation
from sam3_lora.evaluation.scores import CLASS_METRICS, Scores
from sam3_lora.report.facts import amount_of, prompts_in_words, size_on_disk
from sam3_lora.report.page import write_report
from sam3_lora.report.pictures import choose_pictures
from sam3_lora.report.tables import Metrics

_NOTE = (
    "All models: the same images and settings, adapters as they are on disk. cgF1 is SAM3’s own metric, IL MCC times "
    "positive micro F1. Numbers on images that chose an adapter’s best epoch are a little better than on new ones."
)


def report_of_evaluation(evaluation: Evaluation, path: str | Path, *, title: str | None = None) -> Path:
    """Write an evaluation as one self-contained HTML file, and return its path.

    Args:
        evaluation: Its split is read again for the pictures.
        path: Replaced if it exists.
        title: Heading; by default one with the name of the split.

    Raises:
        DataError: If the split is not there any more.
    """
    models = {"base": evaluation.base, **evaluation.adapters}
    classes = {
        prompt: {name: _of_class(model.per_class[prompt]) for name, model in models.items()}
        for prompt in evaluation.base.per_class
    }
    pictures = choose_pictures(
        evaluation.split / ANNOTATION_FILE,
        evaluation.split,
        {name: model.predictions for name, model in models.items()},
    )
    return write_report(
        path,
        title=title or f"Evaluation on “{evaluation.split.resolve().name}”",
        facts=_facts(evaluation),
        facts_heading="What was evaluated",
        metrics={name: model.overall.as_dict() for name, model in models.items()},
        classes=classes,
        pictures=pictures,
        notes=[_NOTE],
        guards=evaluation.guards,
    )


def _of_class(scores: Scores) -> Metrics:
    values = scores.as_dict()
    return {name: values[name] for name in CLASS_METRICS}


def _facts(evaluation: Evaluation) -> dict[str, str]:
    split = read_split(evaluation.split)
    adapters = {
        f"Adapter “{name}”": f"{folder}, {size_on_disk(folder / WEIGHTS_FILE)}"
        for name, folder in evaluation.folders.items()
    }
    return {
        "Split": str(evaluation.split),
        "Data": amount_of(split),
        "Base model": evaluation.base_name,
        **adapters,
        "Prompts": prompts_in_words(split.prompts),
    }
