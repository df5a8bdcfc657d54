"""How files, splits and prompts read among the facts of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sam3_lora.data.coco import Split

_SHOWN_PROMPTS = 12


def size_on_disk(file: Path) -> str:
    """Return the size of a file, such as ``552 kB``."""
    if not file.is_file():
        return "not there"
    size = file.stat().st_size
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.0f} kB"


def amount_of(split: Split) -> str:
    """Return how many images and objects a split holds; crowds are not counted."""
    return f"{len(split.images):,} images, {sum(split.objects_per_prompt.values()):,} objects"


def prompts_in_words(prompts: Sequence[str]) -> str:
    """Return the first prompts, and how many more there are."""
    more = len(prompts) - _SHOWN_PROMPTS
    return ", ".join(prompts[:_SHOWN_PROMPTS]) + (f" and {more:,} more" if more > 0 else "")
