"""What reading a picture's header and decoding its pixels have in common: places in its file."""

from __future__ import annotations

import bisect
import io
import itertools
import math
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias

from pacevlm.errors import ImageError

Part: TypeAlias = "tuple[int, int] | bytes"

_ORIENTATION = 0x0112
TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
"""Bytes of one value of each type of a TIFF entry."""


@dataclass(frozen=True)
class Header:
    """What the head of a file says.

    Attributes:
        format: `JPEG`, `PNG`, `WEBP`, `GIF`, `BMP` or `TIFF`.
        width: pixels, as stored.
        height: pixels, as stored.
        kind: see the module.
        orientation: how the EXIF tag says that the stored pixels are turned, 1 to 8.
        parts: the file that a decoder is given: bytes, or places (from, to) in the real one.
        capacity: most pixels that the compressed bytes can hold; a file that claims more is damaged or a trap.
    """

    format: str
    width: int
    height: int
    kind: str
    orientation: int
    parts: tuple[Part, ...]
    capacity: float = math.inf


def damaged(what: str) -> ImageError:
    """The error of a file that says something impossible."""
    return ImageError(f"cannot be read; it is probably truncated or corrupt: {what}")


def read_bytes(file: BinaryIO, offset: int, size: int) -> bytes:
    """Bytes at a place; raises ImageError if the file ends before."""
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise damaged("it ends within its header")
    return data


class PartsFile(io.RawIOBase):
    """The file that a decoder is given: parts of a real one and bytes, one behind the other."""

    def __init__(self, file: BinaryIO, parts: Sequence[Part]) -> None:
        super().__init__()
        self._file, self._parts, self._at = file, parts, 0
        self._ends = list(
            itertools.accumulate(len(part) if isinstance(part, bytes) else part[1] - part[0] for part in parts)
        )

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As any file."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._ends[-1]}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """As any file; what is left of one part at most."""
        index = bisect.bisect_right(self._ends, self._at)
        if index == len(self._ends):
            return 0
        part, left = self._parts[index], self._ends[index] - self._at
        size = min(left, len(buffer))
        if isinstance(part, bytes):
            data = part[len(part) - left :][:size]
        else:
            self._file.seek(part[1] - left)
            data = self._file.read(size)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def tiff_entries(file: BinaryIO, order: str, base: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Tag, type, count and the place of the value, of every entry of the first directory."""
    table_at = base + struct.unpack(f"{order}I", read_bytes(file, base + 4, 4))[0] + 2
    (count,) = struct.unpack(f"{order}H", read_bytes(file, table_at - 2, 2))
    table = read_bytes(file, table_at, 12 * min(count, max(end - table_at, 0) // 12))
    for at in range(0, len(table), 12):
        tag, kind, length, value = struct.unpack_from(f"{order}HHII", table, at)
        yield tag, kind, length, (table_at + at + 8 if length * TIFF_SIZES.get(kind, 0) <= 4 else base + value)


def read_orientation(file: BinaryIO, start: int, end: int) -> int:
    """The orientation tag of EXIF data at a place in a file, 1 to 8; 1 where the data is damaged or has none."""
    try:
        if read_bytes(file, start, 6) == b"Exif\0\0":
            start += 6
        order = {b"II*\0": "<", b"MM\0*": ">"}[read_bytes(file, start, 4)]
        for tag, kind, count, place in tiff_entries(file, order, start, end):
            if tag == _ORIENTATION and count == 1 and kind in (3, 4):
                value = struct.unpack(f"{order}{'H' if kind == 3 else 'I'}", read_bytes(file, place, TIFF_SIZES[kind]))[
                    0
                ]
                return int(value) if 1 <= value <= 8 else 1
    except (ImageError, KeyError, struct.error):
        pass
    return 1
