"""What the name of a base model stands for, and where its checkpoint file is. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from sam3_lora.errors import CheckpointError, did_you_mean

DEFAULT = "facebook/sam3"
BASES = ("tiny", "random", DEFAULT)
CHECKPOINT_FILE = "sam3.pt"

_STEPS_TO_GET_IT = f"""\
  1. ask for access at https://huggingface.co/{DEFAULT} (Meta answers within hours or days)
  2. make a read token at https://huggingface.co/settings/tokens
  3. run 'hf auth login', or set HF_TOKEN
or name a file that you have: --base /path/to/{CHECKPOINT_FILE}
Without it, the base 'tiny' runs every command on a small model, and 'random' is the full size, untrained."""


@dataclass(frozen=True)
class BaseInfo:
    """What a run must know of a base before it is built: side of its square input in pixels, number of queries."""

    resolution: int
    num_queries: int


TINY = BaseInfo(resolution=112, num_queries=16)
FULL_SIZE = BaseInfo(resolution=1008, num_queries=200)


def base_info(base: str) -> BaseInfo:
    """Return the sizes of a base by the name that :func:`sam3_lora.load_base` takes, without loading it."""
    return TINY if base == "tiny" else FULL_SIZE


def absolute_base(base: str) -> str:
    """Return a base as a run records it: a file by its absolute path, anything else by its name."""
    path = Path(base).expanduser()
    return str(path.resolve()) if path.is_file() else base


def check_base(base: str) -> None:
    """Do nothing if a name can stand for a base; that a Hub repository exists is not found out.

    Raises:
        CheckpointError: If there is no such base or file.
    """
    if base in BASES:
        return
    if _is_file(base):
        existing_checkpoint(Path(base).expanduser())
    elif base.count("/") != 1 or base.startswith((".", "/", "~")):
        raise CheckpointError(
            f"unknown base {base!r}{did_you_mean(base, BASES)} (a base is one of {', '.join(BASES)}, "
            f"a Hub repository, or the path of a {CHECKPOINT_FILE})"
        )


def find_checkpoint(base: str) -> Path | None:
    """Return the checkpoint file of a base, downloading it if need be; ``None`` if the base needs none.

    Raises:
        CheckpointError: If there is no such base or file, or no access to it; it says how to get it.
    """
    check_base(base)
    if base in ("tiny", "random"):
        return None
    return Path(base).expanduser() if _is_file(base) else hub_checkpoint(base)


def _is_file(base: str) -> bool:
    path = Path(base).expanduser()
    return path.suffix in {".pt", ".pth"} or path.exists()


def existing_checkpoint(path: Path) -> Path:
    """Return ``path`` if it is a file.

    Raises:
        CheckpointError: If it is not; it lists the steps to get the official file.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {str(path)!r}. To get Meta's:\n{_STEPS_TO_GET_IT}")
    return path


def hub_checkpoint(repo_id: str = DEFAULT) -> Path:
    """Return the path of the checkpoint in the local Hub cache, downloading it (3.4 GB) if need be.

    Raises:
        CheckpointError: Without access, network or file; it lists the steps to get them.
    """
    try:
        with _one_error_is_enough():
            return Path(hf_hub_download(repo_id=repo_id, filename=CHECKPOINT_FILE))
    except GatedRepoError:
        reason = "this account has no access to it"
    except RepositoryNotFoundError:
        reason = "it does not exist, or not for this account"
    except LocalEntryNotFoundError:
        reason = "it is not in the local cache and the Hub could not be reached"
    except EntryNotFoundError:
        reason = f"it holds no {CHECKPOINT_FILE!r}"
    except (HfHubHTTPError, OSError) as error:
        reason = f"the download failed ({type(error).__name__}: {error})"
    raise CheckpointError(f"cannot get the checkpoint {repo_id!r}: {reason}. To get it:\n{_STEPS_TO_GET_IT}")


@contextmanager
def _one_error_is_enough() -> Iterator[None]:
    """Keep the Hub client's warnings of each retry off the screen; progress bars stay."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
