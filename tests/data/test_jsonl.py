from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pacevlm.data.jsonl import JsonlDataset
from pacevlm.errors import DataError, ImageError


def write(folder: Path, *lines: str | dict[str, Any]) -> Path:
    """Write a data set whose lines are raw text or objects, beside an image `a.png` of 3 by 2 pixels."""
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    Image.fromarray(pixels).save(folder / "a.png")
    path = folder / "set.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


GOOD = {"image": "a.png", "question": "What?", "answer": "7"}


def test_fields_metadata_and_pixels_arrive(tmp_path: Path) -> None:
    path = write(tmp_path, {**GOOD, "id": "x", "family": "sum", "tags": [1, {"a": None}]}, "", {**GOOD, "id": 5}, GOOD)
    dataset = JsonlDataset(path)
    assert len(dataset) == 3
    first = dataset[0]
    assert (first.example_id, first.question, first.references) == ("x", "What?", ("7",))
    assert first.metadata == {"family": "sum", "tags": [1, {"a": None}]}
    assert first.image.mode == "RGB"
    assert first.image.tobytes() == bytes(range(18))
    # The default id counts lines of the file, empty ones included.
    assert [example.example_id for example in dataset] == ["x", "5", "set-4"]
    assert [example.example_id for example in dataset[1:]] == ["5", "set-4"]
    with pytest.raises(IndexError):
        dataset[3]


def test_absolute_paths_byte_order_marks_and_other_line_ends_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, {**GOOD, "image": str(tmp_path / "a.png")})
    text = path.read_text(encoding="utf-8")
    separators = json.dumps({**GOOD, "question": "one\u2028two"}, ensure_ascii=False)
    path.write_bytes(("\ufeff" + text + "\r\n" + separators + "\r\n").encode())
    dataset = JsonlDataset(path)
    assert [example.question for example in dataset] == ["What?", "one\u2028two"]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_every_image_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = write(tmp_path, {**GOOD, "image": "m.tif"})
    Image.new(mode, (4, 5)).save(tmp_path / "m.tif")
    image = JsonlDataset(path)[0].image
    assert (image.mode, image.size) == ("RGB", (4, 5))


def test_orientation_is_applied(tmp_path: Path) -> None:
    path = write(tmp_path, {**GOOD, "image": "rotated.png"})
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (4, 9)).save(tmp_path / "rotated.png", exif=exif)
    assert JsonlDataset(path)[0].image.size == (9, 4)


def test_pictures_are_read_when_they_are_wanted_and_errors_name_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, {**GOOD, "image": "broken.png"}, {**GOOD, "image": "cut.png"})
    (tmp_path / "broken.png").write_bytes(b"not an image")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    dataset = JsonlDataset(path)
    assert dataset[0].image.size == (3, 2)
    for number, name in ((2, "broken"), (3, "cut")):
        for read in ("image", "picture_id", "content_id"):
            with pytest.raises(ImageError, match=rf"set\.jsonl, line {number}: .*{name}\.png"):
                getattr(dataset[number - 1], read)
    with pytest.raises(ImageError, match=r"line 2: .*broken\.png"):
        dataset[1].picture  # noqa: B018


@pytest.mark.parametrize("name", ["missing.png", "null\0.png", "x" * 5000, "."])
def test_a_picture_that_is_missing_is_an_image_error_or_a_skipped_line(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, GOOD, "", {**GOOD, "image": name}, {**GOOD, "question": "Else?"})
    with pytest.raises(ImageError, match=r"set\.jsonl, line 3: there is no image"):
        JsonlDataset(path)
    dataset = JsonlDataset(path, skip_unreadable=True)
    assert [example.question for example in dataset] == ["What?", "Else?"]
    assert len(dataset.skipped) == 1
    assert "line 3: there is no image" in dataset.skipped[0]
    with pytest.raises(DataError, match="no examples: the pictures of all 1 lines are missing"):
        JsonlDataset(write(tmp_path, {**GOOD, "image": name}), skip_unreadable=True)


@pytest.mark.parametrize(
    ("answer", "references"),
    [
        ("7", ("7",)),
        (7, ("7",)),
        (-7, ("-7",)),
        (0.5, ("0.5",)),
        (7.0, ("7",)),
        (1e3, ("1000",)),
        (-0.0, ("0",)),
        (1e-7, ("0.0000001",)),
        (12345678.9, ("12345678.9",)),
        (10**20, ("1" + "0" * 20,)),
        (10**400, ("1" + "0" * 400,)),
        (["yes", 1, 0.25], ("yes", "1", "0.25")),
        (["yes"] * 10, ("yes",) * 10),
    ],
    ids=str,
)
def test_an_answer_is_a_text_a_number_or_a_list(tmp_path: Path, answer: Any, references: tuple[str, ...]) -> None:
    assert JsonlDataset(write(tmp_path, {**GOOD, "answer": answer}))[0].references == references


def test_a_number_is_read_however_it_is_written(tmp_path: Path) -> None:
    lines = [json.dumps(GOOD).replace('"7"', number) for number in ("1e3", "7.00", "0.50", "-0")]
    assert [example.references for example in JsonlDataset(write(tmp_path, *lines))] == [
        *(("1000",), ("7",), ("0.5",), ("0",))
    ]


def test_choices_and_split_are_kept(tmp_path: Path) -> None:
    dataset = JsonlDataset(write(tmp_path, {**GOOD, "choices": ["cat", 7, 0.5], "split": "val"}, GOOD))
    assert dataset[0].choices == ("cat", "7", "0.5")
    assert dataset[1].choices == ()
    assert dataset.splits == ["val", None]
    assert "split" not in dataset[0].metadata


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[1, 2]", "not an object"),
        ({"image": "a.png", "question": "What?"}, "'answer' is missing"),
        ({"image": "a.png", "answer": "7"}, "'question' is missing"),
        ({"question": "What?", "answer": "7"}, "'image' is missing"),
        *[
            ({**GOOD, "answer": bad}, "'answer' is")
            for bad in (True, None, {}, [], "", " ", ["a", True], [["a"]], [""])
        ],
        *[(json.dumps(GOOD).replace('"7"', bad), "'answer' is") for bad in ("NaN", "-Infinity", "1e999")],
        *[({**GOOD, "choices": bad}, "'choices' is") for bad in ("cat", [], [None], 7)],
        *[({**GOOD, "split": bad}, "'split' is") for bad in ("dev", None, 1, "Train")],
        ({**GOOD, "question": "  "}, "'question' is"),
        ({**GOOD, "id": True}, "'id' is True"),
        ({**GOOD, "id": ""}, "'id' is ''"),
        ({**GOOD, "image": ""}, "'image' is ''"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: str | dict[str, Any], message: str) -> None:
    path = write(tmp_path, GOOD, "", line, GOOD)
    with pytest.raises(DataError, match=rf"set\.jsonl, line 3: .*{message}"):
        JsonlDataset(path)


def test_repeated_id_names_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path, {**GOOD, "id": "1"}, GOOD, {**GOOD, "id": 1})
    with pytest.raises(DataError, match="line 3: id '1' was given on line 1"):
        JsonlDataset(path)


def test_text_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    path.write_bytes(path.read_bytes() + b"\n\xff")
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        JsonlDataset(path)


def test_missing_or_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data set"):
        JsonlDataset(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no examples"):
        JsonlDataset(write(tmp_path, "", "  "))
