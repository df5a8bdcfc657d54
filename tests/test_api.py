"""The public names of the package."""

import inspect
import subprocess
import sys

import pytest

import sam3_lora


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
