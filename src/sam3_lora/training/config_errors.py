"""What Hydra says about a config that does not hold together, in words that name the file, the key and what to do."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, InterpolationResolutionError

from sam3_lora.errors import ConfigError, did_you_mean

_HEADER = re.compile(r"^#\s*@package\s+(\S+)")
_OPTIONS = ("-c", "--config")


def explain_config_errors(arguments: Sequence[str]) -> None:
    """Refuse a config without its first line, and from here on explain the errors of Hydra that end the program.

    Args:
        arguments: Of the official training script.

    Raises:
        ConfigError: If the file would be read, and have no effect.
    """
    for option, value in pairwise(arguments):
        if option in _OPTIONS:
            _check_header(value)
    hook = sys.excepthook

    def explained_last(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
        hook(kind, error, trace)
        if text := explanation(error):
            print(f"\nsam3_lora.errors.ConfigError: {text}", file=sys.stderr, flush=True)

    sys.excepthook = explained_last


def explanation(error: BaseException) -> str | None:
    """Return in one line what an error of OmegaConf means, or ``None`` if there is nothing to add."""
    if not isinstance(error, InterpolationResolutionError):  # the base class of the two
        return None
    key = error.full_key
    if isinstance(error, InterpolationKeyError) and (found := re.search(r"key '([^']+)'", str(error))):
        node: Any = error.parent_node
        root = node._get_root() if node is not None else OmegaConf.create()
        return f"{key} refers to ${{{found[1]}}}, and there is no such key{_close(found[1], root)}"
    if variable := re.search(r"Environment variable '([^']+)' not found", str(error)):
        return (
            f"{key} takes the environment variable {variable[1]}, which is not set: export {variable[1]}=..., or set {key} in "
            "a YAML of your own"
        )
    return None


def _close(key: str, root: Any) -> str:
    """Return the close match to the first name of a dotted key that is not there, and what is."""
    names, node = key.split("."), root
    for depth, name in enumerate(names):
        if not isinstance(node, DictConfig) or name not in node:
            known = [str(known) for known in node] if isinstance(node, DictConfig) else []
            where = ".".join(names[:depth]) or "the config"
            return f"{did_you_mean(name, known)} ({where} has {', '.join(known)})"
        node = node._get_node(name)
    return ""


def _check_header(config: str) -> None:
    """Hydra takes the folder of a config as the place of its keys, unless its first line says otherwise."""
    file = Path(config if config.endswith(".yaml") else f"{config}.yaml")
    if len(file.parts) < 2 or not file.is_file():  # a name of ours, or a file in the working folder
        return
    with file.open(encoding="utf-8") as lines:
        if any(_HEADER.match(line) for line in lines):
            return
    package = ".".join(part for part in file.parent.parts if part != "/")
    raise ConfigError(
        f"{config} would have no effect: Hydra takes its keys as keys of {package!r}, after its folder; make '# @package "
        "_global_' its first line"
    )
