"""The parts of SAM3 that LoRA can adapt, as plain data: component -> kind -> full-match pattern.

The names are those of sam3 0.1.4 after :func:`sam3_lora.split_attention`. The patterns are disjoint, and
together with the exclusions below they name every Linear and Conv2d of the image model except
``trunk.patch_embed.proj``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Literal, get_args

from sam3_lora.errors import ConfigError, TargetError, as_report, did_you_mean

# Raise it when a module changes its component or kind, or enters or leaves the map: the words of a saved adapter's
# settings then stand for other modules. The golden list in tests/golden says which modules a version has.
COMPONENT_MAP_VERSION = 1

Component = Literal[
    "vision_encoder",
    "text_encoder",
    "geometry_encoder",
    "detr_encoder",
    "detr_decoder",
    "segmentation_head",
    "scoring",
]
Kind = Literal["attention", "mlp", "heads", "proj", "conv"]

COMPONENTS: tuple[Component, ...] = get_args(Component)
KINDS: tuple[Kind, ...] = get_args(Kind)

_SPLIT = r"\.(q|k|v|out)_proj"
_NECK = r"backbone\.vision_backbone\.convs"
_TEXT_BLOCK = r"backbone\.language_backbone\.encoder\.transformer\.resblocks\.\d+"

PATTERNS: Mapping[Component, Mapping[Kind, str]] = MappingProxyType(
    {
        "vision_encoder": {
            "attention": r"backbone\.vision_backbone\.trunk\.blocks\.\d+\.attn\.(qkv|proj)",
            "mlp": r"backbone\.vision_backbone\.trunk\.blocks\.\d+\.mlp\.fc[12]",
            "conv": _NECK + r"\.\d+\.(conv_1x1|conv_3x3)",
        },
        "text_encoder": {
            "attention": _TEXT_BLOCK + r"\.attn" + _SPLIT,
            "mlp": _TEXT_BLOCK + r"\.mlp\.(c_fc|c_proj)",
            "proj": r"backbone\.language_backbone\.resizer",
        },
        "geometry_encoder": {
            "attention": r"geometry_encoder\.encode\.\d+\.(self_attn|cross_attn_image)" + _SPLIT,
            "mlp": r"geometry_encoder\.encode\.\d+\.linear[12]",
            "proj": r"geometry_encoder\.((points|boxes)_(direct|pos_enc)_project|points_pool_project"
            r"|final_proj)",
            "conv": r"geometry_encoder\.boxes_pool_project",
        },
        "detr_encoder": {
            "attention": r"transformer\.encoder\.layers\.\d+\.(self_attn|cross_attn_image)" + _SPLIT,
            "mlp": r"transformer\.encoder\.layers\.\d+\.linear[12]",
        },
        "detr_decoder": {
            "attention": r"transformer\.decoder\.layers\.\d+\.(self_attn|ca_text|cross_attn)" + _SPLIT,
            "mlp": r"transformer\.decoder\.layers\.\d+\.linear[12]",
            "heads": r"transformer\.decoder\.(bbox_embed|presence_token_head|ref_point_head"
            r"|boxRPB_embed_[xy])\.layers\.\d+",
        },
        "segmentation_head": {
            "attention": r"segmentation_head\.cross_attend_prompt" + _SPLIT,
            "mlp": r"segmentation_head\.mask_predictor\.mask_embed\.layers\.\d+",
            "conv": r"segmentation_head\.(pixel_decoder\.conv_layers\.\d+|(instance|semantic)_seg_head)",
        },
        "scoring": {
            "mlp": r"dot_prod_scoring\.prompt_mlp\.layers\.\d+",
            "proj": r"dot_prod_scoring\.(prompt_proj|hs_proj)",
        },
    }
)

# What the names of all parameters of a component begin with.
ROOTS: Mapping[Component, tuple[str, ...]] = MappingProxyType(
    {
        "vision_encoder": ("backbone.vision_backbone.trunk.", "backbone.vision_backbone.convs."),
        "text_encoder": ("backbone.language_backbone.",),
        "geometry_encoder": ("geometry_encoder.",),
        "detr_encoder": ("transformer.encoder.",),
        "detr_decoder": ("transformer.decoder.",),
        "segmentation_head": ("segmentation_head.",),
        "scoring": ("dot_prod_scoring.",),
    }
)

_MOST_LISTED = 12  # names in an error

# No output of the full-size model passes a gradient to these: an adapter there would train nothing.
DEAD_MODULES: Mapping[str, str] = MappingProxyType(
    {
        _NECK + r"\.3\.(conv_1x1|conv_3x3)": "the backbone drops the lowest-resolution level (scalp=1)",
        r"segmentation_head\.pixel_decoder\.conv_layers\.2": "three levels need only two upsampling steps",
        r"geometry_encoder\.points_(direct|pool|pos_enc)_project": "detection has no point prompts",
    }
)
UNSUPPORTED_MODULES: Mapping[str, str] = MappingProxyType(
    {_NECK + r"\.\d+\.dconv_2x2(_[01])?": "PEFT has no LoRA for ConvTranspose2d"}
)

# Parameters that no loss reaches: DistributedDataParallel must be told to look for them where they are trained, as whole
# modules or biases. Every other parameter of the model takes part in every step, with a gradient of zero at times.
UNUSED_PARAMETERS: tuple[str, ...] = (
    _NECK + r"\.3\.(conv_1x1|conv_3x3)\.(weight|bias)",
    r"segmentation_head\.pixel_decoder\.(conv_layers|norms)\.2\.(weight|bias)",
    r"backbone\.language_backbone\.encoder\.text_projection",
)
# Without a segmentation head nothing reads the two levels of high resolution either, with LoRA on them or not.
UNUSED_WITHOUT_MASKS: tuple[str, ...] = (_NECK + r"\.[01]\..*",)
# Their gradient is zero in some steps, which is no mistake.
SOMETIMES_IDLE: Mapping[str, str] = MappingProxyType(
    {
        r"geometry_encoder\.boxes_\w+": (
            "geometry_encoder.boxes_*: trained by box prompts only, and the configs of this library give none"
        ),
        r"backbone\.vision_backbone\.trunk\..*": (
            "vision_encoder: DropPath leaves out a block now and then, which with one image a step gets no "
            "gradient in that step"
        ),
        _NECK + r".*|segmentation_head\..*|dot_prod_scoring\..*|transformer\.decoder\.bbox_embed\..*": (
            "neck, masks, scores and boxes: trained only by steps in which some prompt has an object"
        ),
    }
)


def why_excluded(module_name: str) -> str | None:
    """Return why LoRA on this module has no effect or is impossible, or ``None`` if neither is known."""
    for pattern, reason in (*DEAD_MODULES.items(), *UNSUPPORTED_MODULES.items()):
        if re.fullmatch(pattern, module_name):
            return reason
    return None


def component_of(module_name: str) -> tuple[Component, Kind] | None:
    """Return the component and kind of a module that LoRA can adapt, or ``None`` for any other name."""
    if why_excluded(module_name):
        return None
    for component, kinds in PATTERNS.items():
        for kind, pattern in kinds.items():
            if re.fullmatch(pattern, module_name):
                return component, kind
    return None


def unknown_names(word: str, names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return one problem text for each name that is not among the known ones, with the close match or a short list."""
    known = list(known)
    listed = f"; {word}s are {', '.join(known)}" if len(known) <= _MOST_LISTED else ""
    return [f"unknown {word} {n!r}{did_you_mean(str(n), known) or listed}" for n in names if n not in known]


def resolve_targets(
    module_names: Iterable[str], components: Iterable[str], kinds: Iterable[str]
) -> dict[Component, list[str]]:
    """Return the full names of the modules to adapt, per component, both in the order given.

    Dead and unsupported modules are left out. Every component must give at least one module; a kind that one
    of several components lacks is no error.

    Args:
        module_names: Names of all modules of a model with split attention, as from ``named_modules()``.
        components: Some of :data:`COMPONENTS`; a mapping ``{component: r}`` will do.
        kinds: Some of :data:`KINDS`.

    Raises:
        ConfigError: If a component or kind is unknown.
        TargetError: If a component gives no module in this model.
    """
    components, kinds = list(components), list(kinds)
    problems = unknown_names("component", components, COMPONENTS) + unknown_names("kind", kinds, KINDS)
    if problems:
        raise ConfigError(as_report(problems))
    targets: dict[Component, list[str]] = {c: [] for c in COMPONENTS if c in components}
    for name in module_names:
        place = component_of(name)
        if place is not None and place[0] in targets and place[1] in kinds:
            targets[place[0]].append(name)
    problems = [_why_empty(component, kinds) for component, names in targets.items() if not names]
    if problems:
        raise TargetError(as_report(problems))
    return targets


def _why_empty(component: Component, kinds: list[str]) -> str:
    has = tuple(PATTERNS[component])
    if not set(has) & set(kinds):
        return (
            f"{component} has nothing of kind {', '.join(map(repr, kinds))}; its kinds are {', '.join(has)}"
        )
    return f"{component}: this model has no such modules; is it a SAM3 image model with all its parts?"
