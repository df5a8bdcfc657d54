"""Proof that every adapted module acts: changed alone it moves an output, and the official losses give it a gradient."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam3_lora.adapter.layers import adapter_layers, adapter_parameters, inner_model, set_weight_change
from sam3_lora.attention import SplitAttention
from sam3_lora.base.cpu import enable_cpu_training
from sam3_lora.components import ROOTS, why_excluded
from sam3_lora.data.shapes import PLAIN, PRETRAINING_CONCEPTS, render_scene
from sam3_lora.errors import ConfigError
from sam3_lora.evaluation.batches import evaluating, probe_batch
from sam3_lora.inference import resolution_of
from sam3_lora.training.losses import configured_losses, training_loss

from sam3.model.geometry_encoders import Prompt  # isort: skip  (after the modules that stand in for triton)
from sam3.model.sam3_image import Sam3Image  # isort: skip

LEAST_MOVEMENT = 100.0  # in multiples of the noise: below, a change cannot be told from rounding

_OUTPUTS = ("pred_logits", "pred_boxes", "pred_masks", "semantic_seg", "presence_logit_dec")
_CHANGES = (1.0, 10.0)  # of a weight, relative to its norm; the second only where the first moves nothing
_CHANGE_FOR_GRADIENT = 0.1  # of all weights at once; at zero, A would have no gradient
_RANDOM_IN_TRAINING = (nn.modules.dropout._DropoutNd, SplitAttention, nn.MultiheadAttention)


@dataclass(frozen=True)
class ModuleProof:
    """What was measured on one adapted module.

    Attributes:
        moved: Largest change of a final output, in multiples of the noise of that output.
        output: The output that moved most.
        gradient: Largest absolute gradient of the tensor of the adapter in this module that has the smallest one.
        dead_because: Why training or using the adapter here is without effect; ``None`` for a live module.
    """

    moved: float
    output: str
    gradient: float
    dead_because: str | None


@dataclass(frozen=True)
class Verification:
    """The proof of every adapted module, by its official name."""

    modules: Mapping[str, ModuleProof]

    @property
    def checked(self) -> int:
        """Number of adapted modules, all of which were checked."""
        return len(self.modules)

    @property
    def dead(self) -> list[str]:
        """Names of the modules on which the adapter is without effect."""
        return [name for name, proof in self.modules.items() if proof.dead_because]

    def as_dict(self) -> dict[str, Any]:
        """Return ``checked``, ``dead``, and ``modules`` by name."""
        return {
            "checked": self.checked,
            "dead": self.dead,
            "modules": {name: vars(proof) for name, proof in self.modules.items()},
        }


def verify_adapter(
    model: nn.Module, *, adapter_name: str = "default", on_progress: Callable[[int, int], None] | None = None
) -> Verification:
    """Prove for each adapted module that the adapter acts there, and return what was measured.

    Each module alone gets a random change of its weight, as large as the weight, while all others are as in the base:
    a final output must move by more than :data:`LEAST_MOVEMENT` times its noise. Then all get a small one, and the
    losses of our training configs on a batch with words, boxes, masks and an absent prompt must give every tensor of
    the adapter a gradient, with dropout and DropPath off. The model is as before afterwards.

    It takes one forward for each module (the image encoder is run again only for its own modules), and one backward.

    Args:
        model: A ``PeftModel``, or the ``Sam3Image`` inside one, on any device, with a LoRA adapter from whatever
            source.
        adapter_name: Which adapter to prove.
        on_progress: Called after every module with the number done and of all.

    Raises:
        AdapterError: If there is no such adapter, or it is merged.
        ConfigError: If the model is no ``Sam3Image``.
    """
    inner = inner_model(model)
    if not isinstance(inner, Sam3Image):
        raise ConfigError(f"only an adapted Sam3Image can be verified, got a {type(inner).__name__}")
    layers = adapter_layers(inner, adapter_name)
    enable_cpu_training()
    with _as_it_was(inner, layers, adapter_name), evaluating(inner):
        batch = _probe_batch(inner)
        gradients = _gradients(inner, layers, adapter_name, batch)
        movements = _movements(inner, layers, adapter_name, batch, on_progress)
    return Verification(
        {
            name: ModuleProof(moved, output, gradients[name], _why_dead(name, called, moved, gradients[name]))
            for name, (moved, output, called) in movements.items()
        }
    )


def _why_dead(name: str, called: bool, moved: float, gradient: float) -> str | None:
    if known := why_excluded(name):
        return known
    if not called:
        return "its parent reads its weight without calling it, or never runs it"
    if moved <= LEAST_MOVEMENT:
        return "no output moves when it is changed"
    if gradient == 0:
        return "the losses give it no gradient"
    return None


def _movements(
    model: Sam3Image,
    layers: Mapping[str, Any],
    adapter_name: str,
    batch: Any,
    on_progress: Callable[[int, int], None] | None,
) -> dict[str, tuple[float, str, bool]]:
    """Return for each module how far which output moves when it alone is changed, and whether it is called at all."""
    for layer in layers.values():
        layer.enable_adapters(False)
    found = {}
    with torch.no_grad():
        with _calls_of(layers) as called:
            features = _Features(model, batch)
            base = _outputs(model, batch, features.image, features.text)
        again = _outputs(model, batch, features.image, features.text)
        noise = {name: _noise(value, again[name]) for name, value in base.items()}
        for number, (name, layer) in enumerate(layers.items(), 1):
            layer.enable_adapters(True)
            moved, output = 0.0, ""
            for size in _CHANGES:
                set_weight_change(layer, adapter_name, size, torch.Generator().manual_seed(number))
                outputs = _outputs(model, batch, *features.with_changed(name))
                ratios = {key: _distance(value, base[key]) / noise[key] for key, value in outputs.items()}
                output = max(ratios, key=lambda key: ratios[key])
                moved = ratios[output]
                if moved > LEAST_MOVEMENT:
                    break
            layer.enable_adapters(False)
            found[name] = (moved, output, name in called)
            if on_progress is not None:
                on_progress(number, len(layers))
    return found


class _Features:
    """What the two encoders of the base give for a batch, to be computed again only for a module inside of one."""

    def __init__(self, model: Sam3Image, batch: Any) -> None:
        self._model, self._batch = model, batch
        self.image = self._image()
        self.text = self._text()

    def with_changed(self, module_name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return image and text features of the model as it is now, of which only this module has changed."""
        component = next((c for c, roots in ROOTS.items() if module_name.startswith(roots)), None)
        image = self._image() if component in ("vision_encoder", None) else self.image
        text = self._text() if component in ("text_encoder", None) else self.text
        return image, text

    def _image(self) -> dict[str, Any]:
        features: dict[str, Any] = self._model.backbone.forward_image(self._batch.img_batch)
        return features

    def _text(self) -> dict[str, Any]:
        features: dict[str, Any] = self._model.backbone.forward_text(
            self._batch.find_text_batch, device=self._model.device
        )
        return features


def _outputs(
    model: Sam3Image, batch: Any, image: Mapping[str, Any], text: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the final outputs, as the official forward does in eval mode."""
    find = batch.find_inputs[0]
    out = model.forward_grounding(
        backbone_out={"img_batch_all_stages": batch.img_batch, **image, **text},
        find_input=find,
        find_target=None,
        geometric_prompt=Prompt(
            box_embeddings=find.input_boxes,
            box_mask=find.input_boxes_mask,
            box_labels=find.input_boxes_label,
        ),
    )
    return {name: out[name].float() for name in _OUTPUTS if out.get(name) is not None}


def _gradients(
    model: Sam3Image, layers: Mapping[str, Any], adapter_name: str, batch: Any
) -> dict[str, float]:
    """Return for each module the largest gradient of that tensor of the adapter which has the smallest one."""
    parameters = {name: adapter_parameters(layer, adapter_name) for name, layer in layers.items()}
    for number, layer in enumerate(layers.values()):
        layer.enable_adapters(True)
        set_weight_change(
            layer, adapter_name, _CHANGE_FOR_GRADIENT, torch.Generator().manual_seed(1000 + number)
        )
    tensors = [tensor for inside in parameters.values() for tensor in inside.values()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for tensor in tensors:
        tensor.requires_grad_(True)
    with torch.enable_grad():
        loss = _official_loss(model, batch)
        gradients = iter(torch.autograd.grad(loss, tensors, allow_unused=True))
    largest = {
        name: [0.0 if (g := next(gradients)) is None else g.abs().max().item() for _ in inside]
        for name, inside in parameters.items()
    }
    return {name: min(values) for name, values in largest.items()}


def _official_loss(model: Sam3Image, batch: Any) -> Tensor:
    """Return the loss of our training configs in training mode, but for what is random in it."""
    losses = configured_losses(model.transformer.decoder.num_queries)
    matcher = model.matcher
    model.train()
    for module in model.modules():
        if isinstance(module, _RANDOM_IN_TRAINING) or type(module).__name__ == "DropPath":
            module.training = False
    try:
        model.matcher = losses.matcher  # a model that was built for inference has none
        return training_loss(model, losses, batch)
    finally:
        model.matcher = matcher
        model.eval()


def _probe_batch(model: Sam3Image) -> Any:
    """Return a drawn image asked for a shape by words, by words and a box, and for one that is not there."""
    shown, absent = PRETRAINING_CONCEPTS[0], PRETRAINING_CONCEPTS[-1]
    resolution = resolution_of(model)
    scene = render_scene(np.random.RandomState(0), [shown], PLAIN, resolution)
    masks = np.stack([item.mask for item in scene.objects])
    boxes = np.array([item.box_xyxy for item in scene.objects], dtype=np.float32)
    return probe_batch(
        scene.image,
        masks,
        boxes,
        shown=shown.prompt,
        absent=absent.prompt,
        resolution=resolution,
        device=model.device,
    )


def _noise(value: Tensor, again: Tensor) -> float:
    """Return what the same computation may differ by: between two runs of it, or by rounding."""
    rounding = torch.finfo(value.dtype).eps * max(1.0, value.abs().max().item())
    return max(_distance(value, again), rounding)


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference; huge where one is not a number, which is a difference as well."""
    return (a - b).abs().nan_to_num(nan=torch.finfo(a.dtype).max).max().item()


@contextlib.contextmanager
def _calls_of(layers: Mapping[str, Any]) -> Iterator[set[str]]:
    """Collect the names of the layers that are called."""
    called: set[str] = set()
    hooks = [
        layer.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, layer in layers.items()
    ]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _as_it_was(model: nn.Module, layers: Mapping[str, Any], adapter_name: str) -> Iterator[None]:
    """Put back the adapter's values, what is trained, which adapters act, and the random states."""
    values = [
        (p, p.detach().clone())
        for layer in layers.values()
        for p in adapter_parameters(layer, adapter_name).values()
    ]
    trained = [(p, p.requires_grad) for p in model.parameters()]
    acting = [(layer, layer.disable_adapters, layer.active_adapters) for layer in layers.values()]
    python_state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            for layer in layers.values():
                layer.set_adapter([adapter_name])
            yield
    finally:
        random.setstate(python_state)
        for layer, disabled, active in acting:
            layer.set_adapter(active)
            layer._disable_adapters = disabled
        with torch.no_grad():
            for parameter, value in values:
                parameter.copy_(value)
        for parameter, required in trained:
            parameter.requires_grad_(required)
