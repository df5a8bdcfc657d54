"""The BPE vocabulary of the text encoder, which the sam3 wheel does not carry."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from sam3_lora.errors import CheckpointError

FILE_NAME = "bpe_simple_vocab_16e6.txt.gz"


def bpe_path() -> Path:
    """Return the path of the vocabulary file inside the installed ``open_clip_torch`` package.

    It is CLIP's own vocabulary, the same bytes that Meta's repository keeps at ``sam3/assets``.

    Raises:
        CheckpointError: If ``open_clip_torch`` is missing or no longer carries the file.
    """
    try:
        path = Path(str(files("open_clip") / FILE_NAME))
    except ModuleNotFoundError:
        path = Path(FILE_NAME)
    if not path.is_file():
        raise CheckpointError(
            f"the BPE vocabulary {FILE_NAME!r} was not found in the package 'open_clip_torch'; "
            "reinstall it with 'pip install --force-reinstall open_clip_torch'"
        )
    return path
