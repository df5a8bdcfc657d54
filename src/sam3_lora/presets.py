"""Named choices of what to adapt and how strongly, and how overrides change them. Plain data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from types import MappingProxyType
from typing import Any

from sam3_lora.components import COMPONENTS, KINDS, Component, Kind, unknown_names
from sam3_lora.errors import ConfigError, as_report
from sam3_lora.renamed import RENAMED_SETTINGS

ALPHA_PER_R = (
    2  # lora_alpha / r, the factor on the weight change: the same everywhere, unless it is overridden
)

OVERRIDES = ("components", "kinds", "r", "lora_alpha")  # the keywords that change the preset itself


@dataclass(frozen=True)
class Preset:
    """What to adapt and how strongly.

    Raises:
        ConfigError: If a name is unknown or a number out of range; it lists every such problem.
    """

    reason: str
    components: Mapping[Component, int]  # component -> r
    kinds: tuple[Kind, ...]
    lora_alpha: Mapping[Component, float] = field(
        default_factory=dict
    )  # component -> alpha, 2 r where none is given
    last_n_vision_blocks: int | None = None  # None: all of them

    def __post_init__(self) -> None:
        problems = [
            *_name_problems("component", self.components, COMPONENTS),
            *_name_problems("kind", self.kinds, KINDS),
            *number_problems(self.components, self.lora_alpha),
            *_last_blocks_problems(self),
        ]
        if problems:
            raise ConfigError(as_report(problems))
        for name in ("components", "lora_alpha"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def alpha_of(self, component: Component) -> float:
        """Return the ``lora_alpha`` of a component of this preset."""
        return self.lora_alpha.get(component, ALPHA_PER_R * self.components[component])


def _name_problems(word: str, names: Iterable[Any], known: tuple[str, ...]) -> list[str]:
    names = list(names)
    if not names:
        return [f"no {word} is given; {word}s are {', '.join(known)}"]
    repeated = [n for n in known if names.count(n) > 1]
    return unknown_names(word, names, known) + [
        f"{word} {n!r} is given {names.count(n)} times" for n in repeated
    ]


def number_problems(r: Mapping[Any, Any], lora_alpha: Mapping[Any, Any]) -> list[str]:
    """Return a problem for each ``r`` or ``lora_alpha`` out of range, which begins with its key."""
    problems = [
        f"{component}: r must be a whole number of 1 or more, got {value!r}; 8 to 32 is usual"
        for component, value in r.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < 1
    ]
    return problems + [
        f"{component}: lora_alpha must be a positive number, got {value!r}; {ALPHA_PER_R} x r is usual"
        for component, value in lora_alpha.items()
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or value <= 0
    ]


def _last_blocks_problems(preset: Preset) -> list[str]:
    value = preset.last_n_vision_blocks
    if value is None:
        return []
    problems = []
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        problems.append(f"last_n_vision_blocks must be a whole number of 1 or more, got {value!r}")
    if "vision_encoder" not in preset.components:
        problems.append("last_n_vision_blocks has no effect: vision_encoder is not among the components")
    return problems


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "minimal": Preset(
            reason="the DETR decoder alone: few images, or close to photographs",
            components={"detr_decoder": 8},
            kinds=("attention", "mlp"),
        ),
        "balanced": Preset(
            reason="attention of encoders and decoder: a good first choice",
            components={"vision_encoder": 8, "text_encoder": 8, "detr_encoder": 16, "detr_decoder": 16},
            kinds=("attention",),
        ),
        "full": Preset(
            reason="balanced and the MLPs, at a higher rank: many images",
            components={"vision_encoder": 12, "text_encoder": 12, "detr_encoder": 24, "detr_decoder": 24},
            kinds=("attention", "mlp"),
        ),
        "light": Preset(
            # Gradients end after 4 of the 32 blocks of the ViT, which is most of a step's work and activations.
            reason="balanced for a GPU of 8 GB: the last 4 blocks of the vision encoder, no text encoder",
            components={"vision_encoder": 8, "detr_encoder": 8, "detr_decoder": 8},
            kinds=("attention",),
            last_n_vision_blocks=4,
        ),
        "vision": Preset(
            reason="images of another kind, such as X-ray or from above; words that SAM3 knows",
            components={"vision_encoder": 16},
            kinds=("attention",),
        ),
        "text": Preset(
            reason="words that SAM3 does not know, for things that it can see",
            components={"text_encoder": 8},
            kinds=("attention",),
        ),
        "detr": Preset(
            # As cheap as minimal but for the layers of the encoder: no gradient runs into the ViT.
            reason="which objects a prompt means, and where they are; both encoders stay as they are",
            components={"detr_encoder": 16, "detr_decoder": 16},
            kinds=("attention", "mlp"),
        ),
        "segmentation_head": Preset(
            reason="the right objects are found, and their outlines are wrong",
            components={"segmentation_head": 16},
            kinds=("attention", "mlp", "conv"),
        ),
        "tracker_safe": Preset(
            # The tracker reads the features of the same ViT (sam3_video_base.py): adapters there would move them.
            reason="for video: balanced without the vision encoder, so that the tracker sees what it was trained on",
            components={"text_encoder": 8, "detr_encoder": 16, "detr_decoder": 16},
            kinds=("attention",),
        ),
    }
)

#: Trainable parameters on the full-size model; tests/test_adapter.py counts them.
TRAINABLE_PARAMETERS: Mapping[str, int] = MappingProxyType(
    {
        "minimal": 516_096,
        "balanced": 4_128_768,
        "full": 14_893_056,
        "light": 688_128,
        "vision": 3_145_728,
        "text": 1_572_864,
        "detr": 1_867_776,
        "segmentation_head": 151_568,
        "tracker_safe": 2_555_904,
    }
)


def get_preset(name: str) -> Preset:
    """Return the preset of that name.

    Raises:
        ConfigError: If there is none; with the close match, or the list.
    """
    problems = unknown_names("preset", [name], PRESETS)
    if problems:
        raise ConfigError(problems[0])
    return PRESETS[name]


def override_preset(preset: Preset, overrides: Mapping[str, Any], also_known: Iterable[str] = ()) -> Preset:
    """Return a preset with the given ``components``, ``kinds``, ``r`` and ``lora_alpha``.

    ``r`` and ``lora_alpha`` are one number for all components, or a mapping for some of them. A component
    that ``preset`` lacks starts from its smallest ``r``. Where no ``lora_alpha`` is given, a new ``r``
    brings ``2 r``.

    Args:
        preset: Where to start; stays as it is.
        overrides: The keywords of :data:`OVERRIDES`, and others that are only checked against ``also_known``.
        also_known: Keywords that somebody else takes care of, such as the other fields of PEFT's
            ``LoraConfig``.

    Raises:
        ConfigError: With every unknown keyword, unknown name and wrong number at once.
    """
    problems = override_problems(preset, overrides, also_known)
    if problems:
        raise ConfigError(as_report(problems))
    r, kinds, alpha = _overridden(preset, overrides)
    return dataclasses.replace(preset, components=r, kinds=kinds, lora_alpha=alpha)


def override_problems(
    preset: Preset, overrides: Mapping[str, Any], also_known: Iterable[str] = ()
) -> list[str]:
    """Return what :func:`override_preset` would complain about, a text for each."""
    r, kinds, alpha = _overridden(preset, overrides)
    components = _as_tuple(overrides.get("components", tuple(preset.components)))
    return [
        *_unknown_keywords(overrides, (*OVERRIDES, *also_known)),
        *_name_problems("component", components, COMPONENTS),
        *_name_problems("kind", kinds, KINDS),
        *_strays("r", _per_component(overrides.get("r"), components), r),
        *_strays("lora_alpha", _per_component(overrides.get("lora_alpha"), components), r),
        *number_problems(r, alpha),
    ]


def _overridden(
    preset: Preset, overrides: Mapping[str, Any]
) -> tuple[dict[Any, Any], tuple[Any, ...], dict[Any, Any]]:
    """Return r by component, kinds, and alpha by component where it is not 2 r; all of them unchecked."""
    components = _as_tuple(overrides.get("components", tuple(preset.components)))
    given_r = _per_component(overrides.get("r"), components)
    given_alpha = _per_component(overrides.get("lora_alpha"), components)
    lowest = min(preset.components.values())
    r = {c: given_r.get(c, preset.components.get(c, lowest)) for c in components}
    kept_alpha = {c: a for c, a in preset.lora_alpha.items() if c in r and c not in given_r}
    alpha = kept_alpha | {c: a for c, a in given_alpha.items() if c in r}
    return r, _as_tuple(overrides.get("kinds", preset.kinds)), alpha


def _unknown_keywords(overrides: Iterable[str], known: tuple[str, ...]) -> list[str]:
    renamed = {name: text for name in overrides if (text := RENAMED_SETTINGS.get(name.removeprefix("lora.")))}
    others = [name for name in overrides if name not in renamed]
    return [f"unknown override {name!r}; {text}" for name, text in renamed.items()] + unknown_names(
        "override", others, known
    )


def _as_tuple(value: Any) -> tuple[Any, ...]:
    values = value if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    return tuple(v if isinstance(v, Hashable) else repr(v) for v in values)


def _per_component(value: Any, components: Iterable[Any]) -> dict[Any, Any]:
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else dict.fromkeys(components, value)


def _strays(word: str, given: Mapping[Any, Any], adapted: Mapping[Any, Any]) -> list[str]:
    """Return a problem for each component that has a number and is not adapted."""
    strays = [c for c in given if c not in adapted]
    unknown = unknown_names(f"component in {word}", strays, COMPONENTS)
    idle = [c for c in strays if c in COMPONENTS]
    return unknown + [f"{word} is given for {c!r}, which is not adapted; add it to components" for c in idle]
