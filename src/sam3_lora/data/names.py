"""Which category names make poor prompts."""

from __future__ import annotations

import re

_SAYS_NOTHING = frozenset(
    """annotation background bbox category class default foreground instance item label mask misc na name none null object
    objects other others positive negative region roi roboflow segment segmentation shape supercategory target test thing
    things unknown unlabeled unlabelled void""".split()
)
_NUMBERED = re.compile(r"(?:[a-z]{1,14}[ _-]?)?\d+", re.IGNORECASE)  # 3, class_0, cls-07, label 12
_CODE = re.compile(r"(?=.*\d)[0-9a-f]{6,}(?:-[0-9a-f]+)*", re.IGNORECASE)  # a hash or UUID
_MOST_WORDS = 12  # SAM3's text encoder reads 32 tokens


def poor_prompt(name: str) -> str:
    """Return why a name makes a poor prompt, or ``""``."""
    words = name.split()
    plain = re.sub(r"[\W_\d]+", "", name).lower()
    if _NUMBERED.fullmatch(name.strip()) or _CODE.fullmatch(name.strip()):
        return "is an id, no word"
    if plain in _SAYS_NOTHING:
        return "says nothing about what is seen"
    if "_" in name or (len(words) == 1 and name.count("-") > 1):
        return "has underscores or hyphens for spaces"
    if re.search(r"[a-z]{2}[A-Z]", name):
        return "has capitals for spaces"
    if len(plain) < 2:
        return "is too short to be a word"
    if len(words) > _MOST_WORDS:
        return f"has {len(words)} words; the text encoder reads 32 tokens"
    if not name.isascii():
        return "has other letters than English, which is what SAM3 was trained on"
    return ""
