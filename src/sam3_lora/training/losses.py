"""The losses of our training configs, outside of a training run."""

from __future__ import annotations

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from sam3_lora.inference import eval_mode
from sam3_lora.memory.modes import makes_noise
from sam3_lora.training.composition import shipped_config


def configured_losses(config: DictConfig) -> Any:
    """Return the official ``Sam3LossWrapper`` as a config sets it up, for a single process.

    Call :func:`sam3_lora.base.cpu.enable_cpu_training` before it is used where there is no CUDA.

    Args:
        config: From :func:`~sam3_lora.training.composition.shipped_config`; its ``base.num_queries`` is that of the model's decoder.
    """
    return instantiate(config.loss, normalization="local")  # "global" needs a process group


def training_loss(model: Any, losses: Any, batch: Any) -> Tensor:
    """Return the loss that the official trainer would take the gradient of, a scalar.

    Args:
        model: A ``Sam3Image`` in training mode, with a matcher.
        losses: From :func:`configured_losses`.
        batch: An official ``BatchedDatapoint`` with targets, on the device of the model.
    """
    stages = model(batch)
    targets = [model.back_convert(target) for target in batch.find_targets]
    loss: Tensor = losses(stages, targets)["core_loss"]
    return loss


def noise_free_loss(model: Any, batch: Any) -> Tensor:
    """Return the loss of our training configs as in training, but without dropout and DropPath.

    Args:
        model: A ``Sam3Image``; its modes are as before afterwards.
        batch: As for :func:`training_loss`.
    """
    losses = configured_losses(shipped_config({"base.num_queries": model.transformer.decoder.num_queries}))
    matcher = model.matcher
    with eval_mode(model):
        model.train()
        for module in filter(makes_noise, model.modules()):
            module.training = False
        try:
            model.matcher = losses.matcher  # a model that was built for inference has none
            return training_loss(model, losses, batch)
        finally:
            model.matcher = matcher
