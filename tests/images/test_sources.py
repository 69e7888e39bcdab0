"""One way to read a picture: by its header, the same pixels from wherever it comes, and a hint for what is none."""

from __future__ import annotations

import base64
import io
import json
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features

import pacevlm.images
from pacevlm.config import DataConfig, ModelConfig, PictureConfig, config_from_dict, config_to_dict
from pacevlm.data.splits import load_splits
from pacevlm.errors import ConfigError, ImageError
from pacevlm.images import TURNED, load_image, open_picture
from pacevlm.models.molmoe.image_processing import MolmoEImageProcessor
from pacevlm.pipeline import RunConfig, load_elastic_model
from pacevlm.types import Example

UPRIGHT = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
# As a camera that was held sideways stores it: to be turned by 270 degrees (tag 6).
STORED = Image.fromarray(np.ascontiguousarray(np.rot90(UPRIGHT, 1)))
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def encoded(image: Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def turned_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


SMOOTH = Image.linear_gradient("L").convert("RGB")
WITH_ALPHA = Image.merge("RGBA", [*SMOOTH.split(), Image.radial_gradient("L")])
DEEP = Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256))
KINDS = {
    "jpeg": encoded(SMOOTH, "JPEG"),
    "progressive jpeg": encoded(SMOOTH, "JPEG", progressive=True),
    "cmyk jpeg": encoded(SMOOTH.convert("CMYK"), "JPEG"),
    "png": encoded(SMOOTH),
    "png with transparency": encoded(WITH_ALPHA),
    "16-bit png": encoded(DEEP),
    "1-bit png": encoded(SMOOTH.convert("1")),
    "webp": encoded(SMOOTH, "WEBP"),
    "lossless webp": encoded(SMOOTH, "WEBP", lossless=True),
    "webp with transparency": encoded(WITH_ALPHA, "WEBP"),
    "animated webp": encoded(SMOOTH, "WEBP", save_all=True, append_images=[STORED.resize(SMOOTH.size)]),
    "gif": encoded(SMOOTH, "GIF"),
    "bmp": encoded(SMOOTH, "BMP"),
    "tiff": encoded(SMOOTH, "TIFF", compression="tiff_lzw"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_gives_the_same_kind_and_pixels(kind: str, tmp_path: Path) -> None:
    content = KINDS[kind]
    path = tmp_path / "picture"
    path.write_bytes(content)
    expected = np.array(load_image(content))
    with Image.open(path) as opened, Image.open(path) as loaded:
        loaded.load()
        for source in (content, path, str(path), opened):
            picture = open_picture(source)
            assert (picture.kind, picture.num_bytes) == (kind, len(content))
            assert (picture.height, picture.width) == expected.shape[:2]
            assert np.array_equal(np.array(picture.decode()), expected)
        example = Example("id", path, "What?", ("this",))
        assert np.array_equal(np.array(example.image), expected)
        if kind != "16-bit png":
            assert np.array_equal(np.array(load_image(loaded)), expected)
        in_memory = open_picture(loaded)
        assert in_memory.num_bytes == 0
        assert in_memory.kind == ("memory" if loaded.mode == "RGB" else f"{loaded.mode} in memory")


def test_further_kinds() -> None:
    for settings in ({"mode": "L"}, {"mode": "P"}):
        assert open_picture(encoded(SMOOTH.convert(settings["mode"]))).kind == "png"
    assert open_picture(encoded(SMOOTH.convert("L"), "JPEG")).kind == "jpeg"
    assert open_picture(encoded(SMOOTH, "MPO", save_all=True, append_images=[STORED])).kind == "jpeg"
    assert open_picture(encoded(SMOOTH.quantize(9), bits=4)).kind == "4-bit png"
    assert open_picture(UPRIGHT).kind == "memory"
    assert open_picture(UPRIGHT[..., 0]).kind == "L in memory"
    assert open_picture(Image.new("I;16", (3, 3))).kind == "I;16 in memory"


def test_opening_decodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(pacevlm.images, "_DECODERS", dict.fromkeys(pacevlm.images._DECODERS, refuse))
    for content in KINDS.values():
        open_picture(content)
    elongated = encoded(Image.new("RGB", (4000, 2)))
    with pytest.raises(ImageError, match="elongated"):
        MolmoEImageProcessor().prepare(elongated, 4)


def test_a_file_that_changes_between_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(SMOOTH))
    picture = open_picture(path)
    path.write_bytes(encoded(STORED))
    with pytest.raises(ImageError, match=r"picture\.png.*while it is read"):
        picture.decode()


# Orientation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
def test_the_orientation_tag_counts_in_every_format(kind: str) -> None:
    settings = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    content = encoded(STORED, kind, exif=turned_exif(), **settings)
    lossless = kind not in ("JPEG", "MPO")
    with Image.open(io.BytesIO(content)) as opened, Image.open(io.BytesIO(content)) as loaded:
        loaded.load()
        for source in (content, opened, loaded):
            picture = open_picture(source)
            assert (picture.width, picture.height) == (70, 40)
            upright = picture.decode()
            assert upright.size == (70, 40)
            if lossless:
                assert np.array_equal(np.array(upright), UPRIGHT)
            assert load_image(upright).size == (70, 40), "turned once"


def test_nothing_but_the_tag_turns_a_picture() -> None:
    text = PngImagePlugin.PngInfo()
    payload = turned_exif().tobytes()
    text.add_text("Raw profile type exif", f"\nexif\n{len(payload):8d}\n{payload.hex()}\n", zip=True)
    text.add_itxt("XML:com.adobe.xmp", XMP.decode())
    contents = [
        encoded(STORED, pnginfo=text),
        encoded(STORED, "JPEG", xmp=XMP),
        encoded(STORED, "WEBP", xmp=XMP, lossless=True),
        encoded(STORED, "TIFF", tiffinfo={700: XMP}),
    ]
    for content in contents:
        with Image.open(io.BytesIO(content)) as opened, Image.open(io.BytesIO(content)) as loaded:
            if loaded.format != "TIFF":  # which PIL turns as it loads
                loaded.load()
            for source in (content, opened, loaded):
                assert load_image(source).size == STORED.size


def test_exif_data_behind_the_pixels_counts() -> None:
    content = encoded(STORED)
    exif = turned_exif().tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    assert np.array_equal(np.array(load_image(content[:-12] + chunk + content[-12:])), UPRIGHT)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_impossible_orientations_are_none(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert load_image(encoded(STORED, exif=exif)).size == STORED.size


# Metadata -------------------------------------------------------------------------------------------------------------


def jpeg_with(*segments: tuple[int, bytes]) -> bytes:
    content = encoded(STORED, "JPEG")
    extra = b"".join(struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data for marker, data in segments)
    return content[:2] + extra + content[2:]


@pytest.mark.parametrize(
    "content",
    [
        jpeg_with((0xE0, b"JFIF\0")),
        jpeg_with((0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff")),
        jpeg_with((0xE1, b"Exif\0\0")),
        jpeg_with((0xE2, b"ICC_PROFILE\0")),
        jpeg_with((0xE2, b"MPF\0nonsense")),
        jpeg_with((0xED, b"Photoshop 3.0\0" + b"8BIM" * 3)),
        jpeg_with((0xEE, b"Adobe")),
        jpeg_with((0xFE, b"\xff\xd9\xff\xda")),
        *(jpeg_with((0xE1, b"Exif\0\0" + turned_exif().tobytes()[6:][:cut])) for cut in range(0, 20, 3)),
    ],
)
def test_damaged_metadata_of_a_jpeg_hides_nothing(content: bytes) -> None:
    plain = np.array(load_image(encoded(STORED, "JPEG")))
    assert np.array_equal(np.array(load_image(content)), plain)


def test_damaged_or_huge_metadata_of_other_files_hides_nothing() -> None:
    content = encoded(STORED)
    for name, data in (
        (b"zTXt", b"key\0\0" + zlib.compress(bytes(20_000_000), 1)),
        (b"iCCP", b"profile\0\0not compressed"),
        (b"iTXt", b"\xff" * 40),
        (b"acTL", b""),
        (b"pHYs", b"\0"),
        (b"eXIf", b"nonsense"),
    ):
        for checksum in (zlib.crc32(name + data), 0):
            chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)
            for at in (33, len(content) - 12):
                assert np.array_equal(np.array(load_image(content[:at] + chunk + content[at:])), np.array(STORED))
    gif = encoded(STORED, "GIF")
    start = 13 + (3 << (gif[10] & 7) + 1 if gif[10] & 0x80 else 0)
    comment = b"\x21\xfe" + (b"\xff" + bytes(255)) * 20_000 + b"\0"
    assert np.array_equal(np.array(load_image(gif[:start] + comment + gif[start:])), np.array(load_image(gif)))


# What is no picture ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["EPS", "PDF", "PPM", "ICO", "TGA", "PCX", "SGI", "JPEG2000", "DDS", "AVIF"])
def test_only_listed_formats_are_read_and_nothing_starts_a_program(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if {"JPEG2000": "jpg_2000", "AVIF": "avif"}.get(kind, "zlib") not in features.get_supported():
        pytest.skip("this Pillow cannot write such files")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    content = encoded(SMOOTH.resize((32, 32)), kind)
    (tmp_path / "picture.jpg").write_bytes(content)
    sources: list[object] = [content, tmp_path / "picture.jpg"]
    if kind not in ("PDF", "ICO"):  # PIL does not open the one, and decodes the other as it opens it
        sources.append(Image.open(io.BytesIO(content)))
    for source in sources:
        with pytest.raises(ImageError, match="JPEG, PNG, WebP, GIF, BMP and TIFF"):
            open_picture(source)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC.*convert it to JPEG or PNG"),
        (b"\0\0\0\x18ftypavif" + bytes(40), "AVIF.*convert"),
        (b"<?xml version='1.0'?>\n<svg width='3'/>", "SVG.*convert"),
        (b"  <svg/>", "SVG"),
        (b"%PDF-1.7 more of it", "PDF.*convert"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "EPS.*convert"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"data:image/png;base64,iVBORw0KGgo=", "data: URL"),
        (base64.b64encode(KINDS["png"]), "base64"),
        (base64.b64encode(KINDS["jpeg"]), "base64"),
        (b"photos/cat.jpg", "path.*as text"),
        (b"https://example.com/cat.png", "download it first|as text"),
    ],
)
def test_other_content_gets_a_hint(content: bytes, hint: str) -> None:
    with pytest.raises(ImageError, match=hint):
        open_picture(content)


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("data:image/png;base64,iVBORw0KGgo=" + "A" * 9000, "data: URL"),
        ("file:///photos/cat.png", "without file://"),
        ("HTTPS://example.com/cat.png", "download it first"),
        (Path("https://example.com/cat.png"), "download it first"),
        (base64.b64encode(KINDS["png"]).decode(), "base64"),
        (KINDS["png"].decode("latin-1"), "bytes"),
        (KINDS["jpeg"].decode("utf-8", "replace"), "bytes"),
        ("<svg width='3'/>", "markup"),
        ("nothing.png", "check the path"),
        ("", "check the path"),
        (np.zeros((4, 4), bool), r"\* 255"),
        (np.zeros((4, 4, 3), np.float32), r"\* 255"),
        (np.zeros((4, 4, 3), np.int64), r"astype\(np.uint8\)"),
        (np.zeros((4, 4), np.uint16), "257"),
        (np.zeros((3, 40, 40), np.uint8), r"transpose\(1, 2, 0\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"image\[0\]"),
        (torch.zeros(3, 4, 4), r"numpy\(\)"),
        (io.BytesIO(KINDS["png"]), "give its bytes"),
        ([UPRIGHT], "not a list"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, (str, Path)) else type(value).__name__,
)
def test_wrong_sources_get_a_hint(source: object, hint: str) -> None:
    with pytest.raises(ImageError, match=hint):
        open_picture(source)


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", ["", "rgb", "#fff", "#12345g", "#11223344", 7, None, "hsl(0,0%,0%)"])
def test_backgrounds_that_are_no_colour_are_refused(background: object) -> None:
    with pytest.raises(ConfigError, match="background"):
        PictureConfig(background=background)


@pytest.mark.parametrize("max_pixels", [0, -1, True, 1e6, "9"])
def test_pixel_limits_that_are_no_number_are_refused(max_pixels: object) -> None:
    with pytest.raises(ConfigError, match="max_pixels"):
        PictureConfig(max_pixels=max_pixels)


def test_settings_reach_every_reader(tmp_path: Path, tiny_elastic_dir: Path) -> None:
    picture = PictureConfig("black", 5000)
    config = RunConfig(picture=picture)
    assert config_from_dict(RunConfig, config_to_dict(config)) == config
    assert load_elastic_model(ModelConfig(path=str(tiny_elastic_dir)), picture).picture_config == picture
    (tmp_path / "a.png").write_bytes(KINDS["png with transparency"])
    lines = [{"image": "a.png", "question": "What?", "answer": "this", "split": "test"}]
    for part, colour in (("train", "red"), ("val", "green")):
        Image.new("RGBA", (9, 9), colour).save(tmp_path / f"{part}.png")
        lines.append({"image": f"{part}.png", "question": "What?", "answer": "this", "split": part})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    splits = load_splits(DataConfig(dataset=str(tmp_path / "data.jsonl")), PictureConfig("black"))
    expected = np.array(load_image(KINDS["png with transparency"], PictureConfig("black")))
    assert not np.array_equal(expected, np.array(load_image(KINDS["png with transparency"])))
    assert np.array_equal(np.array(splits.test[0].image), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_file_is_of_a_kind_of_its_own(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("JPEG", "PNG", "WEBP"):
        kind = open_picture(encoded(SMOOTH, name, exif=exif)).kind
        assert kind == ("" if orientation == 1 else TURNED) + open_picture(encoded(SMOOTH, name)).kind
