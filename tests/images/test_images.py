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


def test_grey_is_replicated() -> None:
    grey = pixels(channels=1)[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    for source in (grey, grey[..., None], Image.fromarray(grey), encoded(Image.fromarray(grey))):
        assert np.array_equal(np.array(load_image(source)), expected)


def composed(array: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """What an RGBA array looks like on a background."""
    alpha = array[..., 3:].astype(float) / 255
    return array[..., :3] * alpha + np.array(colour) * (1 - alpha)


@pytest.mark.parametrize(
    ("name", "colour"), [("#ffffff", (255, 255, 255)), ("Black", (0, 0, 0)), ("#0a80f0", (10, 128, 240))]
)
def test_transparency_is_composed_on_the_background(name: str, colour: tuple[int, int, int]) -> None:
    array = pixels(height=300, width=1000, channels=4)
    array[:50, :, 3], array[50:100, :, 3] = 255, 0
    image, config = Image.fromarray(array), PictureConfig(background=name)
    files = [encoded(image), encoded(image, "WEBP", lossless=True, exact=True), encoded(image, "TIFF")]
    for source in (array, image, *files):
        loaded = np.array(load_image(source, config))
        assert np.abs(loaded - composed(array, colour)).max() <= 1
        assert np.array_equal(loaded[:50], array[:50, :, :3]), "opaque pixels stay as they are"
        assert (loaded[50:100] == colour).all()
    grey = array[..., [0, 0, 0, 3]]
    for source in (_grey_alpha(array), encoded(_grey_alpha(array))):
        assert np.abs(np.array(load_image(source, config)) - composed(grey, colour)).max() <= 1
    # Premultiplied colours lose a little where they are nearly transparent.
    assert np.abs(np.array(load_image(image.convert("RGBa"), config)) - composed(array, colour)).max() <= 2


def _grey_alpha(array: np.ndarray) -> Image.Image:
    return Image.merge("LA", [Image.fromarray(np.ascontiguousarray(array[..., i])) for i in (0, 3)])


def test_a_transparent_colour_counts_as_transparency() -> None:
    red, blue, white = [255, 0, 0], [0, 0, 255], [255, 255, 255]
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    assert np.array(load_image(encoded(image))).tolist() == [[red, blue]]
    assert np.array(load_image(encoded(image, transparency=0))).tolist() == [[white, blue]]
    assert np.array(load_image(encoded(image, "GIF", transparency=1))).tolist() == [[red, white]]
    # A table of bytes, which PIL warns about on the direct way to RGB.
    assert np.array(load_image(encoded(image, transparency=bytes([255, 128])))).tolist() == [[red, [127, 127, 255]]]
    rgb = Image.fromarray(np.array([[red, blue]], np.uint8))
    assert np.array(load_image(encoded(rgb, transparency=(255, 0, 0)))).tolist() == [[white, blue]]
    grey = Image.fromarray(np.array([[7, 9]], np.uint8))
    assert np.array(load_image(encoded(grey, transparency=9)))[0, :, 0].tolist() == [7, 255]
    deep = Image.fromarray(np.array([[257, 258]], np.uint16))
    assert np.array(load_image(encoded(deep, transparency=258)))[0, :, 0].tolist() == [1, 255]
    assert np.array(load_image(encoded(deep, transparency=1)))[0, :, 0].tolist() == [1, 1]


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("colour", [0, 2])
def test_transparent_colours_of_every_depth(depth: int, colour: int) -> None:
    if colour == 2 and depth < 8:
        pytest.skip("PNG has no such files")
    count = 8 // depth if depth < 8 else 2
    values = [0] * (count - 1) + [2**depth - 1]
    channels = 3 if colour == 2 else 1
    raw = (
        b"".join(value.to_bytes(depth // 8, "big") * channels for value in values)
        if depth >= 8
        else bytes([2**depth - 1])
    )
    header = struct.pack(">IIBBBBB", count, 1, depth, colour, 0, 0, 0)
    for transparent, expected in ((2**depth - 1, [0] * (count - 1) + [200]), (0, [200] * (count - 1) + [255])):
        key = struct.pack(">H", transparent) * channels
        content = png((b"IHDR", header), (b"tRNS", key), (b"IDAT", zlib.compress(b"\0" + raw)))
        loaded = np.array(load_image(content, PictureConfig(background="#c8c8c8")))
        assert loaded[0, :, 0].tolist() == expected


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


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in (*chunks, (b"IEND", b""))
    )


def png_that_claims(width: int, height: int) -> bytes:
    return png((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 10)))


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
