"""Bad input of a conversion: all problems at once, in words, and nothing is left behind."""

import json
import time

import pytest
from PIL import Image
from yolo_source import ROW, problems, yolo

from sam3_lora.data.convert import convert_dataset
from sam3_lora.data.convert.yolo import yolo_to_coco
from sam3_lora.errors import DataError


def test_all_problems_of_all_files_at_once(tmp_path):
    source = yolo(tmp_path / "s", 7)
    for number, text in enumerate(
        ["9" + ROW[1:], "0 0.1 0.2\n", "0 40 20 10 10\n", "0 nan 0.2 0.3 0.4\n", "x y\n"]
    ):
        (source / f"labels/{number:03}.txt").write_text(text)
    (source / "labels/005.txt").write_bytes(b"0 0.5 0.5 \xff\n")
    (source / "images/006.png").write_bytes(b"not an image")
    text = problems(source, tmp_path / "d")
    assert "7 problems" in text
    for expected in (
        "000.txt line 1 has class 9; 'names' has 0 to 1",
        "001.txt line 1 has 2 numbers after the class",
        "002.txt line 1 has 40; values are shares of the image, 0 to 1",
        "003.txt line 1 has a NaN or infinite number",
        "005.txt is not UTF-8 text",
        "006.png is not an image",
    ):
        assert expected in text, expected


def test_the_pure_function_raises_its_problems():
    assert yolo_to_coco(ROW, (30, 40), ["car"])[0].segmentation == [[4, 3, 20, 3, 20, 18]]
    with pytest.raises(DataError, match="line 2 has class 1"):
        yolo_to_coco(ROW + "1 0.5 0.5 0.1 0.1", (30, 40), ["car"])


@pytest.mark.parametrize(
    ("yaml", "problem"),
    [
        pytest.param("names: !!python/object/apply:os.system [touch pwned]\n", "not usable YAML", id="a tag"),
        pytest.param("names: [a, b\n", "not usable YAML", id="broken"),
        pytest.param("names: 3\n", "'names' is 3, not a list of classes", id="no list"),
        pytest.param("names: [a, '']\n", "class 1 has the name ''", id="an empty name"),
        pytest.param("a: &a [x]\nb: &b [*a, *a]\nnames: *b\n", "class 0 has the name", id="aliases"),
    ],
)
def test_a_bad_list_of_classes(yaml, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = yolo(tmp_path / "s", 1)
    (source / "data.yaml").write_text(yaml)
    assert problem in problems(source, tmp_path / "d")
    assert not (tmp_path / "pwned").exists()


def test_two_formats_are_not_guessed_between(tmp_path):
    source = yolo(tmp_path / "s", 2)
    (source / "a.json").write_text('{"images": [], "annotations": [], "categories": []}')
    text = problems(source, tmp_path / "d")
    assert "labels of 2 formats" in text
    assert "a.json with 'images'" in text
    assert "data.yaml with 'names'" in text
    assert convert_dataset(source, tmp_path / "d", source_format="yolo").format == "yolo"


def test_an_unknown_format_says_what_is_there_and_what_is_known(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/a.parquet").write_text("")
    (tmp_path / "s/b.json").write_text("{")
    text = problems(tmp_path / "s", tmp_path / "d")
    assert "seen: 1 .json, 1 .parquet" in text
    assert "b.json is not valid JSON" in text
    assert "labelme: a .json with 'shapes' for each image" in text
    assert "did you mean 'labelme'?" in problems(tmp_path / "s", tmp_path / "d", source_format="labelm")
    assert "does not exist" in problems(tmp_path / "nowhere", tmp_path / "d")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        pytest.param("[" * 200_000, "nested too deeply", id="deep JSON"),
        pytest.param(" " * 100_000_000, "not valid JSON", id="100 MB of nothing"),
        pytest.param(
            '{"images": [{}], "annotations": [[]], "categories": []}',
            "has no 'categories'",
            id="COCO of nothing",
        ),
    ],
)
def test_hostile_json(content, problem, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/a.json").write_text(content)
    start = time.monotonic()
    assert problem in problems(tmp_path / "s", tmp_path / "d")
    assert time.monotonic() - start < 20


def test_run_lengths_that_would_write_beyond_the_mask_are_refused(tmp_path):
    (tmp_path / "s").mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "s/a.png")
    annotations = [
        {"id": n, "image_id": 1, "category_id": 1, "segmentation": {"size": [3, 4], "counts": counts}}
        for n, counts in enumerate([[5, 9999], "PPYo1", [-1, 13], None, [6, 6]])
    ]
    image = {"id": 1, "file_name": "a.png", "width": 4, "height": 3}
    document = {"images": [image], "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "s/a.json").write_text(json.dumps(document))
    assert "unusable shape (4)" in problems(tmp_path / "s", tmp_path / "d")


def test_entities_in_xml_are_refused(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/a.xml").write_text('<!DOCTYPE annotation [<!ENTITY a "aaa">]><annotation>&a;</annotation>')
    assert "has a DOCTYPE" in problems(tmp_path / "s", tmp_path / "d")


def test_a_label_file_cannot_reach_outside_the_source(tmp_path):
    Image.new("RGB", (4, 3)).save(tmp_path / "secret.png")
    (tmp_path / "s").mkdir()
    for number, name in enumerate(["../secret.png", str(tmp_path / "secret.png"), "..\\secret.png"]):
        document = {"version": "5", "flags": {}, "shapes": [], "imagePath": name, "imageData": None}
        (tmp_path / f"s/{number}.json").write_text(json.dumps(document))
    assert "labels of an image that is not there (3)" in problems(tmp_path / "s", tmp_path / "d")
