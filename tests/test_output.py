"""Output folders: nothing of the user's is lost, and files are whole or absent."""

import json
import os
import stat
from pathlib import Path

import pytest

from sam3_lora.errors import OutputError
from sam3_lora.output import (
    MARKER_FILE,
    check_output,
    claim_output,
    mark_finished,
    replaced_folder,
    write_json_atomic,
    write_text_atomic,
)


def earlier_run(folder, made_by):
    claim_output(folder, made_by=made_by)
    mark_finished(folder)
    (folder / "adapters").mkdir()
    (folder / "adapters/weights").write_text("old")
    (folder / "metrics.json").write_text("{}")
    return folder


def test_a_new_folder_is_made_with_its_parents_and_marked(tmp_path):
    claim_output(tmp_path / "runs/first", made_by="train")
    marker = json.loads((tmp_path / "runs/first" / MARKER_FILE).read_text())
    assert marker["command"] == "train"
    assert marker["version"]


def test_an_empty_folder_is_taken(tmp_path):
    claim_output(tmp_path, made_by="train")
    assert [file.name for file in tmp_path.iterdir()] == [MARKER_FILE]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("made_by", ["train", "demo"])
def test_a_folder_of_the_user_is_never_emptied(made_by, overwrite, tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(OutputError) as caught:
        claim_output(tmp_path, made_by=made_by, overwrite=overwrite)
    assert str(caught.value) == (
        f"{tmp_path} is not empty (it holds thesis.tex); choose another folder, or empty this one yourself: "
        "sam3-lora deletes only what it made"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("earlier", "now", "overwrite", "replaced"),
    [
        pytest.param("demo", "demo", False, True, id="demo replaces a demo"),
        pytest.param("train", "train", False, False, id="train keeps a run"),
        pytest.param("train", "demo", False, False, id="demo keeps a run"),
        pytest.param("demo", "train", False, False, id="train keeps a demo"),
        pytest.param("train", "train", True, True, id="train replaces a run when told"),
        pytest.param("demo", "train", True, True, id="train replaces a demo when told"),
    ],
)
def test_what_may_replace_an_earlier_run(earlier, now, overwrite, replaced, tmp_path):
    folder = earlier_run(tmp_path / "run", made_by=earlier)
    if not replaced:
        with pytest.raises(
            OutputError, match=f"made by 'sam3-lora {earlier}': .* or --overwrite to replace it"
        ):
            claim_output(folder, made_by=now, overwrite=overwrite)
        assert (folder / "adapters/weights").read_text() == "old"
        return
    claim_output(folder, made_by=now, overwrite=overwrite)
    assert [file.name for file in folder.iterdir()] == [MARKER_FILE]
    assert json.loads((folder / MARKER_FILE).read_text())["command"] == now


def test_an_unfinished_run_is_not_replaced_and_the_error_names_the_way_to_go_on(tmp_path):
    claim_output(tmp_path / "run", made_by="train")
    with pytest.raises(
        OutputError, match=r"holds an unfinished run: go on with --resume .*run, or --overwrite"
    ):
        check_output(tmp_path / "run", made_by="train")


def test_a_link_in_a_replaced_run_goes_but_not_what_it_points_to(tmp_path):
    folder = earlier_run(tmp_path / "run", made_by="demo")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/image.png").write_text("kept")
    (folder / "data").symlink_to(tmp_path / "data")
    claim_output(folder, made_by="demo")
    assert (tmp_path / "data/image.png").read_text() == "kept"
    assert not (folder / "data").exists()


@pytest.mark.parametrize("marker", ["", "[]", "{}", '{"command": 5}', "\x00"])
def test_a_damaged_marker_gives_no_right_to_delete(marker, tmp_path):
    (tmp_path / MARKER_FILE).write_text(marker)
    with pytest.raises(OutputError, match="deletes only what it made"):
        claim_output(tmp_path, made_by="demo", overwrite=True)


def test_checking_leaves_no_trace(tmp_path):
    check_output(tmp_path / "new/run", made_by="train")
    assert list(tmp_path.iterdir()) == []


def test_a_long_listing_is_cut(tmp_path):
    for name in "abcdefg":
        (tmp_path / name).touch()
    with pytest.raises(OutputError, match=r"it holds a, b, c, d and 3 more\)"):
        check_output(tmp_path, made_by="train")


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(
        OutputError, match=r"run cannot be the output folder: Not a directory; choose another"
    ):
        claim_output(tmp_path / "run", made_by="train")
    with pytest.raises(OutputError, match="Not a directory; choose another"):
        claim_output(tmp_path / "run/deeper", made_by="train")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system that nobody can write")
def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "link").symlink_to("/proc")
    with pytest.raises(OutputError, match=r"link/run cannot be written: .*; choose another output folder"):
        claim_output(tmp_path / "link/run", made_by="train")


def test_written_files_are_readable_by_all_and_leave_nothing_beside_them(tmp_path):
    write_text_atomic(tmp_path / "a.txt", "größer\n")
    write_json_atomic(tmp_path / "b.json", {"x": [1, 2]})
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "größer\n"
    assert json.loads((tmp_path / "b.json").read_text()) == {"x": [1, 2]}
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o644}
    assert {file.name for file in tmp_path.iterdir()} == {"a.txt", "b.json"}


def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "state.json"
    write_json_atomic(file, "old")

    def no_space(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_json_atomic(file, "new")
    assert json.loads(file.read_text()) == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_replaced_folder_holds_only_the_new_files(tmp_path):
    best = tmp_path / "best"
    for text in ("first", "second"):
        with replaced_folder(best) as new:
            (new / text).write_text(text)
            assert not (best / text).exists()
    assert [file.name for file in best.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [best]


def test_a_replacement_that_fails_keeps_the_old_folder(tmp_path):
    best = tmp_path / "best"
    with replaced_folder(best) as new:
        (new / "weights").write_text("old")
    with pytest.raises(KeyboardInterrupt), replaced_folder(best) as new:
        (new / "weights").write_text("half")
        raise KeyboardInterrupt
    assert (best / "weights").read_text() == "old"
    assert list(tmp_path.iterdir()) == [best]


def test_a_folder_lost_between_two_renames_comes_back(tmp_path):
    best = tmp_path / "best"
    (tmp_path / ".best.old").mkdir()
    (tmp_path / ".best.old/weights").write_text("old")
    with pytest.raises(RuntimeError), replaced_folder(best):
        raise RuntimeError
    assert (best / "weights").read_text() == "old"


def test_a_folder_that_cannot_be_written_is_found_out_without_a_trace(tmp_path):
    with pytest.raises(
        OutputError, match=r"^/proc/runs/first cannot be written: No such file or directory; choose"
    ):
        check_output(Path("/proc/runs/first"), made_by="train")
    check_output(tmp_path / "runs/first", made_by="train")
    assert list(tmp_path.iterdir()) == []
