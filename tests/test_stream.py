"""COCO files read entry by entry: the same entries as of the whole file, in little memory, and clear errors."""

import json
import random
import time
import tracemalloc

import pytest

from sam3_lora.data import stream
from sam3_lora.data.stream import read_entries
from sam3_lora.errors import DataError

DOCUMENT = {
    "info": {"nested": [1, {"a": "}]"}]},
    "images": [{"id": 1, "file_name": 'a "b" é 😀.png', "width": 60}, {}],
    "annotations": [{"id": n, "segmentation": [[0.5 * k for k in range(n)]]} for n in range(40)],
    "categories": [],
    "licenses": None,
}


def entries_of(document):
    return [(key, n, e) for key in document if key in stream.LISTS for n, e in enumerate(document[key])]


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_entries_are_those_of_the_whole_file_wherever_it_is_cut(block, indent, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_BLOCK", block)
    (tmp_path / "a.json").write_text(
        json.dumps(DOCUMENT, indent=indent, ensure_ascii=False), encoding="utf-8"
    )
    assert list(read_entries(tmp_path / "a.json")) == entries_of(DOCUMENT)


@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        pytest.param('{"images": [{"id": 1}, {"id', "the file ends too early, like a copy that was cut off", id="cut in a string"),
        pytest.param('{"images": [{"id": 1}', "the file ends too early", id="cut between entries"),
        pytest.param('{"images": [{}], "annotations": fals', "the file ends too early", id="cut in a word"),
        pytest.param("", "the file ends too early", id="no bytes"),
        pytest.param('{"images": [],,}', "is not valid JSON: Expecting '\"': line 1 column 15", id="stray comma"),
        pytest.param('{\n"images": [\n{}, {"a" 1}]}', "line 3 column 10", id="place on a later line"),
        pytest.param('{"images": []} x', "Extra data: line 1 column 16", id="more after the end"),
        pytest.param("\ufeff{}", "byte order mark, which the official loader refuses", id="byte order mark"),
        pytest.param(b'{"images": "\xff"}', "is not UTF-8 text: byte 12 is 0xff", id="not UTF-8"),
        pytest.param('{"images": [' + "[" * 100_000, "is not usable JSON", id="100,000 brackets"),
        pytest.param("{" + '"a":{' * 100_000, "is not usable JSON", id="100,000 braces"),
        pytest.param('{"info": ' + "9" * 10_000 + "}", "is not usable JSON", id="10,000 digits"),
        pytest.param("[]", "is not a COCO document: it holds a list", id="list"),
        pytest.param("{}", "it has no 'images' and no 'annotations' and no 'categories'", id="empty object"),
        pytest.param('{"images": {}}', "'images' is a dict, not a list", id="dict of images"),
        pytest.param('{"images": [{}, 5]}', "images[1] is '5', not an object", id="number among images"),
        pytest.param('{"images": [], "images": []}', "it has 'images' twice", id="list twice"),
    ],
)  # fmt: skip
def test_what_is_no_coco_file_is_explained(contents, problem, tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    with pytest.raises(DataError) as caught:
        list(read_entries(file))
    assert problem in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("space", [" ", "\n"])
def test_50_mb_of_nothing_are_passed_over(space, tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"images": [' + space * 50_000_000 + '], "annotations": [], "categories": []}')
    start = time.process_time()
    assert list(read_entries(file)) == []
    assert time.process_time() - start < 5


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_BLOCK", 1 << 16)
    polygon = [random.Random(0).uniform(0, 999) for _ in range(200)]
    document = {"images": [], "categories": [], "annotations": [{"segmentation": [polygon]}] * 1000}
    file = tmp_path / "a.json"
    file.write_text(json.dumps(document))
    tracemalloc.start()
    assert sum(1 for _ in read_entries(file)) == 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert file.stat().st_size > 3e6
    assert peak < 1e6


def test_a_mistake_near_the_beginning_is_found_there(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"images": [{"id" 1}]}' + " " * 30_000_000)
    tracemalloc.start()
    with pytest.raises(DataError, match="line 1 column 19"):
        list(read_entries(file))
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
