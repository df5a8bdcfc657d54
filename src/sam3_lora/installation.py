"""Examine an installation: each line says what is there, whether that is good, and what to do about it if not.

Everything beyond the standard library is imported inside the checks: a package that cannot be imported is a finding.
"""

from __future__ import annotations

import hashlib
import importlib
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from packaging.requirements import Requirement

Status = Literal["good", "warning", "bad"]

_OURS = "sam3-lora"
_IMPORTED = ("torch", "torchvision", "sam3", "peft", "transformers", "huggingface_hub")
_GIGABYTE = 1e9
_LEAST_FREE, _ENOUGH_FREE = 1 * _GIGABYTE, 10 * _GIGABYTE
_CHECKPOINT_BYTES = 3.4 * _GIGABYTE  # sam3.pt of facebook/sam3
_HUB_TIMEOUT = 5.0  # seconds


@dataclass(frozen=True)
class Finding:
    """One line of the examination. ``fix`` says what to do, and is empty where nothing need be done."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def doctor(folder: str | Path = ".", *, offline: bool = False) -> list[Finding]:
    """Examine Python, packages, GPU, vocabulary, Hub access, checkpoint, disk and the tiny base; change nothing.

    A warning is something that works with less, such as a machine without a GPU; bad is what stops a command.

    Args:
        folder: Where results are to be written.
        offline: Ask nothing of the network: leave out whether the Hub token has access to the official checkpoint.
    """
    folder = Path(folder)
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("Python", _python),
        ("packages", _packages),
        ("GPU", _gpu),
        ("triton", _triton),
        ("BPE vocabulary", _vocabulary),
        ("tiny base", _tiny_base),
        ("checkpoint", lambda: _checkpoint(offline)),
        ("disk", lambda: _disk(folder)),
        ("write access", lambda: _write_access(folder)),
    ]
    return [finding for name, check in checks for finding in _examined(name, check)]


def _examined(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except (
        Exception
    ) as error:  # what a broken installation raises cannot be known; it must not hide the other lines
        fix = "see the other lines; if they are good, reinstall the package that it names"
        yield Finding(name, "bad", f"cannot be examined: {_short(error)}", fix)


def _python() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    supported = SpecifierSet(metadata(_OURS)["Requires-Python"])
    found = platform.python_version()
    if supported.contains(found, prereleases=True):
        yield Finding("Python", "good", found)
    else:
        yield Finding(
            "Python", "bad", f"{found}, needs {supported}", f"make an environment of Python {supported}"
        )


def _packages() -> Iterator[Finding]:
    """Yield a line for each package that matters most, and one for the rest of our requirements."""
    needed = {name: requirement for name, requirement in _requirements().items() if name != "triton"}
    for name in _IMPORTED:
        yield _package(needed.pop(name), with_import=True)
    rest = [_package(requirement) for requirement in needed.values()]
    wrong = [finding for finding in rest if finding.status != "good"]
    yield from wrong or [Finding("other packages", "good", ", ".join(f"{f.name} {f.detail}" for f in rest))]


def _requirements() -> dict[str, Requirement]:
    """Return what our own package metadata asks for on this machine, by name with underscores."""
    from packaging.requirements import Requirement

    parsed = map(Requirement, requires(_OURS) or [])
    return {
        requirement.name.replace("-", "_"): requirement
        for requirement in parsed
        if requirement.marker is None or requirement.marker.evaluate()
    }


def _package(requirement: Requirement, with_import: bool = False) -> Finding:
    name = requirement.name
    install = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "bad", f"not installed, needs {requirement.specifier}", install)
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding(name, "bad", f"{found}, needs {requirement.specifier}", install)
    if with_import and (problem := _import_problem(name.replace("-", "_"))):
        return Finding(name, "bad", f"{found} cannot be imported: {problem}", f"{install} --force-reinstall")
    return Finding(name, "good", f"{found} ({requirement.specifier})")


def _import_problem(name: str) -> str:
    """Return why a package cannot be imported, or ``""``."""
    try:
        if (
            name == "sam3"
        ):  # needs help where there is no triton, and most of it is imported by the builder only
            from sam3_lora.base.cpu import provide_triton

            provide_triton()
            name = "sam3.model_builder"
        importlib.import_module(name)
    except Exception as error:  # torchvision for another torch raises RuntimeError, a missing library OSError
        return _short(error)
    return ""


def _gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        fix = (
            "for a machine with a GPU: install a CUDA build of torch, https://pytorch.org/get-started/locally"
            if torch.version.cuda is None
            else "for a machine with a GPU: 'nvidia-smi' must list it; if it does not, install its driver"
        )
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
        detail = f"no CUDA GPU (torch is built for {build}); the base 'tiny' runs well on the CPU, the full size slowly"
        yield Finding("GPU", "warning", detail, fix)
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        detail = f"{gpu.name}, {gpu.total_memory / _GIGABYTE:.0f} GB, CUDA {torch.version.cuda}"
        yield Finding(f"GPU {index}", "good", detail)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("bfloat16", "good", "in hardware")
    else:
        fix = "take a GPU of compute capability 8.0 or newer, or train with training.amp_enabled=false"
        yield Finding("bfloat16", "warning", "emulated, slow", fix)


def _triton() -> Iterator[Finding]:
    import torch

    try:
        yield Finding("triton", "good", version("triton"))
    except PackageNotFoundError:
        if torch.cuda.is_available():
            yield Finding(
                "triton", "bad", "not installed; the losses of sam3 need it on a GPU", "pip install triton"
            )
        else:
            yield Finding("triton", "good", "not installed; only a GPU needs it")


def _vocabulary() -> Iterator[Finding]:
    from sam3_lora.base.vocabulary import FILE_NAME, bpe_path
    from sam3_lora.errors import CheckpointError

    try:
        size = bpe_path().stat().st_size
    except CheckpointError as error:
        yield Finding("BPE vocabulary", "bad", str(error), "pip install --force-reinstall open_clip_torch")
    else:
        yield Finding("BPE vocabulary", "good", f"{FILE_NAME}, {size / 1e6:.1f} MB")


def _tiny_base() -> Iterator[Finding]:
    from sam3_lora.base.tiny import WEIGHTS_SHA256, packaged_weights

    path = packaged_weights()
    fix = "reinstall sam3-lora"
    if not path.is_file():
        yield Finding("tiny base", "bad", f"no file {path}", fix)
        return
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found == WEIGHTS_SHA256:
        yield Finding("tiny base", "good", f"SHA-256 {found[:12]}")
    else:
        yield Finding(
            "tiny base", "bad", f"damaged: SHA-256 {found[:12]}, expected {WEIGHTS_SHA256[:12]}", fix
        )


def _checkpoint(offline: bool) -> Iterator[Finding]:
    """Yield where the official checkpoint is, and unless it is here, whether it can be had."""
    from huggingface_hub import get_token, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    from sam3_lora.base.checkpoint import CHECKPOINT_FILE, DEFAULT

    cached = try_to_load_from_cache(DEFAULT, CHECKPOINT_FILE)
    if isinstance(cached, str):
        size = Path(cached).stat().st_size / _GIGABYTE
        yield Finding("checkpoint", "good", f"{DEFAULT} in the cache, {size:.1f} GB: {cached}")
        return
    yield _room_for_checkpoint(Path(HF_HUB_CACHE))
    token = get_token()
    if token is None:
        yield Finding(
            "Hub token",
            "warning",
            f"none; only the base {DEFAULT!r} needs one",
            "make a read token at https://huggingface.co/settings/tokens, then 'hf auth login' or set HF_TOKEN",
        )
    else:
        yield Finding("Hub token", "good", "found")
    if not offline:
        yield _access(token)


def _room_for_checkpoint(cache: Path) -> Finding:
    from sam3_lora.base.checkpoint import DEFAULT

    detail = f"{DEFAULT} is not in the cache {cache}"
    fix = f"it comes with the first use of the base {DEFAULT!r} ({_CHECKPOINT_BYTES / _GIGABYTE:.1f} GB)"
    if (free := _free_bytes(cache)) < _CHECKPOINT_BYTES:
        detail += f", which has {free / _GIGABYTE:.1f} GB free"
        fix += "; make room, or set HF_HOME to a folder on a larger disk"
    return Finding("checkpoint", "warning", detail, fix)


def _access(token: str | None) -> Finding:
    """Return whether the official checkpoint may be downloaded; one request, a few seconds at most."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    from sam3_lora.base.checkpoint import CHECKPOINT_FILE, DEFAULT

    ask = f"ask for access at https://huggingface.co/{DEFAULT} (Meta answers within hours or days)"
    url = huggingface_hub.hf_hub_url(DEFAULT, CHECKPOINT_FILE)
    try:
        huggingface_hub.get_hf_file_metadata(url, token=token or False, timeout=_HUB_TIMEOUT)
    except GatedRepoError:
        who = "this token has" if token else "without a token there is"
        return Finding("Hub access", "warning", f"{who} no access to {DEFAULT}", ask)
    except RepositoryNotFoundError:  # also the answer to a token that is not valid
        fix = "make a new token at https://huggingface.co/settings/tokens, then 'hf auth login'"
        return Finding("Hub access", "warning", f"the Hub refuses this token for {DEFAULT}", fix)
    except HfHubHTTPError as error:
        return Finding("Hub access", "warning", f"the Hub answers {_short(error)}", "try again later")
    except Exception as error:  # requests, httpx and the client's offline mode share no class of their own
        fix = "check the network and HF_HUB_OFFLINE, or leave this out with --offline"
        return Finding("Hub access", "warning", f"the Hub cannot be reached: {_short(error)}", fix)
    return Finding("Hub access", "good", f"{DEFAULT} may be downloaded")


def _disk(folder: Path) -> Iterator[Finding]:
    free = _free_bytes(folder)
    detail = f"{free / _GIGABYTE:.1f} GB free in {folder.resolve()}"
    fix = "make room, or work on a larger disk: a run keeps its checkpoint and an adapter for each epoch"
    if free >= _ENOUGH_FREE:
        yield Finding("disk", "good", detail)
    else:
        yield Finding("disk", "warning" if free >= _LEAST_FREE else "bad", detail, fix)


def _free_bytes(folder: Path) -> int:
    """Return the free space where a folder is, or would be made."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _write_access(folder: Path) -> Iterator[Finding]:
    try:
        with tempfile.TemporaryFile(dir=folder):
            yield Finding("write access", "good", str(folder.resolve()))
    except OSError as error:
        fix = "work in a folder of your own, or give yourself the right to write here"
        yield Finding("write access", "bad", f"{folder.resolve()} cannot be written: {error.strerror}", fix)


def _short(error: BaseException) -> str:
    """Return the class and the first line of an error."""
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line[:160]}" if first_line else type(error).__name__
