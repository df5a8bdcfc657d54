"""The formats that can be converted, and how a source is recognised as one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, Protocol

from sam3_lora.data.convert import coco_layouts, cvat, hugging_face, labelme, masks, via, via_files, voc, yolo
from sam3_lora.data.convert.items import Source
from sam3_lora.data.convert.report import Report
from sam3_lora.data.convert.tree import Tree
from sam3_lora.errors import DataError, did_you_mean


class Plan(Protocol):
    """Lists the images of a source with their labels; the class name is that of labels that have none."""

    def __call__(self, tree: Tree, report: Report, class_name: str | None) -> Source: ...


class Format(NamedTuple):
    """One format: what it needs to be recognised, in words and as a function that says what was seen, and its plan."""

    needs: str
    recognise: Callable[[Tree], str]
    plan: Plan


def _never(tree: Tree) -> str:
    return ""


#: By the name that ``--from`` takes.
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "huggingface": Format(
            "dataset_dict.json or dataset_info.json with *.arrow", hugging_face.recognise, hugging_face.plan
        ),
        "coco": Format("a .json with 'images' and 'annotations'", coco_layouts.recognise, coco_layouts.plan),
        "labelme": Format("a .json with 'shapes' for each image", labelme.recognise, labelme.plan),
        "via": Format("a VIA project (.json), or its export as .json or .csv", via_files.recognise, via.plan),
        "cvat": Format("an .xml with <annotations>", cvat.recognise, cvat.plan),
        "voc": Format(
            "an .xml with <annotation> for each image, or SegmentationClass/", voc.recognise, voc.plan
        ),
        "yolo": Format(
            "data.yaml with 'names', or a .txt of numbers for each image", yolo.recognise, yolo.plan
        ),
        "masks": Format("masks/ beside the images, or *_mask.png", masks.recognise, masks.plan),
        **{kind: Format("only with --from", _never, partial(masks.plan, kind=kind)) for kind in masks.KINDS},
    }
)


def recognised(tree: Tree, wanted: str | None) -> tuple[str, str]:
    """Return the name of the format and what showed it.

    Masks belong to other formats too, so they are a format only where there is no other.

    Args:
        wanted: The format that the user named, or None to look.

    Raises:
        DataError: If the name is unknown, or nothing or several formats are seen.
    """
    if wanted is not None:
        if wanted not in FORMATS:
            raise DataError(
                f"unknown format {wanted!r}{did_you_mean(wanted, FORMATS)} Known: {', '.join(FORMATS)}"
            )
        return wanted, "named by the user"
    seen: dict[str, str] = {}
    for name, known in FORMATS.items():
        if (name != "masks" or not seen) and (evidence := known.recognise(tree)):
            seen[name] = evidence
    if len(seen) == 1:
        return next(iter(seen.items()))
    if seen:
        shown = "".join(f"\n  {name}: {evidence}" for name, evidence in seen.items())
        raise DataError(
            f"{tree.root} holds labels of {len(seen)} formats:{shown}\nSay which one with --from."
        )
    raise DataError(_nothing_known(tree))


def _nothing_known(tree: Tree) -> str:
    suffixes: dict[str, int] = {}
    for path in tree.files:
        suffixes[path.suffix.lower() or "no suffix"] = suffixes.get(path.suffix.lower() or "no suffix", 0) + 1
    most = sorted(suffixes.items(), key=lambda item: (-item[1], item[0]))[:8]
    seen = ", ".join(f"{count} {suffix}" for suffix, count in most) or "no files"
    lines = [f"{tree.root} holds no labels that are known; seen: {seen}"]
    lines += [f"  {reason}" for reason in tree.broken[:5]]
    lines += [
        "Known:",
        *(f"  {name}: {known.needs}" for name, known in FORMATS.items() if known.recognise is not _never),
    ]
    return "\n".join(lines)
