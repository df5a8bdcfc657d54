"""``train_also``: parts that are trained whole beside LoRA, by a word each, as names for PEFT's ``modules_to_save``.

Each word stands for the layers inside of a part, not for the part: sam3 calls some parts through a wrapper for activation
checkpointing, or with keywords alone, which PEFT's wrapper around a whole module cannot take. Layers that no loss
reaches are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from sam3_lora.components import Component, unknown_names

TRAIN_ALSO = "train_also"

_SPLIT = r"\.(q|k|v|out)_proj"

#: Word -> pattern of the layers it stands for; ``norms`` depends on what is adapted.
WHOLE_PARTS: Mapping[str, str] = MappingProxyType(
    {
        "scoring": r"dot_prod_scoring\.(prompt_mlp\.(layers\.\d+|out_norm)|prompt_proj|hs_proj)",
        "segmentation_head": r"segmentation_head\.(pixel_decoder\.(conv_layers|norms)\.[01]"
        r"|mask_predictor\.mask_embed\.layers\.\d+|cross_attend_prompt" + _SPLIT + r"|cross_attn_norm"
        r"|(semantic|instance)_seg_head)",
        "box_heads": r"transformer\.decoder\.(bbox_embed|ref_point_head|boxRPB_embed_[xy])\.layers\.\d+",
    }
)
NORMS: Mapping[Component, str] = MappingProxyType(
    {
        "vision_encoder": r"backbone\.vision_backbone\.trunk\.(ln_pre|blocks\.\d+\.norm[12])",
        "text_encoder": r"backbone\.language_backbone\.encoder\.(ln_final|transformer\.resblocks\.\d+\.ln_[12])",
        "geometry_encoder": r"geometry_encoder\.(norm|img_pre_norm|encode_norm|encode\.\d+\.norm[123])",
        "detr_encoder": r"transformer\.encoder\.layers\.\d+\.norm[123]",
        "detr_decoder": r"transformer\.decoder\.(norm|presence_token_out_norm|layers\.\d+\.(norm[123]|catext_norm))",
        "segmentation_head": r"segmentation_head\.(cross_attn_norm|pixel_decoder\.norms\.[01])",
        "scoring": r"dot_prod_scoring\.prompt_mlp\.out_norm",
    }
)
WORDS = (*WHOLE_PARTS, "norms")


def word_problems(value: Any) -> list[str]:
    """Return a text for each thing wrong with a value of ``train_also``."""
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, Iterable) or isinstance(words, Mapping) or not list(words):
        return [f"{TRAIN_ALSO} must be some of {', '.join(WORDS)}, got {value!r}"]
    return [f"{problem} in {TRAIN_ALSO}" for problem in unknown_names("part", words, WORDS)]


def layers_of(words: str | Iterable[str], names: Iterable[str], components: Iterable[Component]) -> list[str]:
    """Return the full names of the layers that these words stand for, in the order of the model.

    Args:
        words: Some of :data:`WORDS`.
        names: All modules of a model with split attention.
        components: What is adapted: ``norms`` are the normalisation layers of these.
    """
    words = [words] if isinstance(words, str) else list(words)
    patterns = [WHOLE_PARTS[word] for word in words if word in WHOLE_PARTS]
    patterns += [NORMS[component] for component in components if "norms" in words]
    return [name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)]
