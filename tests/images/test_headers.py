"""A picture costs what it is worth: claims are checked before decoding, and memory is a multiple of the pixels."""

from __future__ import annotations

import importlib.util
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

import pacevlm.images
from pacevlm.config import PictureConfig
from pacevlm.errors import ImageError
from pacevlm.images import PEAK_BYTES_PER_PIXEL, load_image, open_picture

SMALL = Image.linear_gradient("L").convert("RGB").resize((64, 48))


def encoded(image: Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def png(width: int, height: int, depth: int = 8, colour: int = 2, num_bytes: int = 100, interlaced: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(num_bytes))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def jpeg_of(width: int, height: int, **settings: object) -> bytes:
    content = bytearray(encoded(SMALL, "JPEG", **settings))
    at = content.index(b"\xff\xc2" if settings.get("progressive") else b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def gif_of(width: int, height: int) -> bytes:
    content = bytearray(encoded(SMALL, "GIF"))
    content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


def bmp_of(width: int, height: int, bits: int = 24, compression: int = 0) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 5000, 0, 0, 54) + header + bytes(4000)


def webp_of(width: int, height: int) -> bytes:
    canvas = struct.pack("<I", 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    still = encoded(SMALL, "WEBP")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + still[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(entries: dict[int, tuple[int, int, int]], tail: bytes = bytes(2000)) -> bytes:
    table = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(entries.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4) + tail


def tiff_of(width: int, height: int, compression: int = 1, **more: int) -> bytes:
    entries = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, compression), 262: (3, 1, 1)}
    strips = {273: (4, 1, 500), 277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, 1000)}
    return tiff(entries | strips | {int(tag[1:]): (4, 1, value) for tag, value in more.items()})


HUGE = 2**32 - 1
REFUSED = {
    "png": png(9_480, 9_480),
    "png 16 bits": png(9_000, 9_000, depth=16, colour=0, num_bytes=2000),
    "png 1 bit": png(9_999, 9_999, depth=1, colour=0),
    "png palette": png(9_999, 9_999, colour=3),
    "png interlaced": png(9_999, 9_999, colour=6, interlaced=1),
    "png too large": png(100_000, 100_000, num_bytes=2_000_000),
    "png one row": png(2**31 - 1, 1),
    "jpeg": jpeg_of(65_535, 65_535),
    "jpeg below the limit": jpeg_of(9_999, 9_999),
    "jpeg progressive": jpeg_of(9_999, 9_999, progressive=True),
    "gif": gif_of(65_535, 65_535),
    "gif below the limit": gif_of(9_999, 9_999),
    "bmp": bmp_of(30_000, 30_000),
    "bmp below the limit": bmp_of(9_000, -9_000),
    "bmp runs": bmp_of(9_000, 9_000, bits=8, compression=1),
    "webp canvas": webp_of(1 << 24, 255),
    "webp canvas above the limit": webp_of(16_000, 16_000),
    "tiff": tiff_of(60_000, 60_000),
    "tiff below the limit": tiff_of(9_999, 9_999),
    "tiff lzw": tiff_of(9_999, 9_999, compression=5),
    "tiff deflate": tiff_of(9_999, 9_999, compression=8),
    "tiff packed": tiff_of(9_999, 9_999, compression=32773),
    "tiff zstd": tiff_of(60, 60, compression=50000),
    "tiff sizes": tiff_of(HUGE, HUGE),
    "tiff tile": tiff(
        {
            **{256: (4, 1, 10), 257: (4, 1, 10), 258: (3, 1, 8), 259: (3, 1, 5), 262: (3, 1, 1), 277: (3, 1, 1)},
            **{322: (4, 1, 40_000), 323: (4, 1, 40_000), 324: (4, 1, 500), 325: (4, 1, 1000)},
        }
    ),
    "tiff strips behind the end": tiff_of(60, 60, t273=5_000_000),
    "tiff strips larger than the file": tiff_of(60, 60, t279=2_000_000_000),
    "tiff strips missing": tiff_of(60, 60, t278=1),
    # Every tag points at the whole file: to read them takes a thousand times the file.
    "tiff tags": tiff(
        {tag: (1, 60_000, 8) for tag in range(300, 4000)}
        | {256: (4, 1, 9), 257: (4, 1, 9), 273: (4, 15_000, 8), 279: (4, 15_000, 8), 320: (3, 30_000, 8)},
    ),
    "png of empty pieces": png(10, 10)[:33] + struct.pack(">I4sI", 0, b"tEXt", 0) * 100_001,
    "jpeg of fill bytes": b"\xff\xd8" + b"\xff" * 200_000,
    "webp of empty pieces": b"RIFF\0\0\0\0WEBP" + b"JUNK\0\0\0\0" * 100_001,
    "gif of comments": b"GIF89a\1\0\1\0\0\0\0" + b"\x21\xfe\0" * 100_001,
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_claims_are_refused_by_the_header(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacevlm.images, "_DECODERS", {})
    with pytest.raises(ImageError, match="the image of"):
        open_picture(REFUSED[name])


def test_jpegs_of_endless_scans_are_refused() -> None:
    content = encoded(SMALL, "JPEG", progressive=True)
    at = content.rindex(b"\xff\xda")
    assert load_image(content).size == SMALL.size
    with pytest.raises(ImageError, match="scans"):
        open_picture(content[:at] + content[at:-2] * 200 + content[-2:])


@pytest.mark.parametrize("image", [Image.new("RGB", (3000, 2000)), Image.new("1", (3000, 2000), 1)], ids=["RGB", "1"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "LZW", "deflate", "packbits", "G4"])
def test_the_emptiest_pictures_are_accepted(kind: str, image: Image.Image) -> None:
    compression = {"LZW": "tiff_lzw", "deflate": "tiff_adobe_deflate", "packbits": "packbits", "G4": "group4"}.get(kind)
    if compression is not None:
        image = image.convert("1") if kind == "G4" else image
        content = encoded(image, "TIFF", compression=compression)
    else:
        content = encoded(image, kind, **({"progressive": True} if kind == "JPEG" else {}))
    assert load_image(content).size == image.size


# Memory ---------------------------------------------------------------------------------------------------------------

MEASURE = """
import re, sys
from pathlib import Path
from PIL import Image
from pacevlm.errors import ImageError
from pacevlm.images import open_picture
from pacevlm.models.molmoe.image_processing import MolmoEImageProcessor

def peak_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

processor = MolmoEImageProcessor()
processor.prepare(Image.new("RGB", (1500, 1000)), 12)
for path in map(Path, sys.argv[1:]):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    base = peak_kib()
    try:
        picture = open_picture(path)
        header = peak_kib() - base
        processor.prepare(path, 12)
        pixels = picture.width * picture.height
    except ImageError as error:
        header, pixels = peak_kib() - base, 0
        print(path.name, "was refused:", error, file=sys.stderr)
    print(path.name, header, peak_kib() - base, pixels)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are read from /proc")
def test_peak_memory_follows_the_pixels(tmp_path: Path) -> None:
    side = 2000
    noise = Image.effect_noise((200, 200), 90).resize((side, side), Image.Resampling.NEAREST)
    colour = Image.merge("RGB", [noise, noise.transpose(Image.Transpose.ROTATE_90), noise])
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "jpeg": encoded(colour, "JPEG", exif=exif),
        "progressive": encoded(colour, "JPEG", progressive=True, subsampling=0, exif=exif),
        "png": encoded(colour, compress_level=1, exif=exif),
        "alpha": encoded(Image.merge("RGBA", [*colour.split(), noise]), compress_level=1, exif=exif),
        "grey alpha": encoded(Image.merge("LA", [noise, noise]), compress_level=1),
        "16-bit": encoded(Image.new("I;16", (side, side), 700), compress_level=1),
        "1-bit": encoded(noise.convert("1"), compress_level=1),
        "palette": encoded(noise.convert("P"), compress_level=1, transparency=9),
        "gif": encoded(noise, "GIF"),
        "bmp": encoded(colour, "BMP"),
        "tiff": encoded(colour, "TIFF", compression="tiff_lzw"),
        "webp": encoded(colour, "WEBP", quality=20, method=0),
    }
    mib = 1024
    everything = files | {f"refused {name}": content for name, content in REFUSED.items()}
    for name, content in everything.items():
        (tmp_path / name).write_bytes(content)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in everything)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(pacevlm.images.__file__).parents[2])},
        check=True,
    )
    for line in run.stdout.splitlines():
        name, header, peak, pixels = line.rsplit(" ", 3)
        allowed = 24 * mib + (PEAK_BYTES_PER_PIXEL * side**2 + len(files[name])) / 1024 if name in files else 8 * mib
        assert int(header) < 8 * mib, line + run.stderr
        assert int(peak) < allowed, line
        assert int(pixels) == (side**2 if name in files else 0), line
    assert len(run.stdout.splitlines()) == len(everything)


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    name = "fuzz_pictures"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_damaged_pictures_are_read_or_refused(fuzz: ModuleType, tmp_path: Path) -> None:
    files = fuzz.made_pictures()
    for name, content in files.items():
        assert fuzz.read_every_way(content, tmp_path / "picture"), f"{name} is whole"
    results = [
        fuzz.read_every_way(fuzz.damaged_picture(files, 7, number)[1], tmp_path / "picture") for number in range(400)
    ]
    assert 80 < sum(results) < 320


def test_no_size_is_misread(fuzz: ModuleType) -> None:
    for content in fuzz.made_pictures().values():
        with Image.open(io.BytesIO(content)) as expected:
            picture = open_picture(content)
            assert sorted((picture.width, picture.height)) == sorted(expected.size)
        with pytest.raises(ImageError, match="more than the 100"):
            open_picture(content, PictureConfig(max_pixels=100))
