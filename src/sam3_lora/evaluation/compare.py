"""The base and any number of adapters side by side on one split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam3_lora.adapter import load_adapter_beside, recorded_base
from sam3_lora.base.checkpoint import DEFAULT, base_info
from sam3_lora.base.loading import load_base
from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.errors import AdapterError, ConfigError, as_report
from sam3_lora.evaluation.guarding import general_folder, guard_all
from sam3_lora.evaluation.metrics import predict_split
from sam3_lora.evaluation.scores import ModelEvaluation, score_predictions
from sam3_lora.evaluation.splits import checked_split
from sam3_lora.evaluation.verdict import GuardReport
from sam3_lora.inference import bfloat16_on_cuda
from sam3_lora.output import claim_output, write_json_atomic
from sam3_lora.record import read_record

from sam3.model.sam3_image import Sam3Image  # isort: skip  (after the modules that stand in for triton)

StrPath = str | Path

METRICS_FILE = "metrics.json"
PREDICTIONS_FOLDER = "predictions"


@dataclass(frozen=True)
class Evaluation:
    """Base and adapters on one split.

    Attributes:
        split: Its folder.
        base_name: What :func:`sam3_lora.load_base` took.
        base: What the base reached.
        adapters: What each adapter reached, by name.
        folders: Where each adapter lies, by the same names.
        guards: What each adapter did to the open vocabulary, by the same names; empty unless it was asked for.
    """

    split: Path
    base_name: str
    base: ModelEvaluation
    adapters: Mapping[str, ModelEvaluation]
    folders: Mapping[str, Path]
    guards: Mapping[str, GuardReport] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return ``base``, ``adapters`` by name and, when there is exactly one, ``adapter``; likewise ``guards`` and
        ``guard``, where there are any."""
        adapters = {name: model.as_dict() for name, model in self.adapters.items()}
        values = {"base": self.base.as_dict(), "adapters": adapters}
        if len(adapters) == 1:
            (values["adapter"],) = adapters.values()
        if guards := {name: report.as_dict() for name, report in self.guards.items()}:
            values["guards"] = guards
            if len(guards) == 1:
                (values["guard"],) = guards.values()
        return values


def evaluate(
    data: StrPath,
    *,
    adapters: Sequence[StrPath] | Mapping[str, StrPath] = (),
    split: StrPath = "valid",
    base: StrPath | None = None,
    batch_size: int = 4,
    device: str | torch.device | None = None,
    guard: bool = False,
    general: StrPath | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure a base and adapters on a split: AP of boxes and masks, mean IoU and cgF1, of each class too.

    A split without any segmentation is measured by its boxes.

    Everything is found out before the first image: the data are checked, the adapters loaded. All models see an
    image in turn, by the prompts that the adapters were trained with; its features are computed once by the base, whose trunk serves every adapter that leaves it as it
    is. The weights of the base are in memory once. On CUDA the forward runs under bfloat16 autocast, as the
    validation of a training run does.

    Args:
        data: Dataset folder.
        adapters: Adapter folders, named by the shortest ends of their paths that tell them apart; or by name.
        split: Name of a split in ``data``, or another folder with ``_annotations.coco.json``.
        base: As for :func:`sam3_lora.load_base`; ``None`` takes the one that the adapters record, without adapters
            ``facebook/sam3``.
        batch_size: Images at a time.
        device: ``None`` takes CUDA when there is one, else the CPU.
        guard: Also find out, as :func:`sam3_lora.guard` does, whether each adapter stays silent where nothing is.
        general: Dataset of concepts that the base knows, for the guard.
        on_progress: Called after every batch with the number of images done and of all. An image with more than 32
            categories is asked in several turns and counts once for each.

    Raises:
        DataError: If the split is missing, cannot be used, or has no objects.
        AdapterError: If adapters are missing, damaged, of different bases, or do not fit the base.
        CheckpointError: If the base cannot be had.
        ConfigError: If an adapter is given twice, adapters were trained with different prompts for a class,
            ``batch_size`` is below 1, or ``general`` comes without ``guard``.
    """
    if general is not None and not guard:
        raise ConfigError("a general dataset is for the guard: pass guard=True (--guard)")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be 1 or more, got {batch_size!r}")
    folder = checked_split(Path(data), split)
    others = None if general is None else general_folder(Path(general), split)
    named = _named(adapters)
    base_name = str(base) if base is not None else _common_base(named)
    prompt_of = common_prompts(named)
    model = load_base(base_name, device=device)
    beside = [load_adapter_beside(model, path).get_base_model() for path in named.values()]
    _share_image_features(model, beside)
    with bfloat16_on_cuda(model.device):
        predictions = predict_split(
            [model, *beside],
            folder,
            folder / ANNOTATION_FILE,
            resolution=base_info(base_name).resolution,
            batch_size=batch_size,
            device=model.device,
            on_progress=on_progress,
            prompt_of=prompt_of,
        )
    of_base, *of_adapters = (score_predictions(folder / ANNOTATION_FILE, results) for results in predictions)
    guards = {}
    if guard:
        by_name = dict(zip(named, beside, strict=True))
        guards = guard_all(
            model,
            by_name,
            folder,
            resolution=base_info(base_name).resolution,
            prompt_of=prompt_of,
            general=others,
            batch_size=batch_size,
            on_progress=on_progress,
        )
    return Evaluation(folder, base_name, of_base, dict(zip(named, of_adapters, strict=True)), named, guards)


def save_evaluation(evaluation: Evaluation, output: Path, *, overwrite: bool = False) -> None:
    """Write ``metrics.json``, and the COCO results of each model into ``predictions/``.

    Raises:
        OutputError: If ``output`` holds something, unless it is an earlier evaluation and ``overwrite`` is set.
    """
    claim_output(output, made_by="evaluate", overwrite=overwrite)
    for name, model in {"base": evaluation.base, **evaluation.adapters}.items():
        file = output / PREDICTIONS_FOLDER / f"{name}.json"  # a/best lies in a/
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(file, model.predictions)
    write_json_atomic(output / METRICS_FILE, evaluation.as_dict())


def _named(adapters: Sequence[StrPath] | Mapping[str, StrPath]) -> dict[str, Path]:
    if isinstance(adapters, (str, Path)):
        raise ConfigError(f"adapters must be a list of folders, got {adapters!r}; write [{str(adapters)!r}]")
    if isinstance(adapters, Mapping):
        if "base" in adapters:
            raise ConfigError(
                "an adapter cannot be named 'base', which is the base itself; take another name"
            )
        return {name: Path(path) for name, path in adapters.items()}
    return unique_names(map(Path, adapters))


def unique_names(folders: Iterable[Path]) -> dict[str, Path]:
    """Return folders by the ends of their paths, as many parts of each as it takes to tell them all apart.

    Nothing is named ``base``, which would stand beside the base itself.

    Raises:
        ConfigError: If two are the same folder.
    """
    folders = list(folders)
    parts = [folder.resolve().parts for folder in folders]
    twice = sorted({str(folder) for folder, own in zip(folders, parts, strict=True) if parts.count(own) > 1})
    if twice:
        raise ConfigError(f"adapter given twice: {', '.join(map(repr, twice))}")
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names) | {"base"}) == len(names) + 1:
            return dict(zip(names, folders, strict=True))
    return {}


def _common_base(adapters: Mapping[str, Path]) -> str:
    if not adapters:
        return DEFAULT
    bases: dict[str, str] = {}
    problems = []
    for name, folder in adapters.items():
        try:
            bases[name] = recorded_base(folder)
        except AdapterError as error:
            problems.append(str(error))
    if problems:
        raise AdapterError(as_report(problems))
    if len(set(bases.values())) > 1:
        made_for = ", ".join(f"{name} for {base!r}" for name, base in bases.items())
        raise AdapterError(
            f"these adapters are made for different bases: {made_for}; evaluate those of each base on their own, "
            "or name one base for all with base (--base)"
        )
    return next(iter(bases.values()))


def common_prompts(adapters: Mapping[str, Path]) -> dict[str, str]:
    """Return the prompts that adapters were trained with for classes by other names, by class.

    Raises:
        ConfigError: If two have different ones for a class; names all of these.
    """
    asked: dict[str, dict[str, str]] = {}
    for adapter, folder in adapters.items():
        record = read_record(folder)
        for name, prompt in ((record.training if record else {}).get("prompt_of") or {}).items():
            asked.setdefault(name, {})[prompt] = adapter
    problems = [
        f"class {name!r}: " + ", ".join(f"{prompt!r} by {adapter}" for prompt, adapter in prompts.items())
        for name, prompts in asked.items()
        if len(prompts) > 1
    ]
    if problems:
        raise ConfigError(
            f"these adapters were trained with different prompts; evaluate them on their own: {as_report(problems)}"
        )
    return {name: next(iter(prompts)) for name, prompts in asked.items()}


def _share_image_features(base: Sam3Image, adapted: Sequence[nn.Module]) -> None:
    """Give every model whose vision trunk has exactly the base's weights the base's own trunk, with a memory."""
    neck: Any = base.backbone.vision_backbone
    own = _addresses(neck.trunk)
    shared = neck.trunk = RememberingTrunk(neck.trunk)
    for model in adapted:
        neck = model.get_submodule("backbone.vision_backbone")
        # LoRA adds weights; a trained bias, or a whole module that was trained, lies elsewhere than the base's.
        neck.trunk = shared if _addresses(neck.trunk) == own else RememberingTrunk(neck.trunk)


def _addresses(module: nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in module.parameters()}


class RememberingTrunk(nn.Module):
    """A vision trunk that gives the features of the last images again when it sees the same images again.

    The neck above it runs for each model: an adapter may be on it, and it costs little beside the trunk. It reads
    the features and does not write them (``necks.py``, sam3 0.1.4).
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self._images: Tensor | None = None
        self._features: Any = None

    def forward(self, images: Tensor) -> Any:
        if self._images is None or not torch.equal(images, self._images):
            self._images, self._features = images, self.trunk(images)
        return self._features
