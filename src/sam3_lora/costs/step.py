"""One real training step of the full-size model, counted without memory, GPU or weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from sam3_lora.adapter import get_peft_sam3
from sam3_lora.base.checkpoint import FULL_SIZE
from sam3_lora.base.cpu import cuda_calls_on_cpu, enable_cpu_training
from sam3_lora.base.official import build_meta_sam3
from sam3_lora.costs.cuda import as_on_cuda
from sam3_lora.costs.values import StandInValues
from sam3_lora.counting import StepCount, count_step
from sam3_lora.errors import ConfigError
from sam3_lora.memory import apply_levers, memory_settings
from sam3_lora.memory.settings import AUTO
from sam3_lora.training.composition import shipped_config
from sam3_lora.training.losses import configured_losses, training_loss

from sam3.model.sam3_image import Sam3Image  # isort: skip  (after the modules that stand in for triton)
from sam3.train.data.collator import collate_fn_api  # isort: skip
from sam3.train.data.sam3_image_dataset import (  # isort: skip
    Datapoint,
    FindQueryLoaded,
    Image,
    InferenceMetadata,
    Object,
)

#: Module of the official model -> the part that a count gives its work to.
PARTS = {
    "backbone.vision_backbone.trunk": "vision_encoder",
    "backbone.vision_backbone.convs": "neck",
    "backbone.language_backbone": "text_encoder",
    "geometry_encoder": "geometry_encoder",
    "transformer.encoder": "detr_encoder",
    "transformer.decoder": "detr_decoder",
    "dot_prod_scoring": "detr_decoder",
    "segmentation_head": "segmentation_head",
}
LOSSES = "losses"

Prepare = Callable[[Sam3Image], nn.Module]


class FullSizeStep:
    """The full-size model in training, on fake tensors, to count steps of it.

    Args:
        preset: What is adapted, or a function that prepares the official model another way, such as for full
            fine-tuning; it returns the model to train, in place or wrapped.
        amp: bfloat16 autocast, as on CUDA; else float32.
        config: Keys of the training config to change, by dotted name, such as ``{"memory.segmentation_chunk": None}``.
            ``memory.bf16_base: auto`` is taken as on CUDA.
        **overrides: As for :func:`sam3_lora.get_peft_sam3`.
    """

    def __init__(
        self,
        preset: str | Prepare = "balanced",
        *,
        amp: bool = True,
        config: Mapping[str, Any] | None = None,
        **overrides: Any,
    ) -> None:
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._amp = amp
        enable_cpu_training()
        self._official = model = build_meta_sam3()
        self._model = preset(model) if callable(preset) else get_peft_sam3(model, preset, **overrides)
        settings = shipped_config(config)
        self._loss = configured_losses(settings)
        model.matcher = self._loss.matcher
        block: Any = OmegaConf.to_container(settings.memory)
        memory = memory_settings(block)
        if memory.bf16_base == AUTO:
            memory = dataclasses.replace(memory, bf16_base=amp)
        with self._faked():
            _materialise(self._model)
            apply_levers(model, memory, amp)
            self._model.train()

    def trainable_parameters(self) -> int:
        return sum(p.numel() for p in self._model.parameters() if p.requires_grad)

    def count(self, prompts: int = 1, objects: int = 5, batch: int = 1) -> StepCount:
        """Count a step of ``batch`` images, each asked ``prompts`` prompts, with ``objects`` objects spread over them.

        Raises:
            ConfigError: If a number is below 1, or a prompt has more objects than there are queries.
        """
        spread = spread_objects(prompts, objects) * _checked("batch", batch)
        if max(spread) > FULL_SIZE.num_queries:
            raise ConfigError(f"a prompt can have {FULL_SIZE.num_queries} objects at most, got {max(spread)}")
        for parameter in self._model.parameters():
            parameter.grad = None
        with self._faked(spread), as_on_cuda():
            data = _batch(prompts, objects, batch)
            held = [*self._model.parameters(), *self._model.buffers(), *_tensors_of(data)]
            return count_step(lambda: self._core_loss(data), held, self._parts())

    def _core_loss(self, data: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._amp):
            return training_loss(self._official, self._loss, data)

    def _parts(self) -> dict[str, list[nn.Module]]:
        parts: dict[str, list[nn.Module]] = {}
        for name, part in PARTS.items():
            module = self._official.get_submodule(name)
            # A list is never called itself.
            parts.setdefault(part, []).extend(module if isinstance(module, nn.ModuleList) else [module])
        return {**parts, LOSSES: [self._loss, self._loss.matcher]}

    @contextmanager
    def _faked(self, objects: list[int] | None = None) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(cuda_calls_on_cpu())
            stack.enter_context(self._fake)
            stack.enter_context(StandInValues(objects or ()))
            yield


def count_training_step(
    preset: str | Prepare = "balanced",
    *,
    prompts: int = 1,
    objects: int = 5,
    batch: int = 1,
    amp: bool = True,
    config: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> StepCount:
    """Count one step; see :class:`FullSizeStep`, which counts several of one model."""
    return FullSizeStep(preset, amp=amp, config=config, **overrides).count(prompts, objects, batch)


def _materialise(model: nn.Module) -> None:
    """Put a fake tensor on the CPU in the place of each one on the meta device, also of those that are no buffers."""
    # With the original, whose id another tensor would get otherwise.
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def on_cpu(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        if id(value) not in made:
            tensor = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
            is_parameter = isinstance(value, nn.Parameter)
            made[id(value)] = (value, nn.Parameter(tensor, value.requires_grad) if is_parameter else tensor)
        return made[id(value)][1]

    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name not in ("_modules", "_forward_pre_hooks", "_forward_hooks"):
                vars(module)[name] = tree_map(on_cpu, value)


def spread_objects(prompts: int, objects: int) -> list[int]:
    """Return how many objects each prompt of an image has when they are spread as evenly as can be."""
    each, more = divmod(_checked("objects", objects), _checked("prompts", prompts))
    return [each + (number < more) for number in range(prompts)]


def _checked(name: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"{name} must be 1 or more, got {value!r}")
    return value


def _batch(prompts: int, objects: int, batch: int) -> Any:
    """Return the batch that the official collator makes of such images."""
    datapoints = [_datapoint(spread_objects(prompts, objects)) for _ in range(batch)]
    return collate_fn_api(datapoints, dict_key="all", with_seg_masks=True)["all"]


def _datapoint(objects_of_prompts: list[int]) -> Datapoint:
    side = FULL_SIZE.resolution
    objects = [
        Object(
            bbox=torch.tensor([0.5, 0.5, 0.2, 0.2]),
            area=0.04,
            object_id=number,
            frame_index=0,
            segment=torch.zeros(side, side, dtype=torch.bool),
        )
        for number in range(sum(objects_of_prompts))
    ]
    numbers = iter(range(len(objects)))
    queries = [
        FindQueryLoaded(
            query_text=f"prompt {prompt}",
            image_id=0,
            object_ids_output=[next(numbers) for _ in range(count)],
            is_exhaustive=True,
            is_pixel_exhaustive=True,
            inference_metadata=InferenceMetadata(-1, -1, -1, (side, side), -1, -1),
        )
        for prompt, count in enumerate(objects_of_prompts)
    ]
    picture = Image(data=torch.zeros(3, side, side), objects=objects, size=(side, side))
    return Datapoint(find_queries=queries, images=[picture])


def _tensors_of(data: Any) -> list[Tensor]:
    places = [data, *data.find_inputs, *data.find_targets]
    return [value for place in places for value in vars(place).values() if isinstance(value, Tensor)]
