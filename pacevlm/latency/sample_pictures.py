"""Self-made pictures of a phone's sizes: every profile times reading them, whatever a data set holds."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

# Every size comes twice, once smooth and once rough, one of which is turned: then bytes, pixels and turning can be told
# apart, and a fit and a calibration get one each.
NUM_SIZES = 6
MIN_PIXELS = 100_000
# What the encoders are told besides the format; for all but JPEG as quick as they go, since decoding is what is timed.
ENCODERS: dict[str, dict[str, Any]] = {
    "jpeg": {"format": "JPEG"},
    "progressive jpeg": {"format": "JPEG", "progressive": True},
    "png": {"format": "PNG", "compress_level": 1},
    "webp": {"format": "WEBP", "method": 0},
}
NEEDS = {"JPEG": "jpg", "PNG": "zlib", "WEBP": "webp"}
ORIENTATION, QUARTER_TURN = 0x0112, 6


def picture_kinds() -> list[str]:
    """Kinds of the pictures that this Pillow can make."""
    return ["memory", *(kind for kind, how in ENCODERS.items() if features.check(NEEDS[how["format"]]))]


def num_sample_pictures() -> int:
    """How many `make_sample_pictures` makes."""
    return 2 * NUM_SIZES * len(picture_kinds())


def make_sample_pictures(max_pixels: int, seed: int = 0) -> list[bytes | NDArray[np.uint8]]:
    """Make a ladder of pictures of every kind: arrays in memory, and JPEG, progressive JPEG, PNG and WebP files.

    Sizes grow by a constant factor, at 4:3, upright and lying, and every second file is turned by its EXIF orientation,
    as phones do. Kinds that this Pillow cannot write are left out.

    Args:
        max_pixels: of the largest picture, up to rounding of its sides.
        seed: decides what is on them.
    """
    rng = np.random.default_rng(seed)
    longest = _sides(max_pixels)[0]
    smooth, rough = _smooth_canvas(longest, rng), _rough_canvas(longest, rng)
    pictures: list[bytes | NDArray[np.uint8]] = []
    for kind in picture_kinds():
        for step, num_pixels in enumerate(np.geomspace(min(MIN_PIXELS, max_pixels / 2), max_pixels, NUM_SIZES)):
            for is_rough in (False, True):
                width, height = _sides(num_pixels)
                if step % 2:
                    width, height = height, width
                left, top = rng.integers(0, longest - width + 1), rng.integers(0, longest - height + 1)
                box = (int(left), int(top), int(left) + width, int(top) + height)
                strength = rng.uniform(0.2, 0.35) if is_rough else rng.uniform(0.03, 0.08)
                picture = Image.blend(smooth.crop(box), rough.crop(box), float(strength))
                quality = int(rng.integers(88, 96) if is_rough else rng.integers(70, 88))
                pictures.append(
                    np.asarray(picture)
                    if kind == "memory"
                    else _encode(picture, kind, quality, (step + is_rough) % 2 == 1)
                )
    return pictures


def _sides(num_pixels: float) -> tuple[int, int]:
    """Width and height at 4:3, the width the longer."""
    height = max(1, round((num_pixels * 3 / 4) ** 0.5))
    return max(1, round(height * 4 / 3)), height


def _encode(picture: Image.Image, kind: str, quality: int, turned: bool) -> bytes:
    file, options = io.BytesIO(), dict(ENCODERS[kind])
    if options["format"] != "PNG":
        options["quality"] = quality
    if turned:
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = QUARTER_TURN
    picture.save(file, **options)
    return file.getvalue()


def _smooth_canvas(side: int, rng: np.random.Generator) -> Image.Image:
    """Shapes of a few sizes without fine grain, `side` pixels wide and high."""
    canvas = Image.new("RGB", (side, side))
    for cells, share in ((8, 1.0), (40, 0.4), (200, 0.2)):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        canvas = Image.blend(canvas, coarse.resize((side, side), Image.Resampling.BILINEAR), share)
    return canvas


def _rough_canvas(side: int, rng: np.random.Generator) -> Image.Image:
    """Grain, repeated every 512 pixels."""
    grain = rng.integers(0, 256, (512, 512, 3), dtype=np.uint8)
    repeats = -(-side // 512)
    return Image.fromarray(np.ascontiguousarray(np.tile(grain, (repeats, repeats, 1))[:side, :side]))
