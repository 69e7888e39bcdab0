"""The one way to read a picture: its header first, which is checked, and its pixels when they are wanted."""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pacevlm.errors import ImageError

ImageSource: TypeAlias = "str | Path | bytes | Image.Image | np.ndarray[Any, Any]"

MAX_PIXELS = 100_000_000
"""Most pixels that an image may have; a small file can claim many more and fill the memory."""

_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class PictureConfig:
    """How pictures are read; the same for training, evaluation, profiles and answers.

    Attributes:
        background: colour that transparent pictures are composed on, as `#rrggbb` or a name that CSS knows.
        max_pixels: largest accepted number of pixels.
    """

    background: str = "#ffffff"
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture whose header was read and checked, and whose pixels were not decoded yet.

    Attributes:
        source: where the pixels are; an RGB image in memory once they are decoded.
        width: pixels, turned upright as its EXIF orientation says.
        height: pixels, turned upright.
        kind: what decoding costs depends on: `memory` for what is decoded already, otherwise the file's format in
            lower case, for example `jpeg`.
        num_bytes: of the file; 0 for what is in memory.
        config: how it is read.
    """

    source: ImageSource
    width: int
    height: int
    kind: str
    num_bytes: int
    config: PictureConfig

    def decode(self) -> Image.Image:
        """The pixels as 8-bit RGB, upright; raises ImageError. They are not kept."""
        return _load(self.source, self.config)


def open_picture(source: ImageSource, config: PictureConfig | None = None) -> Picture:
    """Read and check a picture's header; raises ImageError as `load_image` does, without decoding any pixel."""
    config = config or PictureConfig()
    if isinstance(source, (bytes, bytearray, memoryview, str, os.PathLike)):
        num_bytes = len(source) if not isinstance(source, (str, os.PathLike)) else _check_file(source).stat().st_size
        try:
            with Image.open(io.BytesIO(source) if not isinstance(source, (str, os.PathLike)) else source) as opened:
                kind = str(opened.format).lower()
                kind = "progressive jpeg" if opened.info.get("progressive") else kind
                turned = opened.getexif().get(_EXIF_ORIENTATION, 1) in range(5, 9)
                width, height = opened.size[::-1] if turned else opened.size
        except Exception:
            _load(source, config)  # says what is wrong
            raise
        return Picture(source, width, height, kind, num_bytes, config)
    image = _load(source, config)
    return Picture(image, image.width, image.height, "memory", 0, config)


def load_image(source: ImageSource, config: PictureConfig | None = None) -> Image.Image:
    """Read a picture as 8-bit RGB; see `open_picture` and `Picture.decode`."""
    return open_picture(source, config).decode()


def _load(source: ImageSource, config: PictureConfig) -> Image.Image:
    """Load an image as 8-bit RGB, turned upright as its EXIF orientation says.

    Transparency is dropped (the colours below it show), grey is replicated, 16-bit grey is scaled to 8 bits, and the
    first frame of an animated file is used. An array must be uint8 of shape `(height, width)` or
    `(height, width, 1 | 3 | 4)`. An RGB image that needs no change is returned as it is.

    Args:
        source: a path, the bytes of an image file, a PIL image or an array.

    Raises:
        ImageError: the source is missing, not a file, empty, truncated, corrupt, not an image, of an unsupported
            kind, or too large.
    """
    max_pixels = config.max_pixels
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the image", max_pixels)
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source), "the array", max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        if len(source) == 0:
            raise ImageError("the image has zero bytes; give the whole content of an image file")
        return _decode(io.BytesIO(source), f"the image of {len(source)} bytes", max_pixels)
    if isinstance(source, (str, os.PathLike)):
        return _decode(_check_file(source), f"image file {os.fspath(source)!r}", max_pixels)
    raise ImageError(f"an image must be a path, bytes, a PIL image or a uint8 array, not {type(source).__name__}")


def _check_file(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    name = f"image file {os.fspath(source)!r}"
    try:
        if path.is_dir():
            raise ImageError(f"{name} is a directory; give the path of one image")
        if not path.exists():
            hint = "; download it first" if "://" in str(source) else "; check the path"
            raise ImageError(f"{name} does not exist{hint}")
        if not path.is_file():
            raise ImageError(f"{name} is not a regular file")
        if path.stat().st_size == 0:
            raise ImageError(f"{name} has zero bytes; it was probably not written completely")
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # no permission, name too long, null byte in the name
        raise ImageError(f"{name[:200]} cannot be opened: {error}") from error
    return path


def _decode(file: Path | io.BytesIO, name: str, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Our own limit decides; PIL's is checked against the same size and would only speak twice.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return _to_rgb(image, name, max_pixels)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image, or of an unknown format") from error
    except Exception as error:
        # Decoders raise almost anything on damaged data: OSError, SyntaxError, struct.error, IndexError ...
        raise ImageError(f"{name} cannot be read; it is probably truncated or corrupt: {error}") from error


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    if array.dtype != np.uint8:
        raise ImageError(f"an image array must be uint8 with values 0 to 255, not {array.dtype}; convert it first")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(
            f"an image array must have the shape (height, width) or (height, width, 1, 3 or 4), not {array.shape}"
        )
    if 0 in array.shape:
        raise ImageError(f"an image array has the shape {array.shape}; both sides must be at least 1 pixel")
    return Image.fromarray(array)


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}x{height} pixels; both sides must be at least 1")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} is {width}x{height} pixels, more than the {max_pixels:,} that are allowed; make it smaller"
        )
    try:
        image.load()
        upright = _turn_upright(image)
        if upright.mode == "RGB":
            return upright
        if upright.mode.startswith("I"):
            return _scale_16_bit(upright, name).convert("RGB")
        if upright.mode == "F":
            raise ImageError(f"{name} holds floating-point values, whose range is unknown; convert it to 8 bits first")
        if upright.mode in ("P", "PA", "RGBa", "La"):
            # These reach RGB without loss or warning only through RGBA or LA.
            upright = upright.convert("LA" if upright.mode == "La" else "RGBA")
        return upright.convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # see _decode
        raise ImageError(f"{name} cannot be read; it is probably truncated or corrupt: {error}") from error


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image
    except Exception:
        # Damaged metadata is no reason to refuse a picture that can be decoded.
        return image


def _scale_16_bit(image: Image.Image, name: str) -> Image.Image:
    """Scale 16-bit grey (modes `I;16*` and, as decoders use it, `I`) to 8 bits; PIL itself would clip at 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(f"{name} holds grey values outside 0 to 65535; convert it to 8 or 16 bits first")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
