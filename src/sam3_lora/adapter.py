"""LoRA adapters on SAM3 through PEFT: add, save, load, and check that what was asked for is what is there."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sam3_lora.attention import split_attention
from sam3_lora.errors import AdapterError, ConfigError, OutputError, TargetError, as_report
from sam3_lora.liveness import refuse_uncalled
from sam3_lora.model_card import model_card
from sam3_lora.output import replaced_folder
from sam3_lora.plan import Plan, Strength, make_plan, preset_of
from sam3_lora.presets import Preset, get_preset

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
CARD_FILE = "README.md"
ADAPTER_FILES = (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE)

_PREFIX = "base_model.model."  # of every key in PEFT's file format
_LORA_FIELDS = tuple(f.name for f in dataclasses.fields(LoraConfig) if f.init)

# These need the weights to start from; the trial on the meta device has only shapes.
_INIT_FROM_WEIGHTS = ("pissa", "olora", "orthogonal", "eva", "corda", "loftq", "lora_ga")


class ParameterCount(NamedTuple):
    """How many numbers a model holds. ``total`` counts the base and its adapters, as PEFT does."""

    trainable: int
    total: int


def get_peft_sam3(
    model: nn.Module, preset: str | Preset = "balanced", *, adapter_name: str = "default", **overrides: Any
) -> PeftModel:
    """Add a fresh LoRA adapter to a SAM3 image model, in place, and return the ``PeftModel`` around it.

    Attention is split, the base is frozen and LoRA weights are fp32 even on a bf16 base. The output stays
    the same until the adapter is trained. ``.get_base_model()`` of the result is ``model`` itself with its
    official parameter names: give that one to the trainer. A copy without weights is adapted first, so that
    ``model`` is as it was if anything is raised.

    Args:
        model: A ``Sam3Image`` with its weights loaded; its ``name_or_path`` is recorded as the base model.
        preset: A name from :data:`sam3_lora.presets.PRESETS`, or a preset of your own.
        adapter_name: PEFT's name for the adapter.
        **overrides: ``components`` and ``kinds`` to adapt; ``r`` and ``lora_alpha``, a number or one per
            component; ``last_n_vision_blocks``, to leave out the blocks before them; and every other field of PEFT's ``LoraConfig``. ``target_modules`` replaces components
            and kinds. ``rank_pattern`` keeps ``lora_alpha / r``, unless an alpha is given as well.

    Raises:
        ConfigError: For unknown presets and overrides, and values out of range; all at once.
        TargetError: If a requested module does not exist, is dead, or was not wrapped as requested.
        AdapterError: If the model has an adapter already.
    """
    _refuse_adapted(model)
    preset = get_preset(preset) if isinstance(preset, str) else preset
    trial = split_attention(_without_weights(model))
    plan = make_plan((name for name, _ in trial.named_modules()), preset, overrides, _LORA_FIELDS)
    _check_wrapped(_try_on(trial, _lora_config(plan), adapter_name), adapter_name, plan)
    refuse_uncalled(model, plan.modules)

    if "base_model_name_or_path" in plan.lora_config:
        model.name_or_path = plan.lora_config["base_model_name_or_path"]
    adapted = _wrap(split_attention(model), _lora_config(plan), adapter_name)
    _check_wrapped(adapted, adapter_name, plan)
    return adapted


def save_adapter(model: nn.Module, folder: str | Path, *, adapter_name: str = "default") -> Path:
    """Write an adapter in PEFT's format, with a model card, and return the folder.

    The folder appears whole: it is written beside its place and renamed. An adapter that is there is
    replaced. Plain PEFT loads it with ``PeftModel.from_pretrained(split_attention(base), folder)``.

    Args:
        model: A ``PeftModel``, or the ``Sam3Image`` inside one.
        folder: Where to write; parents are made.
        adapter_name: Which adapter to write.

    Raises:
        AdapterError: If the model has no adapter of that name.
        OutputError: If something else than an adapter is at ``folder``.
    """
    inner = inner_model(model)
    config = copy.deepcopy(_config_of(inner, adapter_name))
    config.inference_mode = True  # as PEFT saves it: a loaded adapter is frozen unless asked for
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in _adapter_tensors(inner, adapter_name).items()
    }
    made_for = {"base_model_class": type(inner).__name__, "parent_library": type(inner).__module__}
    folder = Path(folder)
    _refuse_to_replace(folder)
    with replaced_folder(folder.resolve()) as new:
        save_file(tensors, new / WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(new), auto_mapping_dict=made_for)
        (new / CARD_FILE).write_text(_card(inner, config, adapter_name, tensors), encoding="utf-8")
        for file in new.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read
    return folder


def load_adapter(
    model: nn.Module, folder: str | Path, adapter_name: str = "default", *, is_trainable: bool = False
) -> PeftModel:
    """Load a saved adapter into a base model, in place, and return the ``PeftModel`` around it.

    Attention is split first if need be. Every tensor of the file must have its place in the model and every
    place its tensor; this is found out on a copy without weights, so that ``model`` is as it was if anything
    is raised.

    Args:
        model: The base that the adapter was trained on, without an adapter.
        folder: A folder written by :func:`save_adapter` or by PEFT.
        adapter_name: The name it gets in the model; need not be the name it was saved under.
        is_trainable: Train it further; otherwise it is frozen and the model put in eval mode, as PEFT does.

    Raises:
        AdapterError: If files are missing or damaged, or tensors do not fit the model; lists every tensor.
    """
    _refuse_adapted(model)
    config, tensors = _read_adapter(Path(folder))
    config.inference_mode = not is_trainable
    recorded_base = config.base_model_name_or_path
    try:
        trial = _try_on(split_attention(_without_weights(model)), config, adapter_name)
    except ConfigError as error:
        raise AdapterError(f"{str(folder)!r} does not fit this model: {error}") from error
    problems = _misfits(tensors, _adapter_tensors(trial, adapter_name))
    if problems:
        raise AdapterError(f"{str(folder)!r} does not fit this model: {as_report(problems)}")

    adapted = _wrap(split_attention(model), config, adapter_name)
    result: Any = set_peft_model_state_dict(adapted, tensors, adapter_name)
    if result.unexpected_keys:
        raise AdapterError(f"PEFT left out tensors of {str(folder)!r}: {as_report(result.unexpected_keys)}")
    config.base_model_name_or_path = config.base_model_name_or_path or recorded_base
    return adapted if is_trainable else adapted.eval()


def load_adapter_beside(model: nn.Module, folder: str | Path) -> PeftModel:
    """Load a saved adapter, frozen, into a copy of a base that shares the base's weights, and return the ``PeftModel``.

    ``model`` stays as it is, so that one base in memory serves itself and any number of adapters. Weights that an
    adapter replaces (``modules_to_save``) are its own; one that changes base weights in place (trained biases, PiSSA
    and its like) gets a full copy. Errors as in :func:`load_adapter`.
    """
    _refuse_adapted(model)
    config, _ = _read_adapter(Path(folder))
    in_place = config.bias != "none" or str(config.init_lora_weights).startswith(_INIT_FROM_WEIGHTS)
    return load_adapter(_copied(model, _cloned if in_place else _in_same_memory), folder)


def inner_model(model: nn.Module) -> nn.Module:
    """Return the ``Sam3Image`` of a ``PeftModel``, or the model itself.

    Attributes set on a ``PeftModel``, and its ``.to()``, do not reach what the inner model remembers.
    """
    if not isinstance(model, PeftModel):
        return model
    inner: nn.Module = model.get_base_model()
    return inner


def recorded_base(folder: str | Path) -> str:
    """Return the name of the base model that a saved adapter was made for.

    Raises:
        AdapterError: If files are missing or damaged, or the base was not recorded.
    """
    config, _ = _read_adapter(Path(folder))
    if not config.base_model_name_or_path:
        raise AdapterError(f"{str(folder)!r} does not say which base it was made for; name it with base=")
    return str(config.base_model_name_or_path)


def adapted_modules(model: nn.Module) -> list[str]:
    """Return the official names of the modules that carry an adapter, in the order of the model.

    Args:
        model: A ``PeftModel``, or the model inside one; a model without adapters gives an empty list.
    """
    return [name for name, module in inner_model(model).named_modules() if isinstance(module, BaseTunerLayer)]


def adapter_strengths(model: nn.Module, adapter_name: str = "default") -> dict[str, Strength]:
    """Return r and alpha of every module that an adapter wraps, by official name."""
    return _strengths(inner_model(model), adapter_name)


def adapter_tensors(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Return the tensors that :func:`save_adapter` writes, by their keys in the file."""
    return _adapter_tensors(model, adapter_name)


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the trainable and all parameters of a model, each shared parameter once."""
    parameters = list(model.parameters())
    return ParameterCount(
        sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
    )


def _refuse_adapted(model: nn.Module) -> None:
    adapted = adapted_modules(model)
    if isinstance(model, PeftModel) or adapted:
        raise AdapterError(
            f"this model has an adapter already, on {len(adapted)} modules; "
            "start from a fresh base, or take it out with unload() of its PeftModel"
        )


def _without_weights(model: nn.Module) -> nn.Module:
    """Return a copy of the module tree with all parameters on the meta device."""
    return _copied(model, _on_meta)


def _copied(model: nn.Module, parameter: Callable[[nn.Parameter], nn.Parameter]) -> nn.Module:
    """Return a copy of the module tree with each parameter passed through a function; other attributes are shared.

    ``copy.deepcopy`` would copy the buffers, the tokenizer and whatever a forward has cached.
    """
    copies: dict[nn.Module, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            return nn.Module()  # transforms of the tracker's images: no targets, and not copied this way
        if module not in copies:
            twin = copies[module] = module.__new__(type(module))
            # Dicts are copied too: they hold the hooks and buffers, which are each module's own.
            twin.__dict__ = {
                n: copy.copy(v) if isinstance(v, dict) else v for n, v in module.__dict__.items()
            }
            twin._parameters = {n: p if p is None else parameter(p) for n, p in module._parameters.items()}
            twin._modules = {n: m if m is None else copied(m) for n, m in module._modules.items()}
        return copies[module]

    return copied(model)


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)


def _cloned(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def _in_same_memory(parameter: nn.Parameter) -> nn.Parameter:
    # A parameter of its own, because PEFT freezes what it wraps, and torch has other kernels for frozen attention.
    return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)


def _lora_config(plan: Plan) -> LoraConfig:
    try:
        return LoraConfig(**plan.lora_config)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"PEFT refuses these settings: {error}") from error


def _try_on(trial: nn.Module, config: LoraConfig, adapter_name: str) -> PeftModel:
    """Wrap a model without weights, so that whatever PEFT refuses is known before the real one is touched."""
    config = copy.deepcopy(config)
    if str(config.init_lora_weights).startswith(_INIT_FROM_WEIGHTS):
        config.init_lora_weights = True
    try:
        return _wrap(trial, config, adapter_name, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise ConfigError(f"PEFT refuses these settings: {error}") from error


def _wrap(
    model: nn.Module, config: LoraConfig, adapter_name: str, low_cpu_mem_usage: bool = False
) -> PeftModel:
    config.base_model_name_or_path = None  # PEFT takes it from the model, and warns about any other
    adapted = get_peft_model(model, config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    assert isinstance(adapted, PeftModel)  # a PeftMixedModel only comes with mixed=True
    return adapted


def _check_wrapped(adapted: PeftModel, adapter_name: str, plan: Plan) -> None:
    """Compare what PEFT wrapped, and how strongly, with the plan."""
    found = _strengths(inner_model(adapted), adapter_name)
    problems = [f"{name}: not wrapped" for name in plan.modules if name not in found]
    problems += [f"{name}: wrapped without being asked for" for name in found if name not in plan.modules]
    problems += [
        f"{name}: {found[name]}, asked for {wanted}"
        for name, wanted in plan.modules.items()
        if found.get(name, wanted) != wanted
    ]
    if problems:
        raise TargetError(f"PEFT did not wrap the modules as requested: {as_report(problems)}")


def _strengths(inner: nn.Module, adapter_name: str) -> dict[str, Strength]:
    return {
        name: Strength(module.r[adapter_name], module.lora_alpha[adapter_name])
        for name, module in inner.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }


def _config_of(inner: nn.Module, adapter_name: str) -> LoraConfig:
    configs: Mapping[str, LoraConfig] = getattr(inner, "peft_config", {})
    if adapter_name not in configs:
        raise AdapterError(f"this model has no adapter {adapter_name!r}; it has {sorted(configs) or 'none'}")
    return configs[adapter_name]


def _adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return the adapter's tensors under the keys of PEFT's file format."""
    # "auto" would ask the Hub whether the base model's embeddings have been resized.
    tensors = get_peft_model_state_dict(
        inner_model(model), adapter_name=adapter_name, save_embedding_layers=False
    )
    return {_PREFIX + name: tensor for name, tensor in tensors.items()}


def _read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    missing = [name for name in (WEIGHTS_FILE, CONFIG_FILE) if not (folder / name).is_file()]
    if missing:
        hint = (
            f"; did you mean {str(folder / 'adapters' / 'best')!r}?" if (folder / "adapters").is_dir() else ""
        )
        raise AdapterError(
            f"{str(folder)!r} is not an adapter folder: it has no {' and no '.join(missing)}{hint}"
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterError(f"{str(folder / CONFIG_FILE)!r} is damaged: {error}") from error
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"{str(folder)!r} holds a {config.peft_type} adapter; only LoRA can be loaded")
    try:
        tensors: dict[str, Tensor] = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise AdapterError(f"{str(folder / WEIGHTS_FILE)!r} is damaged: {error}") from error
    if tensors and not any(name.startswith(_PREFIX) for name in tensors):
        raise AdapterError(
            f"{str(folder / WEIGHTS_FILE)!r} has keys without PEFT's prefix {_PREFIX!r}; PEFT would ignore them"
        )
    return config, tensors


def _misfits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    missing = [f"{name}: missing in the file" for name in wanted if name not in found]
    unexpected = [f"{name}: no place in the model" for name in found if name not in wanted]
    misshaped = [
        f"{name}: shape {tuple(tensor.shape)} in the file, {tuple(wanted[name].shape)} in the model"
        for name, tensor in found.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    return missing + unexpected + misshaped


def _refuse_to_replace(folder: Path) -> None:
    """Raise if anything but an adapter would be lost."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputError(f"{str(folder)!r} is a file, which an adapter would replace; choose another place")
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in ADAPTER_FILES)
    if foreign:
        raise OutputError(f"{str(folder)!r} holds {foreign}, which an adapter would replace; choose another")


def _card(inner: nn.Module, config: LoraConfig, adapter_name: str, tensors: Mapping[str, Tensor]) -> str:
    modules = _strengths(inner, adapter_name)
    return model_card(
        base_model=config.base_model_name_or_path,
        preset=preset_of(modules, (name for name, _ in inner.named_modules())),
        modules=modules,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
    )
