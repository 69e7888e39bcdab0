"""Where a picture may come from, and what to do about everything else that people give."""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image, ImageFile

from pacevlm.errors import ImageError
from pacevlm.images.headers import read_header

_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkqA", "TU0AK")


def source_name(source: object) -> str:
    """What messages call a picture."""
    if isinstance(source, (str, os.PathLike)):
        name = repr(os.fspath(source))
        return f"image file {name if len(name) <= 300 else name[:300] + '...'}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"the image of {memoryview(source).nbytes} bytes"
    return "the array" if isinstance(source, np.ndarray) else "the image"


@contextmanager
def opened_file(source: object) -> Iterator[tuple[BinaryIO, int] | None]:
    """The file behind a source and its length; None if the pixels are in memory."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        content = bytes(source)
        if len(content) == 0:
            raise ImageError("the image has zero bytes; give the whole content of an image file")
        _refuse_text(content)
        yield io.BytesIO(content), len(content)
    elif isinstance(source, (str, os.PathLike)):
        name = source_name(source)
        try:
            # Not blocking, or a pipe without a writer would wait for one.
            opener = lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # noqa: E731
            file = open(source, "rb", opener=opener)  # noqa: SIM115
        except (OSError, ValueError) as error:
            raise _why_not_opened(source, error) from error
        with file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"{name} is not a regular file")
            if status.st_size == 0:
                raise ImageError(f"{name} has zero bytes; it was probably not written completely")
            yield file, status.st_size
    elif isinstance(source, Image.Image) and (behind := _file_behind(source)) is not None:
        place = behind.tell()
        try:
            yield behind, behind.seek(0, os.SEEK_END)
        finally:
            behind.seek(place)
    else:
        yield None


def _file_behind(image: Image.Image) -> BinaryIO | None:
    """The file of a PIL image that was opened and neither loaded nor changed since."""
    file = getattr(image, "fp", None)
    if not isinstance(image, ImageFile.ImageFile) or image._im is not None or file is None or image.tell() != 0:
        return None
    try:
        place = file.tell()
        header = read_header(file, file.seek(0, os.SEEK_END))
        file.seek(place)
    except (OSError, ValueError) as error:
        what = error if isinstance(error, ImageError) else f"cannot be read: {error}"
        raise ImageError(f"the image {what}") from error
    # PIL can be told to decode a JPEG smaller, and the picture is then what it was told.
    is_reduced = header.format == "JPEG" and image.size != (header.width, header.height)
    return None if is_reduced else cast(BinaryIO, file)


def _why_not_opened(source: str | os.PathLike[str], error: OSError | ValueError) -> ImageError:
    name, text = source_name(source), os.fsdecode(source)
    if isinstance(error, IsADirectoryError):
        return ImageError(f"{name} is a directory; give the path of one image")
    if isinstance(error, (FileNotFoundError, NotADirectoryError)) or _hint(text):
        return ImageError(f"{name} does not exist; {_hint(text) or 'check the path'}")
    return ImageError(f"{name} cannot be opened: {error}")


def _hint(text: str) -> str:
    """What to do about text that is not a path; empty if it may be one."""
    start = text.lstrip()[:64]
    if start.startswith("data:"):
        return "it is a data: URL; decode what stands behind the comma with base64.b64decode and give the bytes"
    if re.match("file:/", start, re.IGNORECASE):
        return "give the plain path, without file://"
    if re.match("[a-z][a-z0-9+.-]+:/", start, re.IGNORECASE):
        return "it is a URL; download it first and give the path or the bytes"
    if start.startswith(_BASE64_STARTS):
        return "it looks like base64; decode it with base64.b64decode and give the bytes"
    if start.startswith("<"):
        return "it is markup; a drawing must be converted to JPEG or PNG first"
    if re.search("[\0-\x08\x0e-\x1f\x80-\x9f\ufffd]", text[:64]):
        return "it holds the content of a file as text; read it as bytes, open(path, 'rb').read(), and give these"
    return ""


def _refuse_text(content: bytes) -> None:
    """Raise ImageError for bytes that are a path, a URL or base64 rather than a file's content."""
    if not re.fullmatch(rb"[\x20-\x7e]{4}[\x20-\x7e\x80-\xff]*", content[:64]):
        return
    text = content[:4096].decode("utf-8", "replace")
    is_path = len(content) < 4096 and (
        re.search(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", text, re.IGNORECASE) or os.path.exists(text)
    )
    hint = "they hold a path; give it as text: path.decode()" if is_path else _hint(text)
    if hint and not hint.startswith("it is markup"):
        raise ImageError(f"the image of {len(content)} bytes is no file's content; {hint.replace('it ', 'this ', 1)}")


def object_hint(source: object) -> str:
    """What to do about an object that is no picture, to be put behind the error; empty if nothing is known."""
    if type(source).__name__ == "Tensor":
        return "; give image.cpu().numpy(), with channels last"
    if hasattr(source, "read"):
        return "; read the file and give its bytes"
    if isinstance(source, (list, tuple)):
        return "; give one image, not a list, and numbers as np.array(numbers, np.uint8)"
    return ""


def array_mode(array: np.ndarray[Any, Any]) -> str:
    """PIL's mode of an array; raises ImageError."""
    if array.dtype != np.uint8:
        if array.dtype == bool:
            how = "image.astype(np.uint8) * 255"
        elif array.dtype == np.uint16:
            how = "(image // 257).astype(np.uint8), if white is 65535"
        elif np.issubdtype(array.dtype, np.integer):
            how = "image.astype(np.uint8), if its values are 0 to 255"
        elif np.issubdtype(array.dtype, np.floating):
            how = "(image * 255).round().astype(np.uint8), if its values are 0 to 1"
        else:
            how = "np.array(image, np.uint8)"
        raise ImageError(f"an image array must be uint8 with values 0 to 255, not {array.dtype}; convert it with {how}")
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4)):
        return {3: "RGB", 4: "RGBA"}.get(array.shape[2] if array.ndim == 3 else 1, "L")
    how = ""
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        how = "; put channels last with image.transpose(1, 2, 0)"
    elif array.ndim == 4 and array.shape[0] == 1:
        how = "; take image[0] of the batch"
    raise ImageError(
        f"an image array must have the shape (height, width) or (height, width, 1, 3 or 4), not {array.shape}{how}"
    )
