"""Exchange fused attention for four plain Linears that LoRA can wrap, and back.

``nn.MultiheadAttention`` keeps q, k and v in one parameter and reads ``out_proj.weight`` without calling
``out_proj``: LoRA on its only Linear has no effect, and PEFT's own wrapper for the whole module is wrong in
0.21.2 (huggingface/peft #3774).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3_lora.errors import TargetError, as_report

Model = TypeVar("Model", bound=nn.Module)

_IN_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class SplitAttention(nn.Module):
    """Multi-head attention that calls ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``, all ``nn.Linear``.

    The q, k and v parameters are views of the fused storage, one third each; ``out_proj`` is the same module.
    Official fused keys (``in_proj_weight``, ``in_proj_bias``) still load. The emptied fused module is kept
    aside for :func:`fuse_attention`.
    """

    def __init__(self, fused: nn.Module) -> None:
        """Take over the parameters of a fused attention module, which is left without any."""
        super().__init__()
        source: Any = fused
        self.embed_dim: int = source.in_proj_weight.shape[1]
        self.num_heads: int = source.num_heads
        self.dropout = float(getattr(source, "dropout", 0.0))
        self.batch_first = bool(getattr(source, "batch_first", False))
        for index, name in enumerate(_IN_PROJECTIONS):
            self.add_module(name, _third_as_linear(source.in_proj_weight, source.in_proj_bias, index))
        self.out_proj: nn.Module = source.out_proj
        self.train(fused.training)
        source.in_proj_weight = source.in_proj_bias = source.out_proj = None
        self._fused = [fused]  # in a list: a registered child would show in module and state dict names
        self.register_load_state_dict_pre_hook(_split_fused_keys)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Return the attended values in the layout of ``query``, and ``None`` in place of the weights.

        No official call site reads the weights. A query whose keys are all masked gets zeros before
        ``out_proj``, as in official calls with ``need_weights=False``; with weights, and in its fast path,
        torch gives NaN there.

        Args:
            query: ``(L, B, E)``, or ``(B, L, E)`` if ``batch_first``.
            key: ``(S, B, E)`` or ``(B, S, E)``.
            value: Like ``key``.
            key_padding_mask: ``(B, S)``; bool with True for keys to leave out, or float to add to the scores.
            need_weights: Accepted for the official signature; weights are never returned.
            attn_mask: ``(L, S)`` or ``(B * heads, L, S)``, bool or float as above.
            average_attn_weights: Accepted for the official signature.
            is_causal: Promise that ``attn_mask`` is the causal mask, which must be given with it.

        Raises:
            ValueError: If the input has no batch axis or a mask has another shape.
        """
        if query.dim() != 3:
            raise ValueError(
                f"attention needs a batch axis: query has shape {tuple(query.shape)}, expected 3 axes"
            )
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask, which was not given")
        q, k, v = (
            self._heads(self.get_submodule(name)(x))
            for name, x in zip(_IN_PROJECTIONS, (query, key, value), strict=True)
        )
        use_causal_kernel = is_causal and key_padding_mask is None
        mask = None if use_causal_kernel else self._score_mask(attn_mask, key_padding_mask, q, k)
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=use_causal_kernel,
        )
        batch, _, length, _ = attended.shape
        output: Tensor = self.out_proj(attended.transpose(1, 2).reshape(batch, length, self.embed_dim))
        return (output if self.batch_first else output.transpose(0, 1)), None

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}, "
            f"batch_first={self.batch_first}"
        )

    def _heads(self, projected: Tensor) -> Tensor:
        """Return ``(B, heads, length, E / heads)`` from a projection in the layout of the input."""
        if not self.batch_first:
            projected = projected.transpose(0, 1)
        batch, length, _ = projected.shape
        return projected.reshape(batch, length, self.num_heads, -1).transpose(1, 2)

    def _score_mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor
    ) -> Tensor | None:
        """Return both masks as one to add to the scores ``(B, heads, L, S)``, in the dtype of ``q``."""
        (batch, heads, length, _), keys = q.shape, k.shape[2]
        mask = None
        if attn_mask is not None:
            shared = attn_mask.dim() == 2  # by all batch entries and heads
            _check_shape("attn_mask", attn_mask, (length, keys) if shared else (batch * heads, length, keys))
            planes = (1, 1) if shared else (batch, heads)
            mask = _additive(attn_mask, q.dtype).reshape(*planes, length, keys)
        if key_padding_mask is not None:
            _check_shape("key_padding_mask", key_padding_mask, (batch, keys))
            padding = _additive(key_padding_mask, q.dtype).view(batch, 1, 1, keys)
            mask = padding if mask is None else mask + padding
        return mask


def split_attention(model: Model) -> Model:
    """Replace all fused attention below ``model`` by :class:`SplitAttention`, in place, and return ``model``.

    Fused attention is found by structure (``in_proj_weight`` and ``out_proj``), whatever its class. No
    tensor is copied, outputs stay the same up to rounding, and modules that are split already stay as they
    are. Optimizers made before still hold the fused parameters: split first.

    Raises:
        TargetError: If a module uses what :class:`SplitAttention` does not offer; nothing is changed then.
    """
    _raise_problems("split", model, _is_fused, _why_not_split)
    _replace(model, _is_fused, SplitAttention)
    return model


def fuse_attention(model: Model) -> Model:
    """Put the official module back for every :class:`SplitAttention`, in place, and return ``model``.

    The state dict has the official keys, order and shapes again. The current values of q, k and v are joined
    in new parameters; ``out_proj`` keeps its own.

    Raises:
        TargetError: If a projection still carries an adapter; nothing is changed then.
    """
    _raise_problems("fuse", model, _is_split, _why_not_fuse)
    _replace(model, _is_split, _fused_again)
    return model


def _is_fused(module: nn.Module) -> bool:
    return hasattr(module, "in_proj_weight") and hasattr(module, "out_proj")


def _is_split(module: nn.Module) -> bool:
    return isinstance(module, SplitAttention)


def _third_as_linear(weight: nn.Parameter, bias: nn.Parameter | None, index: int) -> nn.Linear:
    """Return a Linear whose parameters are views of the third ``index`` of the fused ones."""
    linear = nn.Linear.__new__(
        nn.Linear
    )  # its constructor would draw values for all parameters, to be thrown away
    nn.Module.__init__(linear)
    linear.in_features = linear.out_features = weight.shape[1]
    linear.weight = nn.Parameter(weight.detach().chunk(3)[index], requires_grad=weight.requires_grad)
    third = (
        None
        if bias is None
        else nn.Parameter(bias.detach().chunk(3)[index], requires_grad=bias.requires_grad)
    )
    linear.register_parameter("bias", third)
    return linear


def _fused_again(module: nn.Module) -> nn.Module:
    split: Any = module
    fused: Any = split._fused[0]
    fused.in_proj_weight = _joined([split.q_proj.weight, split.k_proj.weight, split.v_proj.weight])
    if split.q_proj.bias is not None:
        fused.in_proj_bias = _joined([split.q_proj.bias, split.k_proj.bias, split.v_proj.bias])
    fused.out_proj = split.out_proj
    in_same_mode: nn.Module = fused.train(split.training)
    return in_same_mode


def _joined(thirds: list[nn.Parameter]) -> nn.Parameter:
    joined = torch.cat([third.detach() for third in thirds])
    return nn.Parameter(joined, requires_grad=any(third.requires_grad for third in thirds))


def _split_fused_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Turn official fused entries of one module into q, k, v entries, before it loads them."""
    for kind in ("weight", "bias"):
        fused = state_dict.pop(f"{prefix}in_proj_{kind}", None)
        if fused is not None:
            for name, third in zip(_IN_PROJECTIONS, fused.chunk(3), strict=True):
                state_dict[f"{prefix}{name}.{kind}"] = third


def _why_not_split(module: nn.Module) -> list[str]:
    source: Any = module
    weight = source.in_proj_weight
    if weight is None:
        return ["kdim or vdim differs from embed_dim, so q, k and v are separate already"]
    problems = []
    if weight.shape[0] != 3 * weight.shape[1]:
        problems.append(f"in_proj_weight has shape {tuple(weight.shape)}, expected (3 * E, E)")
    if getattr(source, "bias_k", None) is not None or getattr(source, "bias_v", None) is not None:
        problems.append("add_bias_kv=True is not supported")
    if getattr(source, "add_zero_attn", False):
        problems.append("add_zero_attn=True is not supported")
    if not isinstance(source.out_proj, nn.Linear):
        problems.append(f"out_proj is a {type(source.out_proj).__name__}; split before adapters are added")
    return problems


def _why_not_fuse(module: nn.Module) -> list[str]:
    return [
        f"{name} carries an adapter; merge or unload it first"
        for name in (*_IN_PROJECTIONS, "out_proj")
        if not isinstance(module.get_submodule(name), nn.Linear)
    ]


def _raise_problems(
    verb: str,
    model: nn.Module,
    wanted: Callable[[nn.Module], bool],
    why_not: Callable[[nn.Module], list[str]],
) -> None:
    if wanted(model):
        raise TargetError(
            f"cannot {verb} a lone {type(model).__name__} in place; pass the module that holds it"
        )
    found = [(name, module) for name, module in model.named_modules() if wanted(module)]
    problems = [f"{name}: {problem}" for name, module in found for problem in why_not(module)]
    if problems:
        raise TargetError(f"cannot {verb} the attention of this model: {as_report(problems)}")


def _replace(
    model: nn.Module, wanted: Callable[[nn.Module], bool], convert: Callable[[nn.Module], nn.Module]
) -> None:
    """Put ``convert(child)`` in the place of every wanted child; one shared by two parents stays shared."""
    converted: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        # named_children() would drop the second name of a shared child.
        for name, child in list(parent._modules.items()):
            if child is not None and wanted(child):
                if child not in converted:
                    converted[child] = convert(child)
                setattr(parent, name, converted[child])


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    return mask.to(dtype)


def _check_shape(name: str, mask: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(mask.shape) != wanted:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, expected {wanted}")
