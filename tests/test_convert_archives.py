"""Zip archives from anywhere: nothing lands outside the target, no bomb fills the disk, and all entries are judged at once."""

import json
import struct
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import sam3_lora.data.convert.archive as archive_module
from sam3_lora.data.convert import convert_dataset
from sam3_lora.data.convert.archive import extract_zip
from sam3_lora.errors import DataError


def archive(path: Path, entries) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


def link(name: str, kind: int = 0o120777) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, kind << 16
    return entry


def refused(path: Path) -> str:
    """Return the error of a conversion, which leaves nothing beside the archive."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(DataError) as caught:
        convert_dataset(path, path.parent / "d")
    assert sorted(path.parent.rglob("*")) == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        pytest.param("../../evil.txt", "leads out of the archive", id="dots"),
        pytest.param("images/../../evil.txt", "leads out of the archive", id="dots inside"),
        pytest.param("..\\..\\evil.txt", "leads out of the archive", id="dots of Windows"),
        pytest.param("/etc/evil.txt", "is an absolute path", id="absolute"),
        pytest.param("C:\\evil.txt", "is an absolute path", id="a drive"),
        pytest.param(link("images"), "is a symbolic link", id="a link"),
        pytest.param(link("null", 0o020666), "is a device", id="a device"),
        pytest.param("x" * 300 + ".txt", "is not a usable file name", id="a long name"),
    ],
)
def test_entries_that_are_unsafe(entry, reason, tmp_path):
    text = refused(archive(tmp_path / "a.zip", [("data.yaml", "names: [a]"), (entry, "/etc")]))
    assert "unsafe archive entry" in text
    assert reason in text


def test_all_unsafe_entries_are_named_at_once(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = archive(tmp_path / "a.zip", [("../a", ""), (link("b"), "/etc"), ("c", "1"), ("c", "2")])
    text = refused(path)
    assert "3 problems" in text
    assert "'c' is there twice" in text


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    text = refused(archive(tmp_path / "a.zip", [("images/a.png", bytes(300 << 20))]))
    assert "would become 315 MB or more" in text
    assert "unpack it yourself" in text


def test_a_bomb_that_lies_about_its_size_is_stopped_while_it_is_unpacked(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.zip", [("a.png", bytes(8 << 20)), ("b.png", bytes(1 << 20))])
    content = bytearray(path.read_bytes())
    for start in (b"PK\x01\x02", b"PK\x03\x04"):  # the sizes stated in the directory and before the entry
        at = content.find(start) + (24 if start[2] == 1 else 22)
        assert struct.unpack_from("<I", content, at) == (8 << 20,)
        struct.pack_into("<I", content, at, 10)
    path.write_bytes(content)
    monkeypatch.setattr(archive_module, "_ALWAYS_FINE", 2 << 20)
    monkeypatch.setattr(archive_module, "_MOST_GROWTH", 1)
    refused(path)


def test_growth_is_counted_while_entries_are_unpacked(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.zip", [("a", bytes(3 << 20))])
    monkeypatch.setattr(archive_module, "_refuse_growth", lambda *_: None)
    monkeypatch.setattr(archive_module, "_ALWAYS_FINE", 1 << 20)
    monkeypatch.setattr(archive_module, "_MOST_GROWTH", 1)
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="would become 1 MB or more"):
        extract_zip(path, tmp_path / "out")
    assert (tmp_path / "out/a").stat().st_size <= 1 << 20


@pytest.mark.parametrize("damage", ["cut", "no zip", "empty", "encrypted", "flipped"])
def test_a_damaged_archive(damage, tmp_path):
    path = archive(tmp_path / "a.zip", [("data.yaml", "names: [a]" * 50), ("b", "c" * 1000)])
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "no zip":
        content = bytearray(b"<html>404</html>")
    elif damage == "empty":
        content = bytearray()
    elif damage == "encrypted":
        for start, at in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
            content[content.find(start) + at] |= 1
    else:
        content[45] ^= 0xFF
    path.write_bytes(content)
    text = refused(path)
    assert "is encrypted" in text if damage == "encrypted" else "is not a whole zip archive" in text


def test_names_in_any_encoding_and_the_litter_of_other_systems(tmp_path):
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    name = "images/caf\u00e9 \U0001f600.png"
    label = {"shapes": [], "imagePath": "caf\u00e9 \U0001f600.png", "imageData": None}
    entries = [
        ("caf\u00e9.json", json.dumps(label)),
        ("__MACOSX/._caf\u00e9.json", "\x00"),
        (".DS_Store", "\x00"),
    ]
    path = archive(tmp_path / "a b \u2603.zip", entries)
    with zipfile.ZipFile(path, "a") as file:
        file.write(tmp_path / "a.png", name)
    content = path.read_bytes()
    path.write_bytes(
        content.replace(struct.pack("<H", 0x800) + b"\x08", b"\x00\x00\x08")
    )  # do not say that it is UTF-8
    made = convert_dataset(path, tmp_path / "d", valid_share=0)
    assert made.format == "labelme"
    assert (tmp_path / "d/train/caf\u00e9 \U0001f600.png").is_file()
