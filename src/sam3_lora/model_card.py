"""The README of an adapter folder, which is its page on the Hub too. Plain text from plain data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from sam3_lora.components import component_of
from sam3_lora.plan import Strength

_CARD = """\
---
{base_metadata}library_name: peft
pipeline_tag: image-segmentation
{license_metadata}tags:
{base_tag}- {tag}
- sam3
---

# {method} adapter for SAM3

- Base model: {base}
- Preset: {preset}
- Parameters: {parameters}

| component | kind | modules | r | lora_alpha |
| --- | --- | ---: | ---: | ---: |
{rows}

## Load

```python
import sam3_lora

base = sam3_lora.load_base("{base_to_load}")
model = sam3_lora.load_adapter(base, "path/to/this/folder")
```

Or with PEFT alone, on a base whose attention is split:
`PeftModel.from_pretrained(sam3_lora.split_attention(base), "path/to/this/folder")`.

## License

{license_text}
"""

_SAM_LICENSE_METADATA = """\
license: other
license_name: sam-license
license_link: https://github.com/facebookresearch/sam3/blob/main/LICENSE
"""
_SAM_LICENSE = """\
This adapter holds none of the base model's weights and works only with them. SAM3 and its weights are
Meta's, under the [SAM License](https://github.com/facebookresearch/sam3/blob/main/LICENSE)."""
_TINY_LICENSE = """\
This adapter works only with the tiny base of sam3-lora, which was trained from scratch and holds none of Meta's
weights: Apache-2.0, like the library."""


def model_card(
    base_model: str | None,
    preset: str | None,
    modules: Mapping[str, Strength | None],
    parameters: int,
    method: str = "LoRA",
) -> str:
    """Return the text of the card, with the metadata that the Hub reads on top.

    Args:
        base_model: A Hub id, a path or a name; only an id goes into the metadata, which the Hub checks.
        preset: Its name, or ``None`` for a choice of the user's own.
        modules: Full name of every adapted module, with its strength if the method is LoRA.
        parameters: How many numbers the adapter holds.
        method: PEFT's name for the method.
    """
    on_hub = base_model is not None and _is_hub_id(base_model)
    groups = Counter((*(component_of(name) or ("other", "")), strength) for name, strength in modules.items())
    rows = [
        f"| {component} | {kind} | {count} | "
        + (f"{strength.r} | {strength.lora_alpha:g} |" if strength else "- | - |")
        for (component, kind, strength), count in groups.items()
    ]
    on_tiny = base_model == "tiny"
    return _CARD.format(
        license_metadata="license: apache-2.0\n" if on_tiny else _SAM_LICENSE_METADATA,
        license_text=_TINY_LICENSE if on_tiny else _SAM_LICENSE,
        base_metadata=f"base_model: {base_model}\n" if on_hub else "",
        base_tag=f"- base_model:adapter:{base_model}\n" if on_hub else "",
        base=f"`{base_model}`" if base_model else "not recorded",
        base_to_load=base_model or "facebook/sam3",
        preset=preset or "none (own choice of modules)",
        parameters=f"{parameters:,}",
        rows="\n".join(rows),
        method=method,
        tag=method.lower(),
    )


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()
