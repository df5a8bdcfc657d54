"""A small YOLO dataset to convert, good or broken, and the errors of a conversion."""

from pathlib import Path

import pytest
from PIL import Image

from sam3_lora.data.convert import convert_dataset
from sam3_lora.errors import DataError

ROW = "0 0.1 0.1 0.5 0.1 0.5 0.6\n"


def yolo(folder: Path, count=10, row=ROW, names="[red car, dog]") -> Path:
    for number in range(count):
        for kind, content in (("images", b""), ("labels", row.encode())):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            if kind == "labels":
                (folder / kind / f"{number:03}.txt").write_bytes(content)
            else:
                Image.new("RGB", (40, 30), (number, 0, 0)).save(folder / kind / f"{number:03}.png")
    (folder / "data.yaml").write_text(f"names: {names}\n")
    return folder


def problems(source, target, **options) -> str:
    with pytest.raises(DataError) as caught:
        convert_dataset(source, target, **options)
    assert not target.exists()
    assert not list(target.parent.glob(f".{target.name}.*"))
    return str(caught.value)
