"""The public names of the package."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import sam3_lora
from sam3_lora.renamed import RENAMED_FUNCTIONS, RENAMED_SETTINGS


def test_the_list_of_public_names_is_sorted():
    assert sam3_lora.__all__ == sorted(sam3_lora.__all__)


@pytest.mark.parametrize("name", sam3_lora.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(sam3_lora, name)
    assert not inspect.ismodule(value), "a module of the same name hides it"
    assert not callable(value) or value.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'get_peft_sam2'"):
        sam3_lora.get_peft_sam2  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sam3_lora, sys; print(sorted({'torch', 'peft', 'numpy', 'sam3', 'hydra'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("apply_lora_to_sam3", "get_peft_sam3(model, preset"),
        ("load_lora_weights", "load_adapter(model, folder)"),
        ("save_lora_weights", "save_adapter(model, folder)"),
        ("Sam3ImageInference", "Predictor(model)"),
        ("yolo_seg_to_coco", "convert_dataset(folder, my_dataset)"),
    ],
)
def test_a_name_of_the_seed_is_an_error_that_says_what_it_is_called_here(name, replacement):
    with pytest.raises(ImportError) as error:
        exec(f"from sam3_lora import {name}")
    assert str(error.value).startswith(f"sam3_lora has no {name}; it is {replacement}")
    with pytest.raises(ImportError, match=f"sam3_lora has no {name}"):
        getattr(sam3_lora, name)


def test_every_name_of_the_seed_is_in_the_document_about_it():
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "from-the-seed.md").read_text(encoding="utf-8")
    assert not [name for name in RENAMED_FUNCTIONS if f"{name}(" not in page]
    assert not [name for name in RENAMED_SETTINGS if f"`{name}`" not in page and f"`lora.{name}`" not in page]


def test_what_the_seeds_names_are_replaced_by_exists():
    functions = {text.removeprefix("it is ").partition("(")[0] for text in RENAMED_FUNCTIONS.values()}
    assert functions <= set(sam3_lora.__all__)
