"""Image loading: what is accepted becomes upright 8-bit RGB, everything else a clear error."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pacevlm.errors import ImageError
from pacevlm.images import PictureConfig, load_image


def pixels(height: int = 6, width: int = 9, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def test_all_sources_give_the_same_picture(tmp_path: Path) -> None:
    array = pixels()
    image = Image.fromarray(array)
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(image))
    for source in (path, str(path), path.read_bytes(), bytearray(path.read_bytes()), image, array):
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        assert np.array_equal(np.array(loaded), array)


def test_an_rgb_image_is_not_copied() -> None:
    image = Image.fromarray(pixels())
    assert load_image(image) is image


def test_grey_is_replicated_and_alpha_dropped() -> None:
    array = pixels(channels=4)
    assert np.array_equal(np.array(load_image(array)), array[..., :3])
    assert np.array_equal(np.array(load_image(encoded(Image.fromarray(array)))), array[..., :3])
    grey = array[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    for source in (grey, grey[..., None], Image.fromarray(grey), encoded(Image.fromarray(grey))):
        assert np.array_equal(np.array(load_image(source)), expected)
    grey_alpha = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(array[..., 1])])
    assert np.array_equal(np.array(load_image(grey_alpha)), expected)


def test_palettes_keep_their_colours_with_and_without_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    expected = [[[255, 0, 0], [0, 0, 255]]]
    assert np.array(load_image(encoded(image))).tolist() == expected
    # Transparency as one entry, and as a table of bytes, which PIL warns about on the direct way to RGB.
    assert np.array(load_image(encoded(image, transparency=0))).tolist() == expected
    assert np.array(load_image(encoded(image, transparency=bytes([0, 128])))).tolist() == expected


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV"])
def test_every_8_bit_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (4, 3), (255, 255, 255))
    if mode == "PA":
        image = image.convert("P")
    elif mode == "RGBa":
        image = image.convert("RGBA")
    loaded = load_image(image.convert(mode))
    assert (loaded.mode, loaded.size) == ("RGB", (4, 3))
    assert np.array(loaded).min() >= 250, "white stays white"


def test_cmyk_files_keep_their_colours() -> None:
    image = Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK")
    loaded = np.array(load_image(encoded(image, "TIFF")))
    assert np.abs(loaded.astype(int) - [200, 40, 90]).max() <= 1


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    expected = [0, 0, 1, 1, 128, 254, 255, 255]
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    for source in (image, encoded(image), encoded(image, "TIFF"), Image.fromarray(values.astype(np.int32))):
        loaded = np.array(load_image(source))
        assert loaded.shape == (1, 8, 3)
        assert loaded[0, :, 0].tolist() == expected
        assert (loaded == loaded[..., :1]).all()
    for value in (-1, 65536):
        with pytest.raises(ImageError, match="65535"):
            load_image(Image.fromarray(np.full((2, 2), value, np.int32)))


def test_floating_point_images_are_refused() -> None:
    with pytest.raises(ImageError, match="floating-point"):
        load_image(Image.fromarray(np.full((2, 2), 0.5, np.float32)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_orientation_is_applied_once(orientation: int, kind: str) -> None:
    upright = pixels(height=4, width=7)
    stored = {  # how a camera held that way stores the upright picture
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load_image(encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif))
    assert np.array_equal(np.array(loaded), upright)
    assert np.array_equal(np.array(load_image(loaded)), upright)


def test_damaged_exif_does_not_hide_the_picture() -> None:
    array = pixels()
    assert np.array_equal(np.array(load_image(encoded(Image.fromarray(array), exif=b"Exif\0\0not tiff at all"))), array)


def test_the_first_frame_of_an_animation_is_used() -> None:
    frames = [Image.new("RGB", (5, 5), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array(load_image(animated))[0, 0].tolist() == [255, 0, 0]


def test_files_that_are_not_images_are_refused(tmp_path: Path) -> None:
    whole = encoded(Image.fromarray(pixels(200, 200)))
    jpeg = encoded(Image.fromarray(pixels(200, 200)), "JPEG")
    contents = {
        "zero bytes": b"",
        "not an image": b"hello, this is text",
        "truncated or corrupt": whole[: len(whole) // 2],
        "truncated": jpeg[: len(jpeg) // 2],
        "corrupt": whole[:60] + bytes(200) + whole[260:],
        "unknown format": np.random.default_rng(1).bytes(500),
    }
    for message, content in contents.items():
        path = tmp_path / "picture.png"
        path.write_bytes(content)
        for source in (path, content):
            with pytest.raises(ImageError, match=message):
                load_image(source)


def test_paths_that_are_not_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist; check the path"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(ImageError, match="directory"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="download it first"):
        load_image("https://example.com/cat.png")
    with pytest.raises(ImageError):
        load_image("null\0byte.png")
    with pytest.raises(ImageError):
        load_image("x" * 5000)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="regular file"):
        load_image(tmp_path / "pipe")


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [9_480, 10_001, 100_000])
def test_decompression_bombs_are_refused_before_decoding(side: int) -> None:
    # 9480 squared lies under the limit but above PIL's own warning: it must fail for its content, without a warning.
    message = "truncated or corrupt" if side**2 <= 100_000_000 else "pixels|too large"
    with pytest.raises(ImageError, match=message):
        load_image(png_that_claims(side, side))


def test_the_pixel_limit_counts_for_every_source() -> None:
    array = pixels(10, 10)
    image = Image.fromarray(array)
    for source in (array, image, encoded(image)):
        assert load_image(source, PictureConfig(max_pixels=100)).size == (10, 10)
        with pytest.raises(ImageError, match="10x10 pixels, more than the 99"):
            load_image(source, PictureConfig(max_pixels=99))


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.int64),
        np.zeros((4, 4), bool),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0), np.uint8),
        Image.new("RGB", (0, 5)),
        b"",
        None,
        7,
        [[0, 1], [2, 3]],
    ],
    ids=lambda source: f"{type(source).__name__}{getattr(source, 'shape', '')}",
)
def test_unfit_sources_are_refused(source: object) -> None:
    with pytest.raises(ImageError):
        load_image(source)


def test_a_pil_image_of_a_truncated_file_is_refused() -> None:
    whole = encoded(Image.fromarray(pixels(200, 200)))
    with Image.open(io.BytesIO(whole[: len(whole) // 2])) as image, pytest.raises(ImageError, match="truncated"):
        load_image(image)
