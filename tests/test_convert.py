"""A conversion as a whole: the layout that it makes, what it does to the source (nothing), and to bad input."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from yolo_source import yolo

import sam3_lora.data.convert.dataset as dataset_module
from sam3_lora.cli import main
from sam3_lora.data.check import check_dataset
from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.convert import convert_dataset
from sam3_lora.errors import OutputError


def state(folder: Path) -> dict[Path, tuple[bytes, float, int]]:
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_mode)
        for path in folder.rglob("*")
        if path.is_file()
    }


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.suffix == ".png")


def test_a_share_is_drawn_for_valid_and_the_seed_decides_which(tmp_path):
    source = yolo(tmp_path / "s")
    before = state(source)
    drawn = []
    for seed in (0, 0, 1):
        made = convert_dataset(source, tmp_path / "d", seed=seed, overwrite=True)
        assert made.images == {"train": 8, "valid": 2}
        drawn.append(files(tmp_path / "d/valid"))
    assert drawn[0] == drawn[1] != drawn[2]
    assert state(source) == before
    summary = check_dataset(tmp_path / "d")
    assert summary.splits["train"].prompts == ("red car", "dog")
    assert summary.splits["train"].objects == 8


@pytest.mark.parametrize(
    ("share", "images"),
    [(0, {"train": 10}), (0.5, {"train": 5, "valid": 5}), (0.99, {"train": 1, "valid": 9})],
)
def test_the_share_can_be_chosen(share, images, tmp_path):
    assert convert_dataset(yolo(tmp_path / "s"), tmp_path / "d", valid_share=share).images == images


def test_both_sides_of_a_small_set_have_objects(tmp_path):
    source = yolo(tmp_path / "s", 12)
    for number in range(2, 12):
        (source / f"labels/{number:03}.txt").write_text("")
    for seed in range(5):
        made = convert_dataset(source, tmp_path / "d", seed=seed, overwrite=True)
        assert made.objects == {"train": 1, "valid": 1}


def test_images_are_linked_or_copied(tmp_path):
    source = yolo(tmp_path / "s", 2)
    convert_dataset(source, tmp_path / "linked", valid_share=0)
    convert_dataset(source, tmp_path / "copied", valid_share=0, copy=True)
    assert (tmp_path / "linked/train/000.png").samefile(source / "images/000.png")
    assert not (tmp_path / "copied/train/000.png").samefile(source / "images/000.png")
    assert (tmp_path / "copied/train/000.png").read_bytes() == (source / "images/000.png").read_bytes()


def test_several_processes_make_the_same_bytes_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_module, "_ALONE", 4)
    monkeypatch.setattr(dataset_module, "_CHUNK", 3)
    source = yolo(tmp_path / "s", 20)
    for processes in (1, 2):
        counts: list[tuple[int, int]] = []
        show = partial(lambda seen, *count: seen.append(count), counts)
        convert_dataset(source, tmp_path / f"d{processes}", processes=processes, on_progress=show)
        assert counts == [(n, 20) for n in range(1, 21)]
    one, two = (state(tmp_path / f"d{n}") for n in (1, 2))
    assert [content for content, *_ in one.values()] == [content for content, *_ in two.values()]


def test_a_photograph_that_the_tool_showed_turned_is_turned(tmp_path):
    source = yolo(tmp_path / "s", 1)
    photo = Image.new("RGB", (40, 30))
    photo.paste((255, 255, 255), (0, 0, 40, 15))
    exif = photo.getexif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter: 30 x 40, white on the right
    (source / "images/000.png").unlink()
    photo.save(source / "images/000.jpg", exif=exif, quality=95)
    before = state(source)
    made = convert_dataset(source, tmp_path / "d", valid_share=0)
    with Image.open(tmp_path / "d/train/000.jpg") as upright:
        assert upright.size == (30, 40)
        assert upright.getexif().get(0x0112, 1) == 1
        assert upright.getpixel((25, 20))[0] > 200 > 50 > upright.getpixel((5, 20))[0]
    (image,) = json.loads((tmp_path / "d/train" / ANNOTATION_FILE).read_text())["images"]
    assert (image["width"], image["height"]) == (30, 40)
    assert [note.kind for note in made.notes] == ["image turned upright"]
    assert state(source) == before


def test_names_that_no_file_system_should_confuse(tmp_path):
    source = yolo(tmp_path / "s", 0 + 1)
    odd = ["a/pic.png", "b/PIC.png", "c d/\u2603 \U0001f600.png", os.fsdecode(b"e/\xff\xfe.png")]
    for name in odd:
        target = source / "images" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "images/000.png", target)
    made = convert_dataset(source, tmp_path / "d", valid_share=0)
    document = json.loads((tmp_path / "d/train" / ANNOTATION_FILE).read_text(encoding="utf-8"))
    names = [image["file_name"] for image in document["images"]]
    assert sorted(names) == sorted(["000.png", "pic.png", "b_PIC.png", "\u2603 \U0001f600.png", "__.png"])
    assert [(note.kind, note.count) for note in made.notes] == [("image file renamed", 2)]
    check_dataset(tmp_path / "d", ["train"])
    assert main(["data", "convert", str(source), str(tmp_path / "e"), "--json"]) == 0


def test_a_shape_over_the_edge_is_cut_and_a_box_written_as_a_mask(tmp_path):
    rows = "0 -0.02 0.1 0.5 0.1 0.5 0.6\n1 0.5 0.5 0.2 0.2\n"
    made = convert_dataset(yolo(tmp_path / "s", 1, rows), tmp_path / "d", valid_share=0)
    cut, box = json.loads((tmp_path / "d/train" / ANNOTATION_FILE).read_text())["annotations"]
    assert isinstance(cut["segmentation"], dict)
    assert box["bbox"] == [16, 12, 8, 6]
    assert [note.kind for note in made.notes] == [
        "shape cut at the edge of its image",
        "box written as a mask",
    ]


def test_a_target_that_holds_something_or_cannot_be_written(tmp_path):
    source = yolo(tmp_path / "s", 1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(OutputError, match="is not empty"):
            convert_dataset(source, tmp_path / "full", **options)
    with pytest.raises(OutputError, match="cannot be written"):
        convert_dataset(source, Path("/proc/nothing/here"))
    (tmp_path / "empty").mkdir()
    convert_dataset(source, tmp_path / "empty", valid_share=0)
    with pytest.raises(OutputError, match="--overwrite to replace it"):
        convert_dataset(source, tmp_path / "empty")


def test_the_target_may_be_inside_the_source(tmp_path):
    source = yolo(tmp_path / "s", 4)
    for _ in range(2):
        assert convert_dataset(source, source / "out", overwrite=True).images == {"train": 3, "valid": 1}


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_conversion_leaves_nothing_and_the_next_is_clean(stop, tmp_path):
    source = yolo(tmp_path / "s", 4)
    code = (
        "import sys, time, sam3_lora.data.convert as c\n"
        "c.convert_dataset(sys.argv[1], sys.argv[2], on_progress=lambda *_: (print('on', flush=True), time.sleep(60)))"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "d")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdout.readline()
        process.send_signal(stop)
    assert not (tmp_path / "d").exists()
    assert bool(list(tmp_path.glob(".d.*"))) == (stop == signal.SIGKILL)
    convert_dataset(source, tmp_path / "d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "s"]
    check_dataset(tmp_path / "d")


@pytest.mark.parametrize("limit", [100, 2000])
def test_a_disk_without_room_is_said_once(limit, tmp_path):
    source = yolo(tmp_path / "s", 20)
    Image.effect_noise((64, 64), 50).save(source / "images/000.png")  # more than 2,000 bytes
    code = (
        "import resource, sys, sam3_lora.cli as c\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "sys.exit(c.main(['data', 'convert', *sys.argv[1:], '--copy']))"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "d")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert (
        result.stderr.splitlines()[-1]
        == f"error: {tmp_path / 'd'} cannot be written: File too large; choose another place"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_processes_end_with_the_one_that_was_killed(tmp_path):
    source = yolo(tmp_path / "s", 20)
    code = (
        "import os, sys, time, sam3_lora.data.convert.dataset as c\n"
        "c._ALONE, c._CHUNK = 0, 1\n"
        "wait = lambda *_: (print(os.getpgid(0), flush=True), time.sleep(60))\n"
        "c.convert_dataset(sys.argv[1], sys.argv[2], processes=2, on_progress=wait)"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "d")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        group = int(process.stdout.readline())
        process.kill()
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    raise AssertionError("processes are left")


@pytest.mark.slow
def test_ten_thousand_images_take_less_than_a_minute(tmp_path):
    source = yolo(tmp_path / "s", 1)
    radii = [0.1 + 0.04 * n for n in range(7)]
    rings = [
        " ".join(f"{0.5 + r * f(t / 4):.6f}" for t in range(26) for f in (math.cos, math.sin)) for r in radii
    ]
    rows = "".join(f"0 {ring}\n" for ring in rings)
    for number in range(1, 10_000):
        os.link(source / "images/000.png", source / f"images/{number:05}.png")
        (source / f"labels/{number:05}.txt").write_text(rows)
    start = time.monotonic()
    made = convert_dataset(source, tmp_path / "d")
    assert time.monotonic() - start < 60
    assert made.images == {"train": 8000, "valid": 2000}


def test_the_command_line(tmp_path, capsys):
    source = yolo(tmp_path / "s")
    assert (
        main(
            [
                "data",
                "convert",
                str(source),
                str(tmp_path / "d"),
                "--valid-share",
                "0.3",
                "--seed",
                "2",
                "--json",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert json.loads(out)["splits"] == {
        "train": {"images": 7, "objects": 7},
        "valid": {"images": 3, "objects": 3},
    }
    assert main(["data", "convert", str(source), str(tmp_path / "e"), "--from", "yolo"]) == 0
    assert "train    8 images, 8 objects" in capsys.readouterr().out
    assert main(["data", "convert", str(source), str(tmp_path / "f"), "--valid-share", "1"]) == 2
    assert "needs a share of 1" in capsys.readouterr().err
