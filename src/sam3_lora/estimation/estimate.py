"""What a training step will cost, before it runs: from formulas that were fitted to counted steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sam3_lora.data.prompt_settings import prompt_settings
from sam3_lora.errors import ConfigError, as_report
from sam3_lora.estimation.advice import Advice, advice_for
from sam3_lora.estimation.levers import formula_of, lever_problems, shipped_levers
from sam3_lora.estimation.prompts import read_asked
from sam3_lora.presets import get_preset

#: What CUDA and its libraries take for themselves. An assumption: it depends on GPU and driver.
CUDA_CONTEXT_BYTES = 800_000_000
MAX_OBJECTS = 50  # training.max_objects of the shipped configs

_QUERIES = 200  # of the model: so many objects a prompt can have
_LIMITS = {"prompts": (1, 10_000), "objects": (0, 100_000), "batch": (1, 1_000)}


@dataclass(frozen=True)
class Estimate:
    """What one training step costs on the full-size model.

    Attributes:
        preset: Of the adapter.
        prompts: Asked of each image.
        objects: Of each image.
        batch: Images in a forward pass.
        memory: The levers, as in the ``memory`` block of a config.
        peak_bytes: Of all tensors at the peak of a step, with the optimizer: what
            ``torch.cuda.max_memory_allocated()`` will say.
        peak_phase: In which part of the model that is, and whether in its forward or backward.
        step_flops: Of one forward and backward pass, with recomputation.
        trainable_parameters: Exact.
        breakdown: Bytes of ``weights``, ``gradients``, ``optimizer``, ``activations`` (with the batch), which add up to
            ``peak_bytes``, and of ``cuda_context``, which comes on top.
        advice: Changes by how much memory they save, the most first.
        gpu_memory_bytes: Of the GPU asked about.
        worst_image: The same for a batch of images like that with the most objects, if a dataset was given.
    """

    preset: str
    prompts: int
    objects: int
    batch: int
    memory: Mapping[str, Any]
    peak_bytes: int
    peak_phase: str
    step_flops: int
    trainable_parameters: int
    breakdown: Mapping[str, int]
    advice: tuple[Advice, ...] = ()
    gpu_memory_bytes: int | None = None
    worst_image: Estimate | None = None

    @property
    def device_bytes(self) -> int:
        """What the GPU must have: ``peak_bytes`` and what CUDA takes for itself."""
        return self.peak_bytes + self.breakdown["cuda_context"]

    @property
    def fits(self) -> bool | None:
        """Whether the step of the worst image fits the GPU asked about, if one was."""
        if self.gpu_memory_bytes is None:
            return None
        return (self.worst_image or self).device_bytes <= self.gpu_memory_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, as ``sam3-lora estimate --json`` prints it; ``fits`` only if a GPU was asked about."""
        values = {name: value for name, value in vars(self).items() if name not in _APART}
        values |= {"memory": dict(self.memory), "breakdown": dict(self.breakdown)}
        values |= {"device_bytes": self.device_bytes, "advice": [vars(advice) for advice in self.advice]}
        if self.gpu_memory_bytes is not None:
            values |= {"gpu_memory_bytes": self.gpu_memory_bytes, "fits": self.fits}
        if self.worst_image is not None:
            values["worst_image"] = self.worst_image.as_dict()
        return values


_APART = ("advice", "gpu_memory_bytes", "worst_image")


def estimate(
    preset: str = "balanced",
    *,
    prompts: int | None = None,
    objects: int | None = None,
    batch: int = 1,
    data: str | Path | None = None,
    gpu_memory: float | None = None,
    memory: Mapping[str, Any] | None = None,
    max_objects: int = MAX_OBJECTS,
    asking: Mapping[str, Any] | None = None,
) -> Estimate:
    """Return what one training step on the full-size model will cost, within a second and without torch.

    Args:
        preset: A preset as it is shipped; others than these were not counted.
        prompts: Asked of each image; 1 if neither it nor ``data`` is given.
        objects: Annotated in each image; 5 if neither it nor ``data`` is given.
        batch: Images in a forward pass, ``training.batch_size``.
        data: Dataset folder, or annotation file of the training images, to take prompts (the most of any image) and objects
            from (the median of its images). The image with the most objects is estimated too.
        gpu_memory: Of the GPU to ask about, in GB (10^9 bytes).
        memory: Keys of the ``memory`` block that are not as shipped.
        max_objects: ``training.max_objects``, for ``data``.
        asking: Keys of the ``prompts`` block that are not as shipped, for ``data``.

    Raises:
        ConfigError: For an unknown preset, a number out of range, and levers that were not counted together; all at once.
        DataError: If there is no usable dataset in ``data``.
    """
    get_preset(preset)
    asked = None if data is None else read_asked(Path(data), max_objects, prompt_settings(asking or {}))
    numbers = {
        "prompts": prompts if prompts is not None else asked.prompts if asked else 1,
        "objects": objects if objects is not None else asked.typical_objects if asked else 5,
        "batch": batch,
    }
    levers = {**shipped_levers(), **(memory or {})}
    problems = [*_number_problems(numbers, gpu_memory), *lever_problems(preset, memory or {}, levers)]
    if problems:
        raise ConfigError(as_report(problems))
    found = _estimated(preset, levers, **numbers)
    found = replace(
        found,
        advice=advice_for((preset, levers, (numbers["prompts"], numbers["objects"], batch))),
        gpu_memory_bytes=None if gpu_memory is None else round(gpu_memory * 1e9),
    )
    if asked is None or objects is not None:
        return found
    return replace(
        found, worst_image=_estimated(preset, levers, **{**numbers, "objects": asked.most_objects})
    )


def _estimated(preset: str, levers: Mapping[str, Any], prompts: int, objects: int, batch: int) -> Estimate:
    formula = formula_of(preset, levers)
    assert formula is not None
    phase, peak = formula.peak(prompts, objects, batch)
    return Estimate(
        preset=preset,
        prompts=prompts,
        objects=objects,
        batch=batch,
        memory=levers,
        peak_bytes=peak + formula.held_besides,
        peak_phase=phase,
        step_flops=formula.step_flops(prompts, objects, batch),
        trainable_parameters=formula.trainable_parameters,
        breakdown={
            "weights": formula.weights_bytes,
            "gradients": formula.gradient_bytes,
            "optimizer": formula.optimizer_bytes,
            "activations": peak - formula.weights_bytes,
            "cuda_context": CUDA_CONTEXT_BYTES,
        },
    )


def _number_problems(numbers: Mapping[str, Any], gpu_memory: Any) -> list[str]:
    problems = [
        f"{name} must be a whole number from {least:,} to {most:,}, got {numbers[name]!r}"
        for name, (least, most) in _LIMITS.items()
        if not isinstance(numbers[name], int)
        or isinstance(numbers[name], bool)
        or not least <= numbers[name] <= most
    ]
    if not problems and numbers["objects"] > _QUERIES * numbers["prompts"]:
        problems.append(
            f"a prompt can have {_QUERIES} objects at most, got {numbers['objects']} in {numbers['prompts']} prompts"
        )
    if gpu_memory is not None and not 0 < gpu_memory < 10_000:
        problems.append(f"gpu_memory is in GB and must lie between 0 and 10,000, got {gpu_memory!r}")
    return problems
