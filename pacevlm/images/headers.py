"""What a picture's file says before any pixel is decoded: its size, its orientation and what decoding it will cost.

Only these formats are read, each by the chunks that pixels depend on. Profiles, comments, thumbnails, further pages and
frames are stepped over: they can be damaged or huge, and a decoder never sees them.

| kind | file |
|---|---|
| `jpeg` | baseline JPEG, grey or colour, the first picture of MPO files too |
| `progressive jpeg` | progressive JPEG, or one whose channels come one after the other |
| `cmyk jpeg`, `arithmetic jpeg` | JPEG of four inks; JPEG with arithmetic coding |
| `png` | 8-bit grey, RGB or palette without transparency, not interlaced |
| `png with transparency`, `interlaced png`, `16-bit png`, `1-bit png`, `2-bit png`, `4-bit png` | other PNG |
| `webp` | lossy WebP without transparency |
| `lossless webp`, `webp with transparency`, `animated webp` | other WebP |
| `gif`, `bmp`, `tiff` | the first frame or page of any other listed file |
| `turned ...` | any of these whose orientation turns its pixels |
"""

from __future__ import annotations

import itertools
import math
import struct
import zlib
from collections.abc import Callable
from typing import BinaryIO

from pacevlm.errors import ImageError
from pacevlm.images.parts import TIFF_SIZES, Header, Part, damaged, read_bytes, read_orientation, tiff_entries

FORMATS = "JPEG, PNG, WebP, GIF, BMP and TIFF"

# A file may not keep a reader busy with pieces that hold nothing.
_MAX_PIECES = 100_000
# Every scan of a progressive JPEG passes over all pixels; encoders make about ten.
_MAX_SCANS = 100

# What other files begin with, and what to do about them.
_CONVERT = "convert it to JPEG or PNG"
_FOREIGN = (
    (b"%PDF", f"a PDF document; {_CONVERT}"),
    (b"%!PS", f"PostScript (EPS); {_CONVERT}"),
    (b"\xc5\xd0\xd3\xc6", f"PostScript (EPS); {_CONVERT}"),
    (b"8BPS", f"a Photoshop file; {_CONVERT}"),
    (b"\0\0\x01\0", f"an icon (ICO); {_CONVERT}"),
    (b"\0\0\0\x0cjP", f"JPEG 2000; {_CONVERT}"),
    (b"\xff\x4f\xff\x51", f"JPEG 2000; {_CONVERT}"),
    (b"\0\0\0\x0cJXL", f"JPEG XL; {_CONVERT}"),
    (b"\xff\x0a", f"JPEG XL; {_CONVERT}"),
    (b"PK\x03\x04", "a ZIP archive; unpack it first"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    *((f"P{digit}".encode(), f"PPM, PGM, PBM or PFM; {_CONVERT}") for digit in "123456Ff"),
)


def read_header(file: BinaryIO, num_bytes: int) -> Header:
    """Read the head of a picture's file.

    Raises:
        ImageError: the file is of another format, or its head is damaged; the message lacks the file's name.
    """
    head = read_bytes(file, 0, min(num_bytes, 1024))
    for start, reader in (
        (b"\xff\xd8", _jpeg),
        (b"\x89PNG\r\n\x1a\n", _png),
        (b"GIF87a", _gif),
        (b"GIF89a", _gif),
        (b"BM", _bmp),
        (b"II*\0", _tiff),
        (b"MM\0*", _tiff),
    ):
        if head.startswith(start):
            return _whole(reader, file, num_bytes)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _whole(_webp, file, num_bytes)
    raise ImageError(f"is not an image, or of an unknown format{_foreign(head)}; {FORMATS} files can be read")


def _whole(reader: Callable[[BinaryIO, int], Header], file: BinaryIO, num_bytes: int) -> Header:
    try:
        return reader(file, num_bytes)
    except (struct.error, ValueError, ArithmeticError) as error:
        if isinstance(error, ImageError):
            raise
        raise damaged(str(error)) from error


def _foreign(head: bytes) -> str:
    if head[4:8] == b"ftyp":
        return f": it is {'AVIF' if head[8:11] == b'avi' else 'HEIC or a film'}; {_CONVERT}"
    if head[:4] in (b"II+\0", b"MM\0+"):
        return f": it is BigTIFF; {_CONVERT}"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<svg", b"<?xml", b"<!doctype svg")) and b"<svg" in text:
        return f": it is an SVG drawing; {_CONVERT}"
    if text.startswith((b"<html", b"<!doctype html")):
        return ": it is a web page, perhaps saved in place of the picture; download the picture itself"
    return next((f": it is {what}" for start, what in _FOREIGN if head.startswith(start)), "")


def _too_many_scans() -> ImageError:
    return ImageError(f"has more than {_MAX_SCANS} scans, which would keep a decoder busy; save it again")


def _jpeg(file: BinaryIO, num_bytes: int) -> Header:
    offset, orientation, frame = 2, 0, None
    parts: list[Part] = [(0, 2)]
    for _ in range(_MAX_PIECES):
        fill, marker = read_bytes(file, offset, 2)
        if fill != 0xFF or marker == 0:
            raise damaged("a JPEG marker is missing")
        if marker in (0x01, 0xD8, *range(0xD0, 0xD8)) or marker == 0xFF:
            offset += 1 if marker == 0xFF else 2
            continue
        if marker == 0xD9:
            break
        (length,) = struct.unpack(">H", read_bytes(file, offset + 2, 2))
        end = offset + 2 + length
        content = read_bytes(file, offset + 4, min(max(length - 2, 0), 18))
        # Of application data, the two pieces that tell how colours are coded are kept where they are whole.
        is_needed = marker < 0xE0
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if frame is not None or len(content) < 6:
                raise damaged("its frame header is malformed or given twice")
            frame = (marker, *struct.unpack(">BHHB", content[:6]))
        elif marker == 0xE0:
            is_needed = content[:5] == b"JFIF\0" and length >= 16
        elif marker == 0xEE:
            is_needed = content[:5] == b"Adobe" and length >= 14
        elif marker == 0xE1 and content[:6] == b"Exif\0\0" and not orientation:
            orientation = read_orientation(file, offset + 4, min(end, num_bytes))
        elif marker == 0xDA and frame is not None:
            parts.append((offset, num_bytes))
            return _jpeg_header(file, frame, content[0] if content else 0, orientation or 1, parts)
        if is_needed:
            parts.append((offset, end))
        offset = end
    raise damaged("it holds no JPEG pixels")


def _jpeg_header(
    file: BinaryIO, frame: tuple[int, ...], first_scan: int, orientation: int, parts: list[Part]
) -> Header:
    marker, precision, height, width, channels = frame
    if marker not in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA) or precision != 8:
        raise ImageError(f"is lossless, hierarchical or {precision}-bit JPEG, which cannot be read; {_CONVERT}")
    is_progressive = marker in (0xC2, 0xCA) or first_scan < channels
    is_arithmetic = marker >= 0xC9
    kind = "progressive jpeg" if is_progressive else "jpeg"
    if is_arithmetic:
        kind = "arithmetic jpeg"
    elif channels == 4:
        kind = "cmyk jpeg"
    if is_progressive and _num_scans(file, parts[-1]) > _MAX_SCANS:
        raise _too_many_scans()
    # Huffman codes have a bit at least, and each block of 64 pixels one such code at least.
    start, end = parts[-1]
    capacity = math.inf if is_arithmetic else 512.0 * (int(end) - int(start))
    return Header("JPEG", width, height, kind, orientation, tuple(parts), capacity)


def _num_scans(file: BinaryIO, part: Part) -> int:
    """Scans up to the end of the picture; within coded pixels 0xFF is never followed by a marker's byte."""
    file.seek(int(part[0]))
    left, scans, last = int(part[1]) - int(part[0]), 0, b""
    while left > 0 and (block := file.read(min(left, 1 << 16))):
        left -= len(block)
        block = last + block
        end = block.find(b"\xff\xd9")
        scans += block.count(b"\xff\xda", 0, end if end >= 0 else len(block))
        last = block[-1:] if block.endswith(b"\xff") else b""
        if end >= 0 or scans > _MAX_SCANS:
            break
    return scans


def _png(file: BinaryIO, num_bytes: int) -> Header:
    length, name = struct.unpack(">I4s", read_bytes(file, 8, 8))
    if (length, name) != (13, b"IHDR"):
        raise damaged("it does not begin with a PNG header")
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", read_bytes(file, 16, 13))
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 0)
    if not channels or depth not in (1, 2, 4, 8, 16):
        raise damaged(f"there is no PNG of colour type {colour} and {depth} bits")
    offset, orientation, compressed, is_transparent = 33, 1, 0, colour >= 4
    parts: list[Part] = [(0, offset)]
    for _ in range(_MAX_PIECES):
        if offset + 8 > num_bytes:
            break
        length, name = struct.unpack(">I4s", read_bytes(file, offset, 8))
        start, end = offset, offset + 12 + length
        offset = end
        if name == b"IEND":
            break
        if name == b"IDAT":
            compressed += min(end, num_bytes) - start
            previous = parts[-1]
            if isinstance(previous, tuple) and previous[1] == start:
                parts[-1] = (previous[0], min(end, num_bytes))
            else:
                parts.append((start, min(end, num_bytes)))
        elif name == b"PLTE" and not compressed:
            parts.append((start, min(end, num_bytes)))
        elif name == b"tRNS" and not compressed and colour < 4:
            is_transparent = True
            parts.append(_png_transparency(file, start, length, colour, depth))
        elif name == b"eXIf":
            orientation = read_orientation(file, start + 8, min(end - 4, num_bytes))
    else:
        raise ImageError(f"consists of more than {_MAX_PIECES:,} pieces; save it again")
    parts.append(_png_chunk(b"IEND", b""))
    kind = "png" if depth == 8 else f"{depth}-bit png"
    if is_transparent:
        kind = "png with transparency"
    if interlaced:
        kind = "interlaced png"
    # Deflate makes at most 1032 bytes of one.
    capacity = 1032 * compressed * 8 / (channels * depth)
    return Header("PNG", width, height, kind, orientation, tuple(parts), capacity)


def _png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _png_transparency(file: BinaryIO, start: int, length: int, colour: int, depth: int) -> Part:
    """The chunk that names transparent colours; a single colour is scaled as the decoder scales the pixels."""
    if colour == 3:
        return start, start + 12 + length
    count = 1 if colour == 0 else 3
    if length != 2 * count:
        raise damaged("its transparent colour is malformed")
    values: tuple[int, ...] = struct.unpack(f">{count}H", read_bytes(file, start + 8, length))
    if depth in (2, 4):
        values = tuple((value & (2**depth - 1)) * 255 // (2**depth - 1) for value in values)
    elif depth == 16 and colour == 2:
        values = tuple(value >> 8 for value in values)
    return _png_chunk(b"tRNS", struct.pack(f">{count}H", *values))


def _webp(file: BinaryIO, num_bytes: int) -> Header:
    offset, orientation, canvas, has_alpha, kind = 12, 1, None, False, ""
    parts: list[Part] = []
    for _ in range(_MAX_PIECES):
        if offset + 8 > num_bytes:
            break
        name, length = struct.unpack("<4sI", read_bytes(file, offset, 8))
        start, end = offset, offset + 8 + length + length % 2
        offset = end
        content = read_bytes(file, start + 8, min(length, 10, num_bytes - start - 8))
        if name == b"VP8X" and canvas is None:
            width, height = (int.from_bytes(content[at : at + 3], "little") + 1 for at in (4, 7))
            canvas, has_alpha = (width, height), bool(content[:1] and content[0] & 0x10)
            # Only what follows in `parts` may be announced.
            flags = (content[0] if content else 0) & 0x12
            parts.append(struct.pack("<4sI", name, 10) + bytes([flags]) + content[1:].ljust(9, b"\0"))
        elif name in (b"VP8 ", b"VP8L", b"ANMF") and not kind:
            kind = {b"VP8 ": "webp", b"VP8L": "lossless webp", b"ANMF": "animated webp"}[name]
            if name == b"VP8 ":
                size = tuple(value & 0x3FFF for value in struct.unpack_from("<HH", content.ljust(10, b"\0"), 6))
            elif name == b"VP8L":
                bits = int.from_bytes(content[1:5], "little")
                size, has_alpha = ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1), has_alpha or bool(bits >> 28 & 1)
            else:
                size = canvas or (0, 0)
            if canvas is None:
                canvas = (size[0], size[1])
            parts.append((start, min(end, num_bytes)))
        elif name in (b"ANIM", b"ALPH") and not kind:
            parts.append((start, min(end, num_bytes)))
        elif name == b"EXIF":
            orientation = read_orientation(file, start + 8, min(start + 8 + length, num_bytes))
    else:
        raise ImageError(f"consists of more than {_MAX_PIECES:,} pieces; save it again")
    if canvas is None or not kind:
        raise damaged("it holds no WebP pixels")
    if has_alpha and kind != "animated webp":
        kind = "webp with transparency"
    body = 4 + sum(len(part) if isinstance(part, bytes) else part[1] - part[0] for part in parts)
    parts.insert(0, b"RIFF" + struct.pack("<I", body) + b"WEBP")
    return Header("WEBP", canvas[0], canvas[1], kind, orientation, tuple(parts))


def _gif(file: BinaryIO, num_bytes: int) -> Header:
    width, height, flags = struct.unpack("<HHB", read_bytes(file, 6, 5))
    offset = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    parts: list[Part] = [(0, offset)]
    control: Part = b""
    pieces = 0
    while pieces < _MAX_PIECES:
        pieces += 1
        block = read_bytes(file, offset, 2)
        if block[0] == 0x2C:
            left, top, frame_width, frame_height = struct.unpack("<HHHH", read_bytes(file, offset + 1, 8))
            parts += [control, (offset, num_bytes)]
            size = max(width, left + frame_width), max(height, top + frame_height)
            # A code of 12 bits stands for fewer than 4096 pixels.
            return Header("GIF", *size, "gif", 1, tuple(parts), 4096.0 * (num_bytes - offset))
        if block[0] != 0x21:
            break
        start, offset = offset, offset + 2
        while (length := read_bytes(file, offset, 1)[0]) and pieces < _MAX_PIECES:
            offset, pieces = offset + 1 + length, pieces + 1
        offset += 1
        if block[1] == 0xF9:
            control = (start, offset)
    raise damaged("it holds no GIF frame")


def _bmp(file: BinaryIO, num_bytes: int) -> Header:
    (header_size,) = struct.unpack("<I", read_bytes(file, 14, 4))
    compression = 0
    if header_size == 12:
        width, height, _, bits = struct.unpack("<HHHH", read_bytes(file, 18, 8))
    elif 40 <= header_size <= 1024:
        width, height, _, bits, compression = struct.unpack("<iiHHI", read_bytes(file, 18, 16))
    else:
        raise damaged(f"there is no BMP header of {header_size} bytes")
    if bits not in (1, 2, 4, 8, 16, 24, 32) or compression not in (0, 1, 2, 3, 6):
        raise ImageError(f"is BMP of {bits} bits and compression {compression}, which cannot be read; {_CONVERT}")
    # Two bytes of a run stand for at most 255 pixels.
    capacity = 128.0 * num_bytes if compression in (1, 2) else 8 * num_bytes / bits
    return Header("BMP", width, abs(height), "bmp", 1, ((0, num_bytes),), capacity)


# What the pixels of a TIFF page depend on.
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS, _TIFF_COMPRESSION, _TIFF_CHANNELS, _TIFF_PLANES = 256, 257, 258, 259, 277, 284
_TIFF_ROWS, _TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT = 278, 322, 323
_TIFF_TAGS = frozenset(
    {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 338, 339, 347}
    | {529, 530, 531, 532}
)
_TIFF_LISTS = frozenset({258, 273, 279, 320, 324, 325, 338, 339, 347, 529, 530, 532})
# None, CCITT, LZW, JPEG, deflate and PackBits, and how many bytes they make of one at most.
_TIFF_RATIOS = {1: 1, 2: math.inf, 3: math.inf, 4: math.inf, 5: 4096, 7: 4096, 8: 1032, 32946: 1032, 32773: 128}
_TIFF_SPARE_PIXELS = 1 << 20


def _tiff(file: BinaryIO, num_bytes: int) -> Header:
    """The first page, put together anew from the tags and strips that its pixels need."""
    order = "<" if read_bytes(file, 0, 2) == b"II" else ">"
    tags: dict[int, tuple[int, int, bytes]] = {}
    used = 0
    for tag, kind, count, place in tiff_entries(file, order, 0, num_bytes):
        if tag in _TIFF_TAGS and kind in TIFF_SIZES:
            size = count * TIFF_SIZES[kind]
            used += size
            if used > num_bytes or (count != 1 and tag not in _TIFF_LISTS):
                raise damaged(f"its TIFF tag {tag} has too many values")
            tags[tag] = kind, count, read_bytes(file, place, size)

    def numbers(tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        kind, count, data = tags.get(tag, (0, 0, b""))
        letter = {1: "B", 3: "H", 4: "I"}.get(kind)
        return struct.unpack(f"{order}{count}{letter}", data) if letter and count else default

    def number(tag: int, default: int = 0) -> int:
        return numbers(tag, (default,))[0]

    width, height, channels = number(_TIFF_WIDTH), number(_TIFF_HEIGHT), number(_TIFF_CHANNELS, 1)
    bits, compression = max(numbers(_TIFF_BITS, (1,))), number(_TIFF_COMPRESSION, 1)
    if compression not in _TIFF_RATIOS or not 1 <= channels <= 6 or not 1 <= bits <= 64:
        raise ImageError(f"is TIFF of compression {compression}, {channels} channels and {bits} bits; {_CONVERT}")
    tile = number(_TIFF_TILE_WIDTH), number(_TIFF_TILE_HEIGHT)
    if tile[0] * tile[1] > 2 * width * height + _TIFF_SPARE_PIXELS:
        raise damaged(f"its tiles of {tile[0]}x{tile[1]} pixels are larger than the picture")
    places, sizes = (324, 325) if 324 in tags else (273, 279)
    offsets, lengths = numbers(places), numbers(sizes)
    if not offsets or len(offsets) != len(lengths) or sum(lengths) > num_bytes:
        raise damaged("its strips are missing or larger than the file")
    if 324 in tags:
        num_strips = -(-width // max(tile[0], 1)) * -(-height // max(tile[1], 1))
    else:
        num_strips = -(-height // max(number(_TIFF_ROWS, height), 1))
    if len(offsets) < num_strips * (channels if number(_TIFF_PLANES, 1) == 2 else 1):
        raise damaged("some of its strips are missing")

    strips: list[Part] = [(at, at + length) for at, length in zip(offsets, lengths, strict=True)]
    if max(map(sum, zip(offsets, lengths, strict=True))) > num_bytes:
        raise damaged("its strips lie behind its end")
    if compression == 7 and any(_num_scans(file, strip) > _MAX_SCANS for strip in strips):
        raise _too_many_scans()
    # Header, strips, directory, and behind it what does not fit into the directory.
    *moved, directory_at = itertools.accumulate(lengths, initial=8)
    tags[places] = 4, len(moved), struct.pack(f"{order}{len(moved)}I", *moved)
    behind = directory_at + 2 + 12 * len(tags) + 4
    directory, values = struct.pack(f"{order}H", len(tags)), b""
    for tag, (kind, count, data) in sorted(tags.items()):
        inline = data.ljust(4, b"\0")
        if len(data) > 4:
            inline = struct.pack(f"{order}I", behind + len(values))
            values += data
        directory += struct.pack(f"{order}HHI", tag, kind, count) + inline
    head = read_bytes(file, 0, 4) + struct.pack(f"{order}I", directory_at)
    parts = (head, *strips, directory + bytes(4) + values)
    capacity = _TIFF_RATIOS[compression] * sum(lengths) * 8 / min(numbers(_TIFF_BITS, (1,)))
    return Header("TIFF", width, height, "tiff", read_orientation(file, 0, num_bytes), parts, capacity)
