"""The one way to read a picture: its header first, which is checked, and its pixels when they are wanted.

Training, evaluation, profiles and answers all come here, so they see the same pixels of every file. `Picture.kind` is
what the cost of decoding depends on; `pacevlm/images/headers.py` holds the table of kinds.

Reading a header takes memory that does not depend on the picture's pixels, and what is refused by its header takes no
more. Decoding takes at most `PEAK_BYTES_PER_PIXEL` for each pixel.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import numpy as np
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pacevlm.config import PictureConfig as PictureConfig
from pacevlm.errors import ImageError
from pacevlm.images.headers import read_header
from pacevlm.images.parts import Header, PartsFile, read_orientation
from pacevlm.images.sources import array_mode, object_hint, opened_file, source_name

ImageSource: TypeAlias = "str | Path | bytes | Image.Image | np.ndarray[Any, Any]"

PEAK_BYTES_PER_PIXEL = 20
"""Most memory that decoding takes at any moment, result included, and preparing it for the model afterwards.

JPEG takes 4 to 10 of them, PNG 4 to 8. Of TIFF and WebP the file's bytes come on top.
"""

# The decoders, by name: no other one can be reached, whatever a file holds.
_DECODERS: dict[str, type[ImageFile.ImageFile]] = {
    "BMP": BmpImageFile,
    "GIF": GifImageFile,
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "TIFF": TiffImageFile,
    "WEBP": WebPImageFile,
}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED = "turned "
"""What the kind of a file begins with whose pixels its orientation turns, which costs time of its own."""

# Pixels that are converted together; what they need for it comes on top of the picture.
_BAND_PIXELS = 1 << 18


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture whose header was read and checked, and whose pixels were not decoded yet.

    Attributes:
        source: where the pixels are; an RGB image in memory once they are decoded.
        width: pixels, turned upright as its EXIF orientation says.
        height: pixels, turned upright.
        kind: what decoding costs depends on: `memory` for RGB pixels in memory, `RGBA in memory` and the like for
            others there, and for files what the table in `pacevlm/images/headers.py` says.
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
        """The pixels as 8-bit RGB, upright; they are not kept.

        Raises:
            ImageError: the pixels are truncated, corrupt or of an unsupported kind, or the file has changed.
        """
        image = _decode(self.source, self.config)
        if image.size != (self.width, self.height):
            raise ImageError(
                f"{source_name(self.source)} has {image.width}x{image.height} pixels, but its header said "
                f"{self.width}x{self.height}; do not change it while it is read"
            )
        return image


def open_picture(source: ImageSource, config: PictureConfig | None = None) -> Picture:
    """Read and check a picture's header, without decoding any pixel.

    Files may be JPEG, PNG, WebP, GIF, BMP or TIFF; of several frames or pages the first counts. An array must be uint8
    of shape `(height, width)` or `(height, width, 1 | 3 | 4)`. A PIL image that was opened and not loaded counts as its
    file.

    Args:
        source: a path, the bytes of an image file, a PIL image or an array.

    Raises:
        ImageError: the source is missing, not a file, empty, damaged, not an image, of an unsupported kind, or too
            large.
    """
    config = config or PictureConfig()
    with opened_file(source) as opened:
        if opened is None:
            mode, size, orientation = _in_memory(source, config)
            is_ready = mode == "RGB" and orientation == 1 and "transparency" not in getattr(source, "info", ())
            kind = "memory" if is_ready else f"{mode} in memory"
            return Picture(source, *_upright_size(size, orientation), kind, 0, config)
        file, num_bytes = opened
        header = _checked_header(file, num_bytes, source_name(source), config)
        size = _upright_size((header.width, header.height), header.orientation)
        kind = header.kind if header.orientation == 1 else TURNED + header.kind
        return Picture(source, *size, kind, num_bytes, config)


def load_image(source: ImageSource, config: PictureConfig | None = None) -> Image.Image:
    """Read a picture as 8-bit RGB, upright by its EXIF orientation tag; see `open_picture` and `Picture.decode`.

    Transparency is composed on the background, grey is replicated, and 16-bit grey is scaled to 8 bits. An RGB image
    that needs no change is returned as it is.
    """
    return open_picture(source, config).decode()


def _in_memory(source: object, config: PictureConfig) -> tuple[str, tuple[int, int], int]:
    """Mode, size as stored and orientation of an array or a PIL image; raises ImageError."""
    if isinstance(source, np.ndarray):
        mode, size, orientation = array_mode(source), (source.shape[1], source.shape[0]), 1
    elif isinstance(source, Image.Image):
        exif = source.info.get("exif")
        mode, size = source.mode, source.size
        orientation = read_orientation(io.BytesIO(exif), 0, len(exif)) if isinstance(exif, bytes) else 1
    else:
        raise ImageError(
            f"an image must be a path, bytes, a PIL image or a uint8 array, not {type(source).__name__}"
            + object_hint(source)
        )
    _check_size(*size, source_name(source), config)
    if mode == "F":
        raise ImageError("the image holds floating-point values, whose range is unknown; convert it to 8 bits first")
    return mode, size, orientation


# Checks ---------------------------------------------------------------------------------------------------------------


def _checked_header(file: BinaryIO, num_bytes: int, name: str, config: PictureConfig) -> Header:
    try:
        header = read_header(file, num_bytes)
    except ImageError as error:
        raise ImageError(f"{name} {error}") from error
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error}") from error
    _check_size(header.width, header.height, name, config)
    if header.width * header.height > header.capacity:
        raise ImageError(
            f"{name} cannot be read; it is probably truncated or corrupt: it claims {header.width}x{header.height} "
            f"pixels, which {num_bytes:,} bytes cannot hold"
        )
    return header


def _check_size(width: int, height: int, name: str, config: PictureConfig) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}x{height} pixels; both sides must be at least 1")
    if width * height > config.max_pixels:
        raise ImageError(
            f"{name} is {width}x{height} pixels, more than the {config.max_pixels:,} that are allowed; make it "
            "smaller, or raise max_pixels"
        )


def _upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return (size[1], size[0]) if orientation >= 5 else size


# Pixels ---------------------------------------------------------------------------------------------------------------


def _decode(source: ImageSource, config: PictureConfig) -> Image.Image:
    name = source_name(source)
    try:
        with opened_file(source) as opened:
            if opened is None:
                _, _, orientation = _in_memory(source, config)
                image = _loaded(source)
            else:
                header = _checked_header(*opened, name, config)
                orientation = header.orientation
                image = _decoded(opened[0], header)
        # Each step frees what the one before made, so that two copies exist at any moment.
        image = _flatten(image, config.background)
        return _turned(image, orientation) if orientation > 1 else image
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(f"{name} takes more memory than there is; make it smaller, or lower max_pixels") from error
    except Exception as error:
        # Decoders raise almost anything on damaged data: OSError, SyntaxError, struct.error, IndexError ...
        raise ImageError(f"{name} cannot be read; it is probably truncated or corrupt: {error}") from error


def _loaded(source: ImageSource) -> Image.Image:
    if isinstance(source, np.ndarray):
        return Image.fromarray(source[:, :, 0] if source.ndim == 3 and source.shape[2] == 1 else source)
    image = cast(Image.Image, source)
    image.load()
    return image


def _decoded(file: BinaryIO, header: Header) -> Image.Image:
    """The pixels as stored; the decoder is given nothing but what they depend on."""
    with _DECODERS[header.format](io.BufferedReader(PartsFile(file, header.parts), 1 << 16)) as image:
        if image.size != (header.width, header.height):
            raise ValueError(f"two sizes are given, {header.width}x{header.height} and {image.width}x{image.height}")
        if image.mode == "F":
            raise ValueError("it holds floating-point values, whose range is unknown; convert it to 8 bits first")
        image.load()
        return image


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    image = image.transpose(_UPRIGHT[orientation])
    image.info.pop("exif", None)
    return image


def _flatten(image: Image.Image, background: str) -> Image.Image:
    """RGB pixels, on the background where they are transparent; band by band, so that steps between cost little."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    width, height = image.size
    flat = Image.new("RGB", image.size, background)
    rows = max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height)))
        if band.mode.startswith("I"):
            band = _scale_16_bit(band)
        elif band.mode in ("RGBA", "LA", "PA", "RGBa", "La") or (
            band.mode in ("1", "L", "P", "RGB") and "transparency" in band.info
        ):
            # Premultiplied grey reaches RGBA only through LA.
            band = (band.convert("LA") if band.mode == "La" else band).convert("RGBA")
        if band.mode == "RGBA":
            flat.paste(band, (0, top), band)
        else:
            flat.paste(band.convert("RGB"), (0, top))
    return flat


def _scale_16_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey (modes `I;16*` and, as decoders use it, `I`) to 8 bits; PIL itself would clip at 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError("the image holds grey values outside 0 to 65535; convert it to 8 or 16 bits first")
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    opaque = Image.fromarray((values != transparent).astype(np.uint8) * 255)
    return Image.merge("RGBA", [grey, grey, grey, opaque])
