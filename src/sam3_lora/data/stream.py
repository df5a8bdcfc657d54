"""A COCO file read entry by entry, so that memory does not grow with it."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sam3_lora.errors import DataError

LISTS = ("images", "annotations", "categories")

_BLOCK = 1 << 20  # characters read at once
_MORE = 64  # a value that ends so near the end of what was read may go on: 12 and then 34
_UNTERMINATED = "Unterminated string"  # reported where it begins
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def read_entries(
    path: Path, byte_order_mark: bool = False, on_read: Callable[[int], None] | None = None
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield each entry of the three lists of a COCO file, in the order of the file, as (name of the list, position, entry).

    Entries are objects, whatever they hold; all else of the file is passed over.

    Args:
        path: The file.
        byte_order_mark: Let the file begin with one, which the official loader refuses.
        on_read: Called with the number of bytes that were read, now and then.

    Raises:
        DataError: If the file cannot be read, is not whole, or is not a COCO document; perhaps after many entries.
    """
    with _problems_named(path), path.open("rb") as file:
        text = _Text(file, on_read)
        if byte_order_mark and text.peek() == "\ufeff":
            text.take("\ufeff")
        found = set()
        for key in _keys(text):
            if key not in LISTS:
                text.value()
                continue
            if key in found:
                raise _NotCoco(f"it has {key!r} twice")
            found.add(key)
            for position, entry in enumerate(_items(text, key)):
                if not isinstance(entry, dict):
                    raise _NotCoco(f"{key}[{position}] is {str(entry)[:40]!r}, not an object")
                yield key, position, entry
        text.expect_end()
        if missing := [key for key in LISTS if key not in found]:
            raise _NotCoco(f"it has no {' and no '.join(map(repr, missing))}")


class _NotCoco(ValueError):
    """JSON, but of another outline."""


class _NotJson(ValueError):
    """No JSON."""


@contextmanager
def _problems_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except _NotCoco as error:
        raise DataError(f"{path} is not a COCO document: {error}") from error
    except _NotJson as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason}") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of thousands of digits, thousands of open brackets
        raise DataError(f"{path} is not usable JSON: {error}") from error


class _Text:
    """The text of a file from some place on, of which only a part is in memory."""

    def __init__(self, file: IO[bytes], on_read: Callable[[int], None] | None) -> None:
        self._file, self._on_read = file, on_read
        self._bytes = b""  # the beginning of a character whose end was not read yet
        self._bytes_before = 0
        self._buffer = ""
        self._at = 0
        self._ended = False
        self._line, self._column = 1, 1  # of the buffer's beginning

    def peek(self) -> str:
        """Return the next character that is no space, or ``""`` at the end."""
        while True:
            self._at = _SPACE.match(self._buffer, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._read(_BLOCK):
                return ""

    def take(self, characters: str) -> str:
        """Return the next character that is no space, which must be one of these."""
        found = self.peek()
        if not found or found not in characters:
            raise self._error(f"Expecting {' or '.join(map(repr, characters))}")
        self._at += 1
        return found

    def value(self) -> Any:
        """Return the next value, whole."""
        self.peek()
        size = _BLOCK
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                far = len(self._buffer) - error.pos > _MORE and not error.msg.startswith(_UNTERMINATED)
                if far or self._ended:
                    raise self._error(error.msg, error.pos) from None
            else:
                if end + _MORE < len(self._buffer) or self._ended:
                    self._at = end
                    return value
            self._read(size)
            size *= 2  # so that a value of any length is parsed a few times only

    def expect_end(self) -> None:
        if self.peek():
            raise self._error("Extra data")

    def _read(self, size: int) -> bool:
        self._forget(self._at)
        read = self._file.read(size)
        self._ended = not read
        block = self._bytes + read
        try:
            more, used = codecs.utf_8_decode(block, "strict", self._ended)
        except UnicodeDecodeError as error:
            error.reason = f"byte {self._bytes_before + error.start} is {block[error.start]:#04x}"
            raise
        self._bytes, self._bytes_before = block[used:], self._bytes_before + used
        self._buffer += more
        if self._on_read:
            self._on_read(self._bytes_before)
        return not self._ended

    def _forget(self, end: int) -> None:
        """Drop the buffer up to here."""
        self._line, self._column = self._place(end)
        self._buffer, self._at = self._buffer[end:], 0

    def _place(self, at: int) -> tuple[int, int]:
        """Return line and column of a place in the buffer."""
        if lines := self._buffer.count("\n", 0, at):
            return self._line + lines, at - self._buffer.rindex("\n", 0, at)
        return self._line, self._column + at

    def _error(self, message: str, at: int | None = None) -> _NotJson:
        at = self._at if at is None else at
        line, column = self._place(at)
        # An open string is reported where it begins, so that place says nothing about the end of the file.
        unterminated = message.startswith(_UNTERMINATED)
        cut_off = unterminated or (self._ended and at >= len(self._buffer.rstrip()) - len("fals"))
        ending = "; the file ends too early, like a copy that was cut off" if cut_off else ""
        return _NotJson(f"{message}: line {line} column {column}{ending}")


def _keys(text: _Text) -> Iterator[str]:
    """Yield the keys of the outermost object, each in front of its value."""
    if text.peek() == "\ufeff":
        raise _NotJson("it begins with a byte order mark, which the official loader refuses; save it without")
    if text.peek() and text.peek() != "{":
        kind = type(text.value()).__name__
        raise _NotCoco(f"it holds a {kind}, not an object with 'images', 'annotations' and 'categories'")
    text.take("{")
    if text.peek() == "}":
        text.take("}")
        return
    while True:
        if text.peek() != '"':
            text.take('"')
        key = text.value()
        text.take(":")
        yield key
        if text.take(",}") == "}":
            return


def _items(text: _Text, key: str) -> Iterator[Any]:
    if text.peek() != "[":
        raise _NotCoco(f"{key!r} is a {type(text.value()).__name__}, not a list")
    text.take("[")
    if text.peek() == "]":
        text.take("]")
        return
    while True:
        text.peek()
        yield text.value()
        if text.take(",]") == "]":
            return
