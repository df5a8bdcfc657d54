"""Classes of the shape that sam3's main branch has since SAM 3.1, and the tiny model made of them.

Written for these tests from the behaviour of facebookresearch/sam3 at 4621b7a (``model_misc.py``, ``vitdet.py``,
``perflib/fused.py``); that code itself is not used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MainAttention(nn.Module):
    """Fused attention that is no ``nn.MultiheadAttention``."""

    def __init__(self, official: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = official.embed_dim, official.num_heads
        self.dropout, self.batch_first = official.dropout, official.batch_first
        self.in_proj_weight, self.in_proj_bias = official.in_proj_weight, official.in_proj_bias
        self.out_proj = official.out_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
    ) -> tuple[Tensor, None]:
        if self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        output, _ = F.multi_head_attention_forward(
            query, key, value, self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias, None, None,
            False, self.dropout, self.out_proj.weight, self.out_proj.bias, training=self.training,
            key_padding_mask=key_padding_mask, need_weights=False, attn_mask=attn_mask,
        )  # fmt: skip
        return (output.transpose(0, 1) if self.batch_first else output), None


class MainMlp(nn.Module):
    """The ViT's MLP: without gradients it multiplies by ``fc1.weight`` itself, in bfloat16."""

    def __init__(self, official: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = official.fc1, official.act, official.fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activated(x))

    def activated(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.act(self.fc1(x))
        weight, bias = self.fc1.weight.detach().bfloat16(), self.fc1.bias.detach().bfloat16()
        return self.act(F.linear(x.bfloat16(), weight, bias))


class EarlierMainMlp(MainMlp):
    """The same in earlier commits, where it does not run with gradients at all."""

    def activated(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise ValueError("Expected grad to be disabled.")
        return super().activated(x)


def with_main_attention(model: nn.Module) -> nn.Module:
    """Give every fused attention of a model the class of the main branch, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.MultiheadAttention):
                setattr(parent, name, MainAttention(child))
    return model


def with_main_mlp(model: nn.Module, cls: type[MainMlp] = MainMlp) -> nn.Module:
    """Give every MLP of the ViT a class of the main branch, in place."""
    for block in model.backbone.vision_backbone.trunk.blocks:
        block.mlp = cls(block.mlp)
    return model
