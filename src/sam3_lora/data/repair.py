"""A repaired copy of a dataset: what is certain is put right, what is not is left out, and all of it is told."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sam3_lora.data.check import DatasetReport, examine_dataset
from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.problems import Findings, Kind, Problem, describe
from sam3_lora.data.repair_images import ImageCopier, RepairedImage
from sam3_lora.data.repair_labels import Box, BoxForm, box_forms, repaired_labels, scaled_labels
from sam3_lora.data.stream import read_entries
from sam3_lora.errors import DataError, OutputError, did_you_mean

OnProgress = Callable[[str, int, int], None]

#: What people call splits.
_ALSO_CALLED = {"valid": ("val", "validation", "dev"), "train": ("training",)}


@dataclass(frozen=True)
class Repair:
    """What was done for a repaired copy, and what is left to be said of it."""

    output: Path
    done: tuple[Problem, ...]
    report: DatasetReport

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        done = [{key: value for key, value in asdict(each).items() if key in _SHOWN} for each in self.done]
        return {"output": str(self.output), "done": done, **self.report.as_dict()}


_SHOWN = ("kind", "count", "examples")


def repair_dataset(
    folder: str | Path,
    output: str | Path,
    splits: Sequence[str] = ("train", "valid"),
    *,
    train_split: str | None = "train",
    masks: bool | None = True,
    on_progress: OnProgress | None = None,
) -> Repair:
    """Write a copy of a dataset that passes the check; the dataset itself is only read.

    The copy appears whole, by one rename. Images are copied, so that changes to the one never reach the other.

    Args:
        folder: The dataset, with ``splits``, ``train_split`` and ``masks`` as for ``check_dataset``.
        output: The copy, which must not exist yet and not lie in the dataset.
        on_progress: Called after each image.

    Raises:
        DataError: If a file cannot be read, or what is left does not pass; nothing is written then.
        OutputError: If ``output`` exists, lies in the dataset or cannot be written.
    """
    folder, output = Path(folder), Path(output)
    show = on_progress or (lambda what, done, total: None)
    check_repair_output(folder, output)
    found = Findings()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
        try:
            draft.chmod(0o755)
            for name in splits:
                _SplitRepair(_find_split(folder, name, found), draft / name, masks, found).run(show)
            report = examine_dataset(draft, splits, train_split=train_split, masks=masks)
            if report.errors:
                left = describe(f"{folder} cannot be repaired, as this would be left", report.errors)
                raise DataError(left.replace(str(draft), str(output)))
            draft.rename(output)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror}; choose another folder") from error
    return Repair(output, tuple(found.problems()), _moved(report, draft, output))


def _moved(report: DatasetReport, draft: Path, output: Path) -> DatasetReport:
    """Return the report with the place that the draft has now."""
    problems = tuple(
        Problem(
            p.kind, p.count, tuple(e.replace(str(draft), str(output)) for e in p.examples), p.fix, p.level
        )
        for p in report.problems
    )
    return DatasetReport(output, problems, report.summary)


def check_repair_output(folder: Path, output: Path) -> None:
    """Do nothing if ``output`` can be a repaired copy of ``folder``.

    Raises:
        DataError: If there is no dataset.
        OutputError: If ``output`` exists or lies in the dataset.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}")
    if output.exists() or output.is_symlink():
        raise OutputError(f"{output} exists already; name a folder that does not")
    if folder.resolve() in (output.resolve(), *output.resolve().parents):
        raise OutputError(f"{output} lies in the dataset, which is left as it is; name another folder")


def _find_split(folder: Path, name: str, found: Findings) -> Path:
    """Return the annotation file of a split, also where folder or file are called otherwise."""
    source = folder / name
    if not source.is_dir():
        names = {entry.name.casefold(): entry for entry in sorted(folder.iterdir()) if entry.is_dir()}
        source = next((names[n] for n in (name, *_ALSO_CALLED.get(name, ())) if n in names), source)
        if not source.is_dir():
            raise DataError(
                f"{folder} cannot be repaired: it has no folder {name!r}{did_you_mean(name, names)}"
            )
        found.add(Kind("split renamed", ""), f"{source} to {name!r}")
    file = source / ANNOTATION_FILE
    if not file.is_file():
        others = sorted(source.glob("*.json"))
        if len(others) != 1:
            raise DataError(f"{folder} cannot be repaired: no {ANNOTATION_FILE!r} in {source}")
        found.add(Kind("annotation file renamed", ""), str(others[0]))
        return others[0]
    return file


class _SplitRepair:
    def __init__(self, annotation_file: Path, target: Path, masks: bool | None, found: Findings) -> None:
        self._file, self._target, self._found = annotation_file, target, found
        self._masks = masks
        self._images: dict[int, RepairedImage] = {}
        self._categories: dict[int, dict[str, Any]] = {}
        self._same: dict[str, dict[int, int]] = {"images": {}, "categories": {}}  # id -> the one that stays
        self._ids: set[int] = set()
        self._next_id = 1

    def run(self, on_progress: OnProgress) -> None:
        """Write the repaired split."""
        entries: dict[str, list[dict[str, Any]]] = {"images": [], "categories": []}
        boxes: list[tuple[Any, Any]] = []
        for key, _, entry in self._entries():
            if key != "annotations":
                entries[key].append(entry)
                continue
            boxes.append((as_id(entry.get("image_id")), entry.get("bbox")))
            self._next_id = max(self._next_id, 1 + (as_id(entry.get("id")) or 0))
            self._has_masks(entry)
        self._read_categories(entries["categories"])
        self._copy_images(entries["images"], on_progress)
        forms = box_forms(self._known_boxes(boxes))
        del boxes
        self._write(forms)

    def _entries(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        return read_entries(self._file, byte_order_mark=True)

    def _say(self, what: str, where: str) -> None:
        self._found.add(Kind(what, ""), f"{self._file}: {where}")

    def _has_masks(self, entry: Mapping[str, Any]) -> None:
        if self._masks is None and entry.get("segmentation"):
            self._masks = True

    def _read_categories(self, entries: Sequence[dict[str, Any]]) -> None:
        prompts: dict[str, int] = {}
        for key, entry in self._unique("categories", entries):
            name = entry.get("name")
            if not isinstance(name, str) or not name.strip():
                self._say("category deleted: without a name", f"category {key}")
                continue
            first = prompts.setdefault(" ".join(name.lower().split()), key)
            if first == key:
                self._categories[key] = {**entry, "id": key}
            else:
                self._same["categories"][key] = first
                self._say("categories of one name merged", f"category {key} ({name!r}) into {first}")

    def _copy_images(self, entries: Sequence[dict[str, Any]], on_progress: OnProgress) -> None:
        copier = ImageCopier(self._file.parent, self._target)
        files: dict[Path, int] = {}
        for done, (key, entry) in enumerate(self._unique("images", entries), start=1):
            path = copier.find(entry.get("file_name"))
            if path is not None and files.setdefault(path, key) != key:
                if files[path] in self._images:
                    self._same["images"][key] = files[path]
                    self._say("entries of one image merged", f"image {key} into {files[path]}")
                continue
            where = f"image {key} ({entry.get('file_name')!r:.200})"
            image = copier.copy(entry, partial(self._say, where=where))
            if image is not None:
                self._images[key] = RepairedImage({**image.entry, "id": key}, image.labelled_hw)
            on_progress(f"images of {self._target.name}", done, len(entries))

    def _unique(self, key: str, entries: Sequence[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield entries with an id of their own; of several with one id none can be told, unless they are equal."""
        counts = Counter(as_id(entry.get("id")) for entry in entries)
        seen: dict[int, dict[str, Any]] = {}
        clashing = set()
        for entry in entries:
            number = as_id(entry.get("id"))
            if number is None:
                self._say(f"entry of {key} deleted: without a usable id", f"{entry!r:.80}")
            elif counts[number] > 1 and seen.setdefault(number, entry) != entry:
                clashing.add(number)
        for number in clashing:
            self._say(f"{key} deleted: different ones with one id", f"id {number}")
        done = set()
        for entry in entries:
            number = as_id(entry.get("id"))
            if number is not None and number not in clashing and number not in done:
                done.add(number)
                yield number, entry

    def _known_boxes(self, boxes: Sequence[tuple[Any, Any]]) -> Iterator[tuple[Box, tuple[int, int]]]:
        for image_id, box in boxes:
            image = self._images.get(self._same["images"].get(image_id, image_id))
            if image is not None and box is not None:
                yield box, image.labelled_hw

    def _write(self, forms: Mapping[bool, BoxForm | None]) -> None:
        self._target.mkdir(parents=True, exist_ok=True)
        with (self._target / ANNOTATION_FILE).open("w", encoding="utf-8") as file:
            file.write('{"images": ' + json.dumps([image.entry for image in self._images.values()]))
            file.write(
                ', "categories": ' + json.dumps(list(self._categories.values())) + ', "annotations": ['
            )
            first = True
            for key, _, entry in self._entries():
                if key == "annotations" and (repaired := self._repaired(entry, forms)):
                    file.write(("\n" if first else ",\n") + json.dumps(repaired))
                    first = False
            file.write("]}\n")

    def _repaired(
        self, entry: Mapping[str, Any], forms: Mapping[bool, BoxForm | None]
    ) -> dict[str, Any] | None:
        where = f"annotation {entry.get('id')!r:.40}"
        image_id, category = as_id(entry.get("image_id")), as_id(entry.get("category_id"))
        image_id = self._same["images"].get(image_id, image_id) if image_id is not None else None
        category = self._same["categories"].get(category, category) if category is not None else None
        image = self._images.get(image_id) if image_id is not None else None
        if image is None or category not in self._categories:
            self._say(
                f"annotation deleted: of no {'image' if image is None else 'category'} that is left", where
            )
            return None
        masks = self._masks is True
        labels = repaired_labels(entry, image.labelled_hw, forms, masks, partial(self._say, where=where))
        if labels is None:
            return None
        if image.labelled_hw != image.size_hw:
            labels = scaled_labels(labels, image.labelled_hw, image.size_hw)
            self._say("labels scaled to the size of the file", where)
        return {**labels, "id": self._new_id(entry, where), "image_id": image_id, "category_id": category}

    def _new_id(self, entry: Mapping[str, Any], where: str) -> int:
        number = as_id(entry.get("id"))
        if number is None or number in self._ids:
            number, self._next_id = self._next_id, self._next_id + 1
            self._say("annotation renumbered", where)
        self._ids.add(number)
        return number


def as_id(value: object) -> int | None:
    """Return the whole number that an id stands for, also in text."""
    if (isinstance(value, float) and value.is_integer()) or (
        isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() and len(value) < 20
    ):
        value = int(value)
    return value if type(value) is int and abs(value) < 1 << 63 else None
