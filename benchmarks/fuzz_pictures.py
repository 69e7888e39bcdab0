"""Feed damaged pictures to the reader and see that it reads or refuses each of them, and does nothing else.

    python benchmarks/fuzz_pictures.py --num 40000 --seed 1

Self-made pictures of every listed format and mode are damaged at random and read as bytes, as a file and as a PIL image
that was opened. Faults are: an exception other than ImageError, a warning, a decode of more than a few seconds, a size
that the header did not say, pixels that differ between the ways, and memory out of proportion. Prints a table and, as
the last line, JSON; exits with 1 if there was a fault. A crash of a decoder ends the process with a traceback; picture
N of a seed is made anew with `--first N --num 1`. Lines that begin with `Fax3Decode` are libtiff's own.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import io
import json
import resource
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from pacevlm.errors import ImageError
from pacevlm.images import PictureConfig, load_image, open_picture

# Small, so that claims of more are refused at once and none takes long.
CONFIG = PictureConfig(max_pixels=1_000_000)
MAX_SECONDS = 3.0
MAX_GROWTH_MIB = 400
CHUNKS = 8


def made_pictures(seed: int = 0) -> dict[str, bytes]:
    """One small file of every listed format and mode, by name."""
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 256, (23, 37, 3), dtype=np.uint8))
    smooth = Image.linear_gradient("L").resize((61, 45)).convert("RGB")
    with_alpha = Image.merge("RGBA", [*smooth.split(), Image.radial_gradient("L").resize(smooth.size)])
    deep = Image.fromarray(rng.integers(0, 65536, (19, 31), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    files: dict[str, bytes] = {}

    def add(name: str, image: Image.Image, kind: str, **settings: object) -> None:
        file = io.BytesIO()
        image.save(file, kind, **settings)
        files[name] = file.getvalue()

    for name, image in (("noise", noise), ("smooth", smooth)):
        add(f"jpeg {name}", image, "JPEG", exif=exif, icc_profile=bytes(300), comment=b"a comment")
        add(f"progressive jpeg {name}", image, "JPEG", progressive=True, subsampling=0)
        add(f"webp {name}", image, "WEBP", exif=exif)
        add(f"lossless webp {name}", image, "WEBP", lossless=True)
        add(f"tiff {name}", image, "TIFF", exif=exif)
    add("grey jpeg", smooth.convert("L"), "JPEG", optimize=True)
    add("cmyk jpeg", smooth.convert("CMYK"), "JPEG")
    add("mpo", smooth, "MPO", save_all=True, append_images=[noise])
    add("webp with transparency", with_alpha, "WEBP")
    frames = {"save_all": True, "append_images": [noise.resize(smooth.size)]}
    add("animated webp", smooth, "WEBP", **frames)
    add("gif", smooth, "GIF", **frames, comment=b"a comment")
    add("gif with transparency", with_alpha, "GIF")
    add("interlaced gif", noise.convert("P"), "GIF", interlace=1)
    text = {"exif": exif, "icc_profile": bytes(300)}
    for mode in ("1", "L", "P", "RGB", "LA", "RGBA"):
        image = with_alpha.convert(mode)
        add(f"png {mode}", image, "PNG", **text)
        if mode not in ("LA",):
            add(f"tiff deflate {mode}", image, "TIFF", compression="tiff_adobe_deflate")
        if mode not in ("LA", "RGBA"):
            add(f"bmp {mode}", image, "BMP")
    add("apng", smooth, "PNG", **frames)
    add("16-bit png", deep, "PNG", exif=exif)
    add("4-bit png", smooth.quantize(12), "PNG", bits=4, transparency=3)
    add("bmp RGBA", with_alpha, "BMP")
    for mode in ("CMYK", "YCbCr", "LAB"):
        add(f"tiff {mode}", smooth.convert(mode), "TIFF")
    add("16-bit tiff", deep, "TIFF", exif=exif)
    add("tiff lzw", noise, "TIFF", compression="tiff_lzw", save_all=True, append_images=[smooth])
    add("tiff packbits", smooth, "TIFF", compression="packbits")
    add("tiff jpeg", smooth, "TIFF", compression="jpeg")
    for compression in ("group3", "group4", "tiff_ccitt"):
        add(f"tiff {compression}", smooth.convert("1"), "TIFF", compression=compression)
    files["interlaced png"] = _interlaced_png(np.asarray(noise))
    files["bmp runs"] = _bmp_with_runs()
    return files


def png_chunk(name: bytes, content: bytes) -> bytes:
    """A PNG chunk with its length and checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _interlaced_png(pixels: np.ndarray) -> bytes:
    height, width, _ = pixels.shape
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = b"".join(
        b"\0" + row.tobytes() for top, left, down, right in passes for row in pixels[top::down, left::right] if row.size
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def _bmp_with_runs() -> bytes:
    runs = b"".join(bytes([20, row % 7, 12, 3, 0, 0]) for row in range(16)) + b"\0\1"
    palette = b"".join(bytes([30 * i, 20 * i, 10 * i, 0]) for i in range(8))
    header = struct.pack("<IiiHHIIiiII", 40, 32, 16, 1, 8, 1, len(runs), 0, 0, 8, 0)
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + header + palette + runs


# Damage ---------------------------------------------------------------------------------------------------------------


def _flip_bits(rng: np.random.Generator, content: bytearray, _: Sequence[bytes]) -> None:
    for _ in range(int(rng.integers(1, 9))):
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))


def _flip_header_bits(rng: np.random.Generator, content: bytearray, _: Sequence[bytes]) -> None:
    for _ in range(int(rng.integers(1, 4))):
        content[rng.integers(min(len(content), 64))] ^= 1 << int(rng.integers(8))


def _write_numbers(rng: np.random.Generator, content: bytearray, _: Sequence[bytes]) -> None:
    for _ in range(int(rng.integers(1, 4))):
        value = int(rng.choice([0, 1, 2, 7, 255, 256, 4096, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF]))
        width = int(rng.choice([1, 2, 4]))
        number = (value & (256**width - 1)).to_bytes(width, "little" if rng.random() < 0.5 else "big")
        at = int(rng.integers(min(len(content), 200) if rng.random() < 0.7 else len(content)))
        content[at : at + width] = number


def _truncate(rng: np.random.Generator, content: bytearray, _: Sequence[bytes]) -> None:
    del content[int(rng.integers(1, len(content))) :]


def _cut_out(rng: np.random.Generator, content: bytearray, _: Sequence[bytes]) -> None:
    at = int(rng.integers(len(content)))
    del content[at : at + int(rng.integers(1, 60))]


def _double(rng: np.random.Generator, content: bytearray, _: Sequence[bytes]) -> None:
    at, length = int(rng.integers(len(content))), int(rng.integers(1, 300))
    content[at:at] = content[at : at + length] * int(rng.integers(1, 4))


def _insert_noise(rng: np.random.Generator, content: bytearray, _: Sequence[bytes]) -> None:
    at = int(rng.integers(len(content)))
    content[at:at] = rng.bytes(int(rng.integers(1, 40)))


def _splice(rng: np.random.Generator, content: bytearray, others: Sequence[bytes]) -> None:
    other = others[int(rng.integers(len(others)))]
    at = int(rng.integers(1, len(content)))
    content[at:] = other[min(len(other) - 1, int(rng.integers(len(other)))) :]


def _shuffle_chunks(rng: np.random.Generator, content: bytearray, _: Sequence[bytes]) -> None:
    """Repeat, drop or swap the chunks of a PNG, with checksums that fit; other files lose a piece."""
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        _cut_out(rng, content, ())
        return
    chunks, at = [], 8
    while at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        chunks.append(bytes(content[at + 4 : at + 8]) + bytes(content[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks:
        return
    picked = int(rng.integers(len(chunks)))
    chosen = bytearray(chunks[picked])
    if len(chosen) > 4 and rng.random() < 0.6:
        chosen[int(rng.integers(4, len(chosen)))] = int(rng.integers(256))
    chunks[picked] = bytes(chosen)
    chunks.insert(int(rng.integers(len(chunks) + 1)), chunks[int(rng.integers(len(chunks)))])
    if rng.random() < 0.3:
        del chunks[int(rng.integers(len(chunks)))]
    content[8:] = b"".join(png_chunk(chunk[:4], chunk[4:]) for chunk in chunks)


DAMAGES: tuple[Callable[[np.random.Generator, bytearray, Sequence[bytes]], None], ...] = (
    *(_flip_bits, _flip_header_bits, _write_numbers, _write_numbers, _truncate, _cut_out, _double, _insert_noise),
    *(_splice, _shuffle_chunks),
)


def damaged_picture(files: dict[str, bytes], seed: int, number: int) -> tuple[str, bytes]:
    """Picture `number` of a seed: the name of what it was, and its bytes."""
    rng = np.random.default_rng((seed, number))
    name = list(files)[int(rng.integers(len(files)))]
    content, others = bytearray(files[name]), list(files.values())
    for _ in range(int(rng.choice([0, 1, 1, 1, 2, 3]))):
        DAMAGES[int(rng.integers(len(DAMAGES)))](rng, content, others)
        if len(content) < 2:
            content += b"\0\0"
    return name, bytes(content)


# Checks ---------------------------------------------------------------------------------------------------------------


def read_every_way(content: bytes, path: Path) -> bool:
    """Read a picture as bytes, as a file and opened by PIL; whether it was accepted. Raises AssertionError."""
    path.write_bytes(content)
    results = [_read_once(source) for source in (content, path)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            opened = Image.open(path)
        except Exception:  # PIL's own reader may say anything
            opened = None
    if opened is not None:
        with opened:
            results.append(_read_once(opened))
    if len({result for result in results[:2]}) > 1:
        raise AssertionError("bytes and file differ")
    if results[0] is not None and results[-1] not in (None, results[0]):
        raise AssertionError("the file and the PIL image differ")
    return results[0] is not None


def _read_once(source: bytes | Path | Image.Image) -> bytes | None:
    """The pixels, with their size; None if the picture was refused."""
    started, reason = time.perf_counter(), ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            picture = open_picture(source, CONFIG)
            image = picture.decode()
            assert (image.mode, image.size) == ("RGB", (picture.width, picture.height)), "another size or mode"
            assert image.tobytes() == load_image(source, CONFIG).tobytes(), "not the same pixels again"
            result = repr(image.size).encode() + image.tobytes()
        except ImageError as error:
            result, reason = None, str(error)
    assert "header said" not in reason, reason
    assert not caught, f"warning: {caught[0].message}"
    seconds = time.perf_counter() - started
    assert seconds < MAX_SECONDS, f"took {seconds:.1f} s"
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 if no picture had a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=40_000, help="pictures to read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first picture")
    options = parser.parse_args(arguments)
    faulthandler.enable()
    console = Console(stderr=True)
    files = made_pictures()
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    faults: list[str] = []
    base_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.first, options.first + options.num):
            name, content = damaged_picture(files, options.seed, number)
            try:
                counts[name]["accepted" if read_every_way(content, Path(folder, "picture")) else "refused"] += 1
            except Exception:
                counts[name]["fault"] += 1
                faults.append(f"picture {number} ({name}): {traceback.format_exc(limit=-3)}")
                console.print(faults[-1], markup=False)
            if number % 1000 == 999:
                console.print(f"{number + 1} pictures, {len(faults)} faults", highlight=False)
    growth_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base_kib) / 1024
    if growth_mib > MAX_GROWTH_MIB:
        faults.append(f"memory grew by {growth_mib:.0f} MiB")
    table = Table("picture", "accepted", "refused", "fault")
    for name in sorted(counts):
        table.add_row(name, *(str(counts[name][column]) for column in ("accepted", "refused", "fault")))
    Console().print(table)
    total = sum(counts.values(), collections.Counter())
    summary = {column: total[column] for column in ("accepted", "refused", "fault")}
    print(json.dumps({"seed": options.seed, "num": options.num, **summary, "growth_mib": round(growth_mib)}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
