"""The index of annotations: what it gives is what the official loader gives, in any process, and it is built once."""

import concurrent.futures
import json
import multiprocessing
import os
import pickle
import random
import time

import numpy as np
import pytest
import torch

from sam3_lora.data.coco import ANNOTATION_FILE, mask_to_run_lengths
from sam3_lora.data.index import CocoIndex, open_index
from sam3_lora.errors import DataError
from sam3_lora.training.indexed_data import IndexedCoco

from sam3.train.data.coco_json_loaders import COCO_FROM_JSON  # isort: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAM3_LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "index"


def mask_of_kind(kind, draw):
    if kind == 0:
        return [
            [draw.uniform(0, 60) for _ in range(2 * draw.randint(3, 9))] for _ in range(draw.randint(1, 3))
        ]
    mask = np.zeros((60, 80), bool)
    mask[draw.randint(0, 20) : 40, 5 : draw.randint(10, 70)] = True
    if kind == 1:
        return mask_to_run_lengths(mask)
    if kind == 2:
        return {"size": [60, 80], "counts": [100, 60 * 80 - 100]}
    return None if kind == 3 else []


@pytest.fixture
def annotation_file(tmp_path):
    draw = random.Random(0)
    images = [
        {"id": n * 3, "file_name": f"é {n}.png", "width": 80, "height": 60, "extra": 1} for n in range(12)
    ]
    annotations = [
        {
            "id": n,
            "image_id": 3 * draw.randrange(11),
            "category_id": draw.choice([4, 9, 2]),
            "bbox": [draw.randint(0, 30), draw.uniform(0, 30), 20, draw.uniform(5, 20)],
            "area": 3,
            "iscrowd": int(n % 9 == 0),
            "segmentation": mask_of_kind(n % 5, draw),
        }
        for n in range(60)
    ]
    draw.shuffle(images)
    categories = [{"id": 9, "name": "red car"}, {"id": 2, "name": "tree"}, {"id": 4, "name": "ü"}]
    path = tmp_path / ANNOTATION_FILE
    path.write_text(json.dumps({"annotations": annotations, "images": images, "categories": categories}))
    return path


def as_plain(value):
    """Return lists and numbers for tensors, so that equality can be asked."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: as_plain(entry) for key, entry in value.items()}
    return [as_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def everything(loader):
    ids = loader.getDatapointIds()
    return [
        as_plain((loader.loadImagesFromDatapoint(i), loader.loadQueriesAndAnnotationsFromDatapoint(i)))
        for i in ids
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"include_negatives": False},
        {"category_chunk_size": 2},
        {"prompts": "[{'id': 9, 'name': 'a'}, {'id': 2, 'name': 'b'}, {'id': 4, 'name': 'c'}]"},
    ],
    ids=lambda options: ", ".join(options) or "as shipped",
)
def test_queries_and_annotations_are_those_of_the_official_loader(options, annotation_file):
    assert everything(IndexedCoco(str(annotation_file), **options)) == everything(
        COCO_FROM_JSON(str(annotation_file), **options)
    )


def test_an_index_travels_to_another_process_as_its_path(annotation_file):
    index = open_index(annotation_file)
    assert len(pickle.dumps(index)) < 500
    copy = pickle.loads(pickle.dumps(index))
    assert [dict(row) for row in copy] == [dict(row) for row in index]
    assert copy.categories == {9: "red car", 2: "tree", 4: "ü"}


def test_categories_of_an_image_are_known_without_its_masks(annotation_file):
    index = open_index(annotation_file)
    for position, row in enumerate(index):
        categories, crowds = index.categories_of(position)
        assert categories.tolist() == [annotation["category_id"] for annotation in row["annotations"]]
        assert crowds.tolist() == [bool(annotation["iscrowd"]) for annotation in row["annotations"]]


def test_it_is_built_once_and_again_when_the_file_changes(annotation_file, cache):
    first = open_index(annotation_file)
    written = first.path.stat().st_ino
    assert open_index(annotation_file).path.stat().st_ino == written
    document = json.loads(annotation_file.read_text())
    document["images"] = document["images"][:5]
    annotation_file.write_text(json.dumps(document))
    assert len(open_index(annotation_file)) == 5
    assert len(list(cache.glob("*.index"))) == 1
    assert len(dict(first[11])["annotations"]) >= 0  # who has the old one open can still read it


def test_indexes_that_nobody_used_for_a_month_go(annotation_file, cache, tmp_path):
    old, month = open_index(annotation_file).path, 31 * 24 * 3600
    os.utime(old, (time.time() - month, time.time() - month))
    document = json.loads(annotation_file.read_text())
    (tmp_path / "other.json").write_text(json.dumps(document))
    other = open_index(tmp_path / "other.json").path
    assert list(cache.glob("*.index")) == [other]


def test_a_damaged_index_is_built_again(annotation_file):
    index = open_index(annotation_file).path
    index.write_bytes(index.read_bytes()[:40])
    assert len(open_index(annotation_file)) == 12


def open_and_count(annotation_file):
    return len(open_index(annotation_file)), os.getpid()


def test_processes_that_open_it_at_once_get_the_same(annotation_file, cache):
    with concurrent.futures.ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as pool:
        assert {count for count, _ in pool.map(open_and_count, [annotation_file] * 8)} == {12}
    assert sorted(path.suffix for path in cache.iterdir()) == [".index", ".lock"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param(lambda d: d["annotations"][3].pop("iscrowd"), "annotations[3] cannot be used", id="no iscrowd"),
        pytest.param(lambda d: d["annotations"][0].update(bbox=[1]), "annotations[0] cannot be used", id="bad box"),
        pytest.param(lambda d: d["annotations"][0].update(segmentation=[["a"]]), "annotations[0] cannot", id="bad mask"),
        pytest.param(lambda d: d["images"][2].pop("width"), "images[2] cannot be used", id="no width"),
    ],
)  # fmt: skip
def test_entries_that_no_check_passes_are_named_and_nothing_stays(change, problem, annotation_file, cache):
    document = json.loads(annotation_file.read_text())
    change(document)
    annotation_file.write_text(json.dumps(document))
    with pytest.raises(DataError) as caught:
        open_index(annotation_file)
    assert problem in str(caught.value)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_without_a_folder_to_write_it_goes_to_the_temporary_one(annotation_file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAM3_LORA_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert open_index(annotation_file).path.is_relative_to(tmp_path / f"sam3_lora-{os.getuid()}")


def test_a_file_without_annotations_has_an_index_too(tmp_path):
    (tmp_path / "a.json").write_text('{"images": [], "annotations": [], "categories": []}')
    assert list(open_index(tmp_path / "a.json")) == []
    assert isinstance(open_index(tmp_path / "a.json"), CocoIndex)
