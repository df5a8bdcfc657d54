"""Find modules that their parent never calls: LoRA wraps a call, so an adapter there would do nothing.

The ViT of sam3's main branch (``vitdet.Mlp``, ``perflib/fused.py``) reads ``fc1.weight`` itself when gradients are
off, and in some commits refuses to run when they are on. sam3 0.1.4 calls everything that the component map names.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from sam3_lora.errors import TargetError, as_report

_MODES = {True: "on", False: "off"}


def refuse_uncalled(model: nn.Module, names: Iterable[str]) -> None:
    """Do nothing if every named MLP layer is called by its MLP, with gradients and without.

    Raises:
        TargetError: With the layers that are not, the reason, and how to leave them out.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in uncalled_modules(model, names).items():
        groups.setdefault((".".join(name.split(".")[-2:]), reason), []).append(name)
    problems = [
        f"{found[0]}{f' and {len(found) - 1} more' if found[1:] else ''}: {reason}, so that LoRA there would not act; "
        f"leave them out with exclude_modules=[{ending!r}]"
        for (ending, reason), found in groups.items()
    ]
    if problems:
        raise TargetError(as_report(problems))


def uncalled_modules(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return those of the named layers that their MLP does not call, each with the reason.

    One MLP of each class is run on a single row of zeros, with gradients and without; nothing in it changes, and the
    random state stays as it was. A layer whose parent is no ``mlp``, or takes more than one tensor, is not examined.
    """
    seen: dict[object, dict[str, str]] = {}
    uncalled = {}
    for name in names:
        parent_name, _, child = name.rpartition(".")
        if parent_name.rpartition(".")[2] != "mlp":
            continue
        parent = model.get_submodule(parent_name)
        kind: object = (
            id(parent) if "forward" in vars(parent) else type(parent)
        )  # or it has a forward of its own
        if kind not in seen:
            seen[kind] = _run(parent)
        if child in seen[kind]:
            uncalled[name] = seen[kind][child]
    return uncalled


def _run(mlp: nn.Module) -> dict[str, str]:
    """Return the reason for each Linear of an MLP that is not called in one of the two modes."""
    linears = {name: child for name, child in mlp.named_children() if isinstance(child, nn.Linear)}
    reasons: dict[str, str] = {}
    for gradients in _MODES if linears else ():
        called, error = _called(mlp, linears, gradients)
        if isinstance(error, TypeError) and not called:
            return {}  # it takes other arguments
        for name in linears.keys() - called:
            reasons.setdefault(name, _reason(mlp, name, gradients, error))
    return reasons


def _called(
    mlp: nn.Module, linears: dict[str, nn.Linear], gradients: bool
) -> tuple[set[str], Exception | None]:
    called: set[str] = set()
    hooks = [
        linear.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, linear in linears.items()
    ]
    first = next(iter(linears.values()))
    dtype = first.weight.dtype if first.weight.is_floating_point() else torch.float32  # it may be quantised
    row = torch.zeros(1, first.in_features, dtype=dtype, device=first.weight.device)
    try:
        with torch.random.fork_rng([row.device] if row.is_cuda else []), torch.set_grad_enabled(gradients):
            mlp(row)
    except Exception as error:  # whatever it is: what matters is who was called before
        return called, error
    finally:
        for hook in hooks:
            hook.remove()
    return called, None


def _reason(mlp: nn.Module, name: str, gradients: bool, error: Exception | None) -> str:
    owner = f"{type(mlp).__module__}.{type(mlp).__qualname__}"
    if error is not None and gradients:
        return f"{owner} cannot run with gradients ({error})"
    return f"{owner} reads {name}.weight without calling {name} when gradients are {_MODES[gradients]}"
