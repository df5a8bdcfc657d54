"""Label files as data: JSON, YAML, XML and text, read so that no file can do harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

import yaml
from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from sam3_lora.data.coco import decoded
from sam3_lora.errors import DataError


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file; a byte order mark is left out.

    Raises:
        DataError: If it cannot be read or is not UTF-8.
    """
    return decoded(path, "utf-8-sig")


def head_of(path: Path) -> bytes:
    """Return the first bytes of a file, enough to tell formats apart; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(4096)
    except OSError:
        return b""


def read_json(path: Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        DataError: If it cannot be read, is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(read_text(path))
    except RecursionError as error:
        raise DataError(f"{path} is not usable JSON: it is nested too deeply") from error
    except (ValueError, MemoryError) as error:
        raise DataError(f"{path} is not valid JSON: {error or 'too large'}") from error


def read_yaml(path: Path) -> Any:
    """Return the value in a YAML file of plain values.

    Raises:
        DataError: If it cannot be read, is not YAML, or asks for objects by tags such as ``!!python/object``.
    """
    text = read_text(path)
    try:
        return yaml.safe_load(text)
    except RecursionError as error:
        raise DataError(f"{path} is not usable YAML: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise DataError(f"{path} is not usable YAML: {' '.join(str(error).split())}") from error


def read_xml(path: Path) -> Element:
    """Return the root of an XML file, which may not define entities.

    Raises:
        DataError: If it cannot be read, is not XML, or defines entities.
    """
    try:
        root: Element = fromstring(path.read_bytes(), forbid_dtd=True)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except DefusedXmlException as error:
        raise DataError(f"{path} has a DOCTYPE, which label files do not need and attacks do") from error
    except (ParseError, ValueError, LookupError, RecursionError) as error:
        raise DataError(f"{path} is not valid XML: {error}") from error
    return root
