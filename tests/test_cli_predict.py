"""``sam3-lora predict`` with the real tiny model: files, tables, bad images, and what it refuses to do."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from sam3_lora.adapter import get_peft_sam3, save_adapter
from sam3_lora.base.loading import load_base
from sam3_lora.cli import main
from sam3_lora.cli.image_paths import find_images, unique_stems
from sam3_lora.errors import DataError
from sam3_lora.inference import Predictor
from sam3_lora.output import claim_output

TINY = ["--base", "tiny", "--threshold", "0"]
CIRCLE = ["--prompt", "red circle"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)


def save_picture(name, size=(64, 48), colour="red"):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(name)
    return Path(name)


def output_files(folder="out"):
    return sorted(file.name for file in Path(folder).iterdir() if file.name[0] != ".")


def read(name):
    return json.loads(Path("out", name).read_text())


def test_predictions_can_be_read_by_pycocotools_and_are_those_of_the_predictor(capsys):
    files = [save_picture("a.png"), save_picture("b.png", (30, 90), "blue")]
    assert main(["predict", "a.png", "b.png", *CIRCLE, "--prompt", "star", "--output", "out", *TINY]) == 0
    assert output_files() == ["a.png", "b.png", "images.json", "predictions.json"]

    truth = COCO("out/images.json")
    results = truth.loadRes("out/predictions.json")
    assert [truth.imgs[1]["file_name"], truth.imgs[2]["width"], truth.imgs[2]["height"]] == ["a.png", 30, 90]
    assert {i: c["name"] for i, c in truth.cats.items()} == {1: "red circle", 2: "star"}
    predictor = Predictor(load_base("tiny"), threshold=0)
    for image_id, file in enumerate(files, 1):
        for category_id, expected in enumerate(predictor.predict(file, ["red circle", "star"]), 1):
            found = results.loadAnns(results.getAnnIds(imgIds=[image_id], catIds=[category_id]))
            assert [item["score"] for item in found] == expected.scores.tolist()
            assert found
            for item, mask in zip(found, expected.masks, strict=True):
                np.testing.assert_array_equal(results.annToMask(item), mask)


def test_the_overlay_shows_the_objects():
    save_picture("a.png", (500, 400), "black")
    main(["predict", "a.png", *CIRCLE, "--output", "out", *TINY])
    with Image.open("out/a.png") as overlay:
        assert overlay.size == (500, 400)
        assert np.asarray(overlay).any()


def test_an_adapter_brings_its_base():
    adapted = get_peft_sam3(load_base("tiny"), preset="minimal", init_lora_weights=False)
    folder = save_adapter(adapted, "adapter")
    save_picture("a.png")
    argv = ["predict", "a.png", *CIRCLE, "--output", "out", "--threshold", "0", "--adapter", str(folder)]
    assert main(argv) == 0
    (expected,) = Predictor.from_adapter(folder, threshold=0).predict("a.png", ["red circle"])
    assert [item["score"] for item in read("predictions.json")] == expected.scores.tolist()


def test_a_box_is_an_example_for_every_image():
    save_picture("a.png")
    argv = ["predict", "a.png", "--prompt", "visual", "--box", "5,5,40,30", "--box", "1,2,3,4"]
    assert main([*argv, "--output", "out", *TINY, "--threshold", "0"]) == 0
    boxes = [(5, 5, 40, 30), (1, 2, 3, 4)]
    (expected,) = Predictor(load_base("tiny")).predict("a.png", ["visual"], boxes, threshold=0)
    assert [item["score"] for item in read("predictions.json")] == expected.scores.tolist()


def test_bad_images_are_left_out_and_listed_at_the_end(capsys):
    save_picture("photos/good.png")
    save_picture("photos/small.png", (20, 20))
    Path("photos/text.jpg").write_text("hello")
    save_picture("photos/zcut.jpg", (600, 500))
    Path("photos/zcut.jpg").write_bytes(Path("photos/zcut.jpg").read_bytes()[:1500])
    assert main(["predict", "photos", *CIRCLE, "--box", "1,1,30,30", "--output", "out", *TINY]) == 1
    captured = capsys.readouterr()
    assert "photos/good.png" in captured.out
    error = captured.err[captured.err.index("error: ") :].splitlines()
    assert error[:3] == [
        "error: 3 of 4 images could not be used:",
        "  photos/small.png: box (1, 1, 30, 30) leaves the image, which is 20 wide and 20 high",
        "  photos/text.jpg is not an image",
    ]
    assert error[3].startswith("  photos/zcut.jpg is damaged: image file is truncated")
    assert output_files() == ["good.png", "images.json", "predictions.json"]
    assert [image["file_name"] for image in read("images.json")["images"]] == ["photos/good.png"]


def test_when_every_image_is_bad_the_files_are_there_and_empty(capsys):
    Path("a.jpg").write_text("hello")
    assert main(["predict", "a.jpg", *CIRCLE, "--output", "out", *TINY]) == 1
    assert "1 of 1 images could not be used:\n  a.jpg is not an image" in capsys.readouterr().err
    assert (read("predictions.json"), read("images.json")["images"]) == ([], [])


def test_the_table_has_a_line_for_each_prompt_and_progress_goes_to_stderr(capsys):
    save_picture("a.png")
    main(["predict", "a.png", *CIRCLE, "--prompt", "star", "--output", "out", *TINY, "--threshold", "1"])
    captured = capsys.readouterr()
    assert "│ a.png │ red circle │ 0" in captured.out
    assert "│       │ star       │ 0" in captured.out
    assert captured.out.endswith(
        "Pictures  out/*.png\nResults   out/predictions.json\n          out/images.json\n"
    )
    assert captured.err == "1/1 images\n"


def test_json_is_one_document_and_lists_failures(capsys):
    save_picture("a.png")
    Path("b.png").touch()
    assert main(["predict", "a.png", "b.png", *CIRCLE, "--output", "out", *TINY, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    (image,) = document["images"]
    scores = image.pop("scores")["red circle"]
    assert scores == [item["score"] for item in read("predictions.json")]
    assert image == {"id": 1, "file_name": "a.png", "width": 64, "height": 48, "overlay": "a.png"}
    assert document["failed"] == [{"file_name": "b.png", "problem": "b.png is empty"}]
    assert document["output"] == "out"


def test_a_prompt_given_twice_is_asked_once():
    save_picture("a.png")
    assert main(["predict", "a.png", *CIRCLE, "--prompt", " red circle", "--output", "out", *TINY]) == 0
    assert read("images.json")["categories"] == [{"id": 1, "name": "red circle"}]


PREDICT = ["predict", "a.png", "--output", "out"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param(PREDICT, "the following arguments are required: --prompt", id="no prompt"),
        pytest.param([*PREDICT, "--prompt", " "], "--prompt: needs words, such as 'red circle', got ' '", id="blank prompt"),
        pytest.param(["predict", *CIRCLE, "--output", "o"], "the following arguments are required: IMAGE", id="no image"),
        pytest.param(["predict", "a.png", *CIRCLE], "the following arguments are required: --output", id="no output"),
        pytest.param([*PREDICT, *CIRCLE, "--threshold", "7"], "--threshold: needs a number from 0 to 1, got '7'", id="threshold 7"),
        pytest.param([*PREDICT, *CIRCLE, "--threshold", "nan"], "--threshold: needs a number from 0 to 1, got 'nan'", id="threshold NaN"),
        pytest.param([*PREDICT, *CIRCLE, "--threshold", "half"], "--threshold: needs a number from 0 to 1, got 'half'", id="threshold in words"),
        pytest.param([*PREDICT, *CIRCLE, "--box", "9,9,5,5"], "--box: needs x0,y0,x1,y1 in pixels with 0 <= x0 < x1 and 0 <= y0 < y1, such as 40,60,180,220, got '9,9,5,5'", id="box corners swapped"),
        pytest.param([*PREDICT, *CIRCLE, "--box", "1,2,3"], "got '1,2,3'", id="three numbers"),
        pytest.param([*PREDICT, *CIRCLE, "--box", "1,2,3,x"], "got '1,2,3,x'", id="no number"),
        pytest.param([*PREDICT, *CIRCLE, "--box", "1,2,inf,4"], "got '1,2,inf,4'", id="infinite box"),
        pytest.param([*PREDICT, *CIRCLE, "--box=-1,2,3,4"], "got '-1,2,3,4'", id="negative box"),
        pytest.param([*PREDICT, *CIRCLE, "--box", "-1,2,3,4"], "0 <= y0 < y1, such as 40,60,180,220, got '-1,2,3,4'", id="negative box in a word of its own"),
        pytest.param([*PREDICT, *CIRCLE, "--treshold", "1"], "unknown option '--treshold'; did you mean '--threshold'?", id="option"),
    ],
)  # fmt: skip
def test_wrong_usage_ends_with_2(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_every_path_that_stands_for_nothing_is_named_before_anything_is_written(capsys):
    Path("empty").mkdir()
    assert main(["predict", "gone.jpg", "*.tif", "empty", *CIRCLE, "--output", "out"]) == 1
    assert capsys.readouterr().err == (
        "error: 3 problems:\n"
        "  no file or folder 'gone.jpg'\n"
        "  nothing matches '*.tif'\n"
        "  no image in the folder 'empty'; for its subfolders give a pattern, such as 'empty/**/*.jpg'\n"
    )
    assert not Path("out").exists()


def test_an_output_folder_of_the_user_is_left_alone(capsys):
    save_picture("a.png")
    save_picture("out/mine.png")
    assert main([*PREDICT, *CIRCLE, *TINY, "--overwrite"]) == 1
    assert "out is not empty (it holds mine.png); choose another folder" in capsys.readouterr().err
    assert output_files() == ["mine.png"]


def test_an_earlier_result_is_replaced_only_when_told(capsys):
    save_picture("a.png")
    claim_output(Path("out"), made_by="predict")
    save_picture("out/old.png")
    assert main([*PREDICT, *CIRCLE, *TINY]) == 1
    assert "or --overwrite to replace it" in capsys.readouterr().err
    assert main([*PREDICT, *CIRCLE, *TINY, "--overwrite"]) == 0
    assert output_files() == ["a.png", "images.json", "predictions.json"]


def test_overwrite_never_deletes_what_is_read(capsys):
    claim_output(Path("run"), made_by="train")
    Path("run/adapters/best").mkdir(parents=True)
    save_picture("run/sheet.png")
    save_picture("a.png")
    for argv in (["run/sheet.png"], ["a.png", "--adapter", "run/adapters/best"]):
        assert main(["predict", *argv, *CIRCLE, "--output", "run", "--overwrite"]) == 1
        assert "lies in the output folder run; choose another output folder" in capsys.readouterr().err
    assert output_files("run") == ["adapters", "sheet.png"]


def test_an_adapter_that_cannot_be_loaded_costs_no_earlier_result(capsys):
    save_picture("a.png")
    claim_output(Path("out"), made_by="predict")
    save_picture("out/old.png")
    assert main([*PREDICT, *CIRCLE, "--overwrite", "--adapter", "gone"]) == 1
    assert "'gone' is not an adapter folder" in capsys.readouterr().err
    assert output_files() == ["old.png"]


@pytest.mark.parametrize("output", ["file", "file/out"])
def test_an_output_that_cannot_be_a_folder_is_refused(output, capsys):
    save_picture("a.png")
    Path("file").touch()
    assert main(["predict", "a.png", *CIRCLE, *TINY, "--output", output]) == 1
    assert f"error: {output} cannot be the output folder: Not a directory" in capsys.readouterr().err


def test_a_full_disk_is_an_error_of_the_output(capsys, monkeypatch):
    save_picture("a.png")

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", no_space)
    assert main([*PREDICT, *CIRCLE, *TINY]) == 1
    assert "error: out cannot be written: No space left on device" in capsys.readouterr().err


def test_find_images_takes_files_folders_and_patterns_once_and_in_order():
    for name in ("photos/b.PNG", "photos/a.jpg", "photos/notes.txt", "photos/.hidden.jpg", "photos/in/c.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    Path("odd[1].img").touch()
    words = ["photos/in/c.png", "photos", "photos/**/*.*g", "odd[1].img", os.path.abspath("photos/a.jpg")]
    found = ["photos/in/c.png", "photos/a.jpg", "photos/b.PNG", "odd[1].img"]
    assert [str(path) for path in find_images(words)] == found


def test_find_images_says_what_is_missing():
    with pytest.raises(DataError, match="no file or folder 'gone'"):
        find_images(["gone"])


@pytest.mark.parametrize(
    ("paths", "stems"),
    [
        pytest.param(["a.jpg", "in/b.png"], ["a", "b"], id="all different"),
        pytest.param(["a/x.jpg", "b/x.jpg"], ["a_x.jpg", "b_x.jpg"], id="folders"),
        pytest.param(["x.jpg", "x.png"], ["x.jpg", "x.png"], id="suffixes"),
        pytest.param(["x.jpg", "X.jpg"], ["x.jpg", "X.jpg-2"], id="case"),
        pytest.param(["a_b/x.jpg", "a/b/x.jpg"], ["a_b_x.jpg", "a_b_x.jpg-2"], id="joined parts"),
        pytest.param(["../x.jpg", "x.jpg"], None, id="above"),
        pytest.param([], [], id="none"),
    ],
)
def test_no_two_pictures_get_the_same_name(paths, stems, tmp_path):
    expected = ["x.jpg", f"{tmp_path.name}_x.jpg"] if stems is None else stems
    assert unique_stems([Path(path) for path in paths]) == expected
