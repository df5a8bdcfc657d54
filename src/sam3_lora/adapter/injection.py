"""A fresh adapter in a base, tried on a copy without weights first."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor, nn

from sam3_lora.adapter.conversion import start_changes_base
from sam3_lora.adapter.copies import copy_model, in_same_memory, without_weights
from sam3_lora.adapter.layers import (
    adapter_tensors,
    config_of,
    fingerprint_of,
    inner_model,
    method_of,
    modules_with,
    refuse_adapted,
    remember_wrapper,
    saved_modules,
    strengths_of,
)
from sam3_lora.adapter.methods import (
    chosen_settings,
    config_for,
    lora_settings,
    method_problems,
    one_of_each_kind,
    refuse_method,
    trial_model,
)
from sam3_lora.adapter.origin import Origin, remember_origin
from sam3_lora.adapter.starting import (
    Step,
    gather,
    gradients_beside,
    smallest_side,
    start_from_directions,
    start_problems,
)
from sam3_lora.adapter.wrapper import check_name
from sam3_lora.adapter.wrapping import INIT_FROM_WEIGHTS, try_on, wrap
from sam3_lora.attention import split_attention
from sam3_lora.errors import ConfigError, TargetError, as_report
from sam3_lora.liveness import refuse_uncalled
from sam3_lora.plan import Plan, make_plan, select_modules
from sam3_lora.presets import Preset, get_preset

_LORA_FIELDS = tuple(f.name for f in dataclasses.fields(LoraConfig) if f.init)


def get_peft_sam3(
    model: nn.Module,
    preset: str | Preset | PeftConfig = "balanced",
    *,
    adapter_name: str = "default",
    init_data: Sequence[Step] | None = None,
    **overrides: Any,
) -> PeftModel:
    """Add a fresh adapter to a SAM3 image model, in place, and return the ``PeftModel`` around it.

    Attention is split, the base is frozen and the adapter's weights are fp32 even on a bf16 base. The output stays
    the same until the adapter is trained. ``.get_base_model()`` of the result is ``model`` itself with its
    official parameter names: give that one to the trainer. A copy without weights is adapted first, so that
    ``model`` is as it was if anything is raised.

    Args:
        model: A ``Sam3Image`` with its weights loaded; its ``name_or_path`` is recorded as the base model.
        preset: A name from :data:`sam3_lora.presets.PRESETS`, a preset of your own, or the settings of any method of PEFT,
            such as ``LoHaConfig(r=8, alpha=16)``: its ``target_modules`` are adapted, or else the components and kinds of
            "balanced". See docs/reference/methods.md for what works where.
        adapter_name: PEFT's name for the adapter.
        init_data: What ``init_lora_weights="eva"`` and ``"lora_ga"`` start from, as of :func:`sam3_lora.dataset_losses`.
        **overrides: ``components`` and ``kinds`` to adapt; ``r`` and ``lora_alpha``, a number or one per
            component; ``last_n_vision_blocks``, to leave out the blocks before them; and every other field of PEFT's
            ``LoraConfig``. ``train_also`` names parts that are trained whole: some of :data:`sam3_lora.train_also.WORDS`,
            where "norms" means those of the adapted components. ``target_modules`` replaces components and kinds. ``rank_pattern`` keeps ``lora_alpha / r``, unless an alpha is given as well.
            Beside settings of another method only those that choose modules.

    Raises:
        ConfigError: For unknown presets and overrides, and values out of range; all at once. For a method that does not
            work on a SAM3, or on some of the modules.
        TargetError: If a requested module does not exist, is dead, or was not wrapped as requested.
        AdapterError: If the model has an adapter already, or the name cannot be one.
    """
    refuse_adapted(model)
    check_name(model, adapter_name)
    if isinstance(preset, PeftConfig):
        refuse_method(preset)
    if isinstance(preset, LoraConfig):
        overrides = {**lora_settings(preset), **overrides}
        adapted = _add_lora(model, get_preset("balanced"), adapter_name, overrides, init_data)
    elif isinstance(preset, PeftConfig):
        if init_data:
            raise ConfigError("init_data is for LoRA with init_lora_weights='eva' or 'lora_ga'")
        adapted = _add_other_method(model, preset, adapter_name, overrides)
    else:
        preset = get_preset(preset) if isinstance(preset, str) else preset
        adapted = _add_lora(model, preset, adapter_name, overrides, init_data)
    remember_wrapper(adapted)
    return adapted


def _add_lora(
    model: nn.Module,
    preset: Preset,
    adapter_name: str,
    overrides: Mapping[str, Any],
    init_data: Sequence[Step] | None,
) -> PeftModel:
    init = overrides.get("init_lora_weights")
    if problems := start_problems(init, from_data=bool(init_data)):
        raise ConfigError(as_report(problems))
    trial = split_attention(without_weights(model))
    plan = make_plan((name for name, _ in trial.named_modules()), preset, overrides, _LORA_FIELDS)
    _refuse_start(trial, plan)
    sample = _one_of_each_kind(trial, plan)
    _check_wrapped(try_on(trial, _lora_config(sample), adapter_name), adapter_name, sample)
    refuse_uncalled(model, plan.modules)

    if "base_model_name_or_path" in plan.lora_config:
        model.name_or_path = plan.lora_config["base_model_name_or_path"]
    origin = Origin(fingerprint_of(model))  # now: PiSSA and its like change the base
    config, gathered = _lora_config(plan), {}
    if init_data:  # on a copy: whatever the data do, the model is as it was
        gathered = gather(init, split_attention(copy_model(model, in_same_memory)), config, init_data)
    split = split_attention(model)
    with gradients_beside(split, gathered if init == "lora_ga" else {}):
        adapted = wrap(split, config, adapter_name)
    _check_wrapped(adapted, adapter_name, plan)
    if init == "eva":
        start_from_directions(adapted, adapter_name, gathered)
    remember_origin(
        adapted, adapter_name, dataclasses.replace(origin, initial=_initial(adapted, adapter_name))
    )
    return adapted


def _add_other_method(
    model: nn.Module, config: PeftConfig, adapter_name: str, overrides: Mapping[str, Any]
) -> PeftModel:
    split = split_attention(copy_model(model, in_same_memory))
    settings = {**chosen_settings(config), **overrides}
    names = (name for name, _ in split.named_modules())
    modules, saved = select_modules(names, get_preset("balanced"), settings)
    sample = one_of_each_kind(split, modules)
    _refuse_failing(trial_model(split, sample), split, config_for(config, sample, ()), adapter_name, sample)
    refuse_uncalled(model, modules)
    fingerprint = fingerprint_of(model)
    adapted = wrap(split_attention(model), config_for(config, modules, saved), adapter_name)
    _check_modules(adapted, adapter_name, modules, saved)
    remember_origin(adapted, adapter_name, Origin(fingerprint))
    return adapted


def _refuse_failing(
    trial: nn.Module, base: nn.Module, config: PeftConfig, adapter_name: str, modules: Collection[str]
) -> None:
    """Raise if a method does not do on one module of each kind what an adapter must do."""
    with torch.random.fork_rng(devices=[]):
        adapted = try_on(trial, config, adapter_name).eval()
        try:
            problems = method_problems(adapted, base, modules)
        except Exception as error:  # whatever PEFT's code for the method meets
            problems = [f"{type(error).__name__}: {error}"]
    if problems:
        raise ConfigError(f"{method_of(config)} does not work on these modules: {as_report(problems)}")


def _refuse_start(model: nn.Module, plan: Plan) -> None:
    """Raise if the adapter is to start from weights, and PEFT cannot take those apart; the trial has none to try it on."""
    start = plan.lora_config.get("init_lora_weights")
    if not str(start).startswith(INIT_FROM_WEIGHTS):
        return
    problems = []
    for name, strength in plan.modules.items():
        module: Any = model.get_submodule(name)
        if not isinstance(module, nn.Linear):
            problems.append(f"{name}: is no Linear; leave out kind 'conv'")
        elif smallest_side(start, strength.r) > min(module.weight.shape):
            half = "half " if start == "lora_ga" else ""
            problems.append(
                f"{name}: r = {strength.r} is more than {half}its smaller side, {min(module.weight.shape)}"
            )
    if problems:
        raise ConfigError(
            f"init_lora_weights={start!r} cannot start from these weights: {as_report(problems)}"
        )


def _initial(adapted: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """Return a copy of the adapter's tensors if its start changed the base, which saving must undo."""
    if not start_changes_base(config_of(inner_model(adapted), adapter_name)):
        return {}
    return {name: t.detach().cpu().clone() for name, t in adapter_tensors(adapted, adapter_name).items()}


def _one_of_each_kind(model: nn.Module, plan: Plan) -> Plan:
    """Return the plan for the first module of each class, shape and strength: PEFT refuses all of a kind or none."""
    kinds: dict[Any, str] = {}
    for name, strength in plan.modules.items():
        module = model.get_submodule(name)
        shapes = tuple(p.shape for p in module.parameters(recurse=False))
        kinds.setdefault((type(module), shapes, strength), name)
    modules = {name: plan.modules[name] for name in kinds.values()}
    chosen = {
        "target_modules": "|".join(map(re.escape, modules)),
        "rank_pattern": {re.escape(name): strength.r for name, strength in modules.items()},
        "alpha_pattern": {re.escape(name): strength.lora_alpha for name, strength in modules.items()},
    }
    return Plan(modules, {**plan.lora_config, **chosen}, plan.saved)


def _lora_config(plan: Plan) -> LoraConfig:
    try:
        return LoraConfig(**plan.lora_config)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"PEFT refuses these settings: {error}") from error


def _check_wrapped(adapted: PeftModel, adapter_name: str, plan: Plan) -> None:
    """Compare what PEFT wrapped, and how strongly, with the plan."""
    found = strengths_of(inner_model(adapted), adapter_name)
    _check_modules(
        adapted,
        adapter_name,
        plan.modules,
        plan.saved,
        [
            f"{name}: {found[name]}, asked for {wanted}"
            for name, wanted in plan.modules.items()
            if found.get(name, wanted) != wanted
        ],
    )


def _check_modules(
    adapted: PeftModel,
    adapter_name: str,
    modules: Collection[str],
    saved: Collection[str],
    problems: Sequence[str] = (),
) -> None:
    inner = inner_model(adapted)
    found, whole = modules_with(inner, adapter_name), saved_modules(inner)
    problems = [
        *problems,
        *(f"{name}: not wrapped" for name in modules if name not in found),
        *(f"{name}: wrapped without being asked for" for name in found if name not in modules),
        *(f"{name}: not trained whole" for name in saved if name not in whole),
        *(f"{name}: trained whole without being asked for" for name in whole if name not in saved),
    ]
    if problems:
        raise TargetError(f"PEFT did not wrap the modules as requested: {as_report(problems)}")
