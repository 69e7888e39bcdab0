"""The parts of a data set share no picture, follow from content alone, and are as large as asked for."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pacevlm.config import MADE_DATASETS, DataConfig
from pacevlm.data.division import part_of
from pacevlm.data.splits import MADE, Splits, load_splits
from pacevlm.errors import ConfigError, DataError, ImageError
from pacevlm.types import Example

PARTS = ("train", "val", "test")


def lines_of(folder: Path, count: int, num_questions: int = 1, first: int = 0, **fields: Any) -> list[dict[str, Any]]:
    """Lines about `count` pictures, several questions each; the pictures are written beside them."""
    lines = []
    for i in range(first, first + count):
        Image.new("RGB", (8, 8), (i % 256, i // 256, 7)).save(folder / f"{i}.png")
        lines += [
            {"image": f"{i}.png", "question": f"{i}, {q}?", "answer": str(q), **fields} for q in range(num_questions)
        ]
    return lines


def write(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


def facts(splits: Splits) -> dict[str, list[tuple[str, ...]]]:
    return {part: [(e.example_id, e.content_id, *e.references) for e in getattr(splits, part)] for part in PARTS}


def pictures(examples: Any) -> set[str]:
    # Of the pixels as they are now, not as they were noted.
    return {dataclasses.replace(example, known_picture_id=None).picture_id for example in examples}


def assert_apart(splits: Splits) -> None:
    train, val, test = (pictures(getattr(splits, part)) for part in PARTS)
    assert not train & val
    assert not train & test
    assert not val & test


# The digits ----------------------------------------------------------------------------------------------------------


def test_digits_come_in_their_own_parts() -> None:
    splits = load_splits(DataConfig(num_train=40, num_val=20, num_test=30, seed=2))
    assert (splits.name, splits.metric.name) == ("digits-crossed", "exact_match")
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [40, 20, 30]
    ids = [example.example_id for part in (splits.train, splits.val, splits.test) for example in part]
    assert ids[0] == "digits-crossed-train-2-0"
    assert len(set(ids)) == 90
    assert splits.train[1] is splits.train[1]  # made once
    assert [example.example_id for example in splits.test[1:3]] == [
        "digits-crossed-test-2-1",
        "digits-crossed-test-2-2",
    ]
    assert_apart(splits)
    with pytest.raises(IndexError):
        splits.val[20]


def test_the_digits_identity_is_what_they_are_made_from() -> None:
    one, other = (load_splits(DataConfig(num_train=5, num_val=3, num_test=4, seed=seed)) for seed in (2, 3))
    longer = load_splits(DataConfig(num_train=5, num_val=3, num_test=9, seed=2))
    assert all(one.identity[part] != other.identity[part] for part in PARTS)
    assert [one.identity[part] == longer.identity[part] for part in PARTS] == [True, True, False]


@pytest.mark.parametrize("dataset", MADE_DATASETS)
def test_every_data_set_inside_the_package_has_three_parts_of_its_own(dataset: str) -> None:
    assert tuple(MADE) == MADE_DATASETS
    splits = load_splits(DataConfig(dataset, num_train=60, num_val=30, num_test=30))
    assert splits.name.startswith(dataset)
    assert [len(getattr(splits, part)) for part in PARTS] == [60, 30, 30]
    assert_apart(splits)
    with pytest.raises(ConfigError, match=f"dataset is '{dataset}', which has a test split of its own"):
        DataConfig(dataset, test_dataset="test.jsonl")


# Dividing a file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_no_picture_is_in_two_parts(tmp_path: Path, seed: int) -> None:
    path = write(tmp_path / "data.jsonl", lines_of(tmp_path, 40, num_questions=4))
    splits = load_splits(DataConfig(dataset=path, num_train=60, num_val=4, num_test=12, seed=seed))
    assert_apart(splits)
    assert [len(getattr(splits, part)) for part in PARTS] == [60, 4, 12]
    for part in PARTS:
        assert {part_of(picture, seed) for picture in pictures(getattr(splits, part))} == {part}


def test_the_same_pixels_are_one_picture_whatever_the_file(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, 30)
    for i in range(30):
        with Image.open(tmp_path / f"{i}.png") as image:
            image.save(tmp_path / f"copy{i}.bmp")
            image.convert("RGBA").save(tmp_path / f"alpha{i}.png")
    lines += [
        {**line, "image": f"{kind}{i}.{end}"}
        for kind, end in (("copy", "bmp"), ("alpha", "png"))
        for i, line in enumerate(lines)
    ]
    splits = load_splits(DataConfig(dataset=write(tmp_path / "data.jsonl", lines)))
    assert_apart(splits)
    assert sum(len(getattr(splits, part)) for part in PARTS) == 90
    assert len(pictures([*splits.train, *splits.val, *splits.test])) == 30


def test_the_order_of_lines_and_the_place_of_the_folder_change_nothing(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, 40, num_questions=3)
    lines += [*lines[:5], {**lines[0], "answer": "other"}]  # repeated, and with another reference
    path = write(tmp_path / "data.jsonl", lines)
    config = DataConfig(dataset=path, num_train=40, num_val=5, num_test=9, skip_test=2)
    splits = load_splits(config)
    for seed in range(3):
        random.Random(seed).shuffle(lines)
        write(tmp_path / "data.jsonl", lines)
        again = load_splits(config)
        assert facts(again) == facts(splits)
        assert again.identity == splits.identity
    moved = Path(shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-moved"))
    again = load_splits(dataclasses.replace(config, dataset=str(moved / "data.jsonl")))
    assert facts(again) == facts(splits)
    assert again.identity == splits.identity
    ids = [example.example_id for part in PARTS for example in getattr(load_splits(DataConfig(dataset=path)), part)]
    assert len(set(ids)) == len(ids) == 126


def test_a_part_does_not_depend_on_what_else_a_file_holds(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, 60)
    whole = load_splits(DataConfig(dataset=write(tmp_path / "whole.jsonl", lines)))
    half = load_splits(DataConfig(dataset=write(tmp_path / "half.jsonl", lines[:30])))
    for part in PARTS:
        assert pictures(getattr(half, part)) == pictures(
            e for e in getattr(whole, part) if int(e.question.split(",")[0]) < 30
        )
    other = load_splits(DataConfig(dataset=write(tmp_path / "whole.jsonl", lines), seed=1))
    assert pictures(other.test) != pictures(whole.test)


def test_skipped_test_examples_are_in_no_part(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", lines_of(tmp_path, 60))
    test = write(tmp_path / "test.jsonl", lines_of(tmp_path, 9, first=100))
    for settings in ({}, {"dataset": path}, {"dataset": path, "test_dataset": test}):
        whole = load_splits(DataConfig(num_train=20, num_val=5, num_test=8, **settings))
        rest = load_splits(DataConfig(num_train=20, num_val=5, num_test=5, skip_test=3, **settings))
        ids = [example.example_id for example in rest.test]
        assert ids == [example.example_id for example in whole.test][3:]
        skipped = {example.example_id for example in whole.test[:3]}
        assert not skipped & {example.example_id for part in (rest.train, rest.val, rest.test) for example in part}
    with pytest.raises(DataError, match=r"skip_test is 9, but .* has 9 test examples"):
        load_splits(DataConfig(dataset=path, test_dataset=test, skip_test=9))


def test_no_more_pictures_are_read_than_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pacevlm.data import readers

    path = write(tmp_path / "data.jsonl", lines_of(tmp_path, 80))
    read: list[str] = []
    digest = readers._read_picture
    monkeypatch.setattr(readers, "_read_picture", lambda example: read.append(example.source.name) or digest(example))
    monkeypatch.setattr(readers, "WINDOW", 8)
    few = load_splits(DataConfig(dataset=path, num_train=4, num_val=1, num_test=1))
    assert len(set(read)) == len(read) < 80
    monkeypatch.undo()
    whole = load_splits(DataConfig(dataset=path))
    for part in PARTS:
        assert list(getattr(whole, part))[: len(getattr(few, part))] == list(getattr(few, part))


def test_too_few_pictures_are_counted_and_a_seed_that_does_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", lines_of(tmp_path, 8, num_questions=4))
    refused = []
    for seed in range(12):
        try:
            assert_apart(load_splits(DataConfig(dataset=path, seed=seed)))
        except DataError as error:
            refused.append(str(error))
    assert 0 < len(refused) < 12
    assert all("data.val_dataset and data.test_dataset, or add pictures" in message for message in refused)
    named = int(refused[0].split("data.seed (to ")[1].split(",")[0])
    assert len(load_splits(DataConfig(dataset=path, seed=named)).val) > 0
    one = write(tmp_path / "one.jsonl", lines_of(tmp_path, 1, num_questions=30))
    with pytest.raises(DataError, match=r"too few pictures .*\([01] for train, [01] for val, [01] for test"):
        load_splits(DataConfig(dataset=one))


# Official parts ------------------------------------------------------------------------------------------------------


def test_files_of_parts_are_kept_and_their_pictures_taken_out_of_the_others(tmp_path: Path) -> None:
    train = write(tmp_path / "data.jsonl", lines_of(tmp_path, 20, num_questions=2))
    val = write(tmp_path / "val.jsonl", lines_of(tmp_path, 8, first=16))
    test = write(tmp_path / "test.jsonl", lines_of(tmp_path, 6, first=22))
    splits = load_splits(DataConfig(dataset=train, val_dataset=val, test_dataset=test))
    assert_apart(splits)
    assert {e.question for e in splits.test} == {f"{i}, 0?" for i in range(22, 28)}
    assert {e.question for e in splits.val} == {f"{i}, 0?" for i in range(16, 22)}
    assert {e.question for e in splits.train} == {f"{i}, {q}?" for i in range(16) for q in range(2)}
    assert splits.notes == (
        "2 val examples left out, whose pictures are also test pictures",
        "8 train examples left out, whose pictures are also val pictures",
    )


def test_with_a_test_file_alone_only_validation_is_set_aside(tmp_path: Path) -> None:
    train = write(tmp_path / "data.jsonl", lines_of(tmp_path, 40))
    test = write(tmp_path / "test.jsonl", lines_of(tmp_path, 6, first=40))
    splits = load_splits(DataConfig(dataset=train, test_dataset=test, num_test=4))
    assert len(splits.test) == 4
    assert len(splits.train) + len(splits.val) == 40
    assert {part_of(picture, 0) for picture in pictures(splits.val)} == {"val"}
    assert_apart(splits)
    # What judges does not change what is learned from.
    assert load_splits(DataConfig(dataset=train, test_dataset=test)).identity["train"] == splits.identity["train"]


def test_ids_that_files_share_stay_apart_or_are_refused(tmp_path: Path) -> None:
    lines = [{**line, "id": i} for i, line in enumerate(lines_of(tmp_path, 30))]
    data = write(tmp_path / "data.jsonl", lines)
    test = write(tmp_path / "test.jsonl", [{**lines_of(tmp_path, 1, first=50)[0], "id": 3}])
    splits = load_splits(DataConfig(dataset=data, test_dataset=test))
    assert [e.example_id for e in splits.test] == ["3"]
    write(tmp_path / "data.jsonl", [{**line, "split": "test"} if line["id"] == 3 else line for line in lines])
    with pytest.raises(DataError, match=r"id '3' was given at .*; the ids of test examples must be unique"):
        load_splits(DataConfig(dataset=data, test_dataset=test))


def test_lines_that_name_their_part_are_kept_there(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, 30, split="train") + lines_of(tmp_path, 10, first=25, split="test")
    lines += lines_of(tmp_path, 10, first=50)  # name none
    splits = load_splits(DataConfig(dataset=write(tmp_path / "data.jsonl", lines)))
    assert_apart(splits)
    assert {e.question for e in splits.test} == {f"{i}, 0?" for i in range(25, 35)}
    assert len(splits.train) + len(splits.val) == 25 + 10
    assert splits.notes == ("5 train examples left out, whose pictures are also test pictures",)
    lines = [{**line, "split": "val"} if line["question"].startswith("5") else line for line in lines]
    splits = load_splits(DataConfig(dataset=write(tmp_path / "data.jsonl", lines)))
    assert {e.question for e in splits.val} == {f"{i}, 0?" for i in (5, *range(50, 60))}
    wrong = write(tmp_path / "wrong.jsonl", lines_of(tmp_path, 2, split="train"))
    with pytest.raises(DataError, match=r"wrong\.jsonl, line 1: .*'split' is 'train', but .* given as the test"):
        load_splits(DataConfig(dataset=str(tmp_path / "data.jsonl"), test_dataset=wrong))


# Pictures that cannot be read ----------------------------------------------------------------------------------------


def test_a_picture_that_cannot_be_read_stops_or_is_skipped_and_listed(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, 40, num_questions=2)
    (tmp_path / "3.png").write_bytes(b"no picture")
    (tmp_path / "4.png").unlink()
    path = write(tmp_path / "data.jsonl", lines)
    with pytest.raises(ImageError, match=r"data\.jsonl, line 9: there is no image .*4\.png"):
        load_splits(DataConfig(dataset=path))
    splits = load_splits(DataConfig(dataset=path, skip_unreadable=True))
    assert sum(len(getattr(splits, part)) for part in PARTS) == 76
    assert sorted(sentence.split(": ")[0] for sentence in splits.skipped) == sorted(
        f"{path}, line {number}" for number in (7, 8, 9, 10)
    )
    assert "4 lines left out, whose picture cannot be read: " in splits.remarks[-1]
    shutil.copy(tmp_path / "5.png", tmp_path / "4.png")
    with pytest.raises(ImageError, match=r"data\.jsonl, line 7: .*3\.png"):
        load_splits(DataConfig(dataset=path))


def test_a_picture_that_changes_after_it_was_read_is_refused(tmp_path: Path) -> None:
    splits = load_splits(DataConfig(dataset=write(tmp_path / "data.jsonl", lines_of(tmp_path, 30))))
    example = splits.train[0]
    assert example.image.size == (8, 8)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(example.source)
    with pytest.raises(ImageError, match=r"data\.jsonl, line \d+: picture .* has changed"):
        example.image  # noqa: B018


# Metric and identity -------------------------------------------------------------------------------------------------


def test_the_metric_is_the_settings_or_the_data_sets(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", lines_of(tmp_path, 30))
    assert load_splits(DataConfig(dataset=path)).metric.name == "exact_match"
    assert load_splits(DataConfig(dataset=path, metric="anls")).metric.name == "anls"
    assert load_splits(DataConfig(metric="vqa")).metric.name == "vqa"
    with pytest.raises(ConfigError, match=r"no metric 'bleu'; use one of exact_match, "):
        load_splits(DataConfig(metric="bleu"))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"data\.jsonl, line \d+: the metric multiple_choice needs 'choices'"):
        load_splits(DataConfig(dataset=path, metric="multiple_choice"))
    path = write(tmp_path / "data.jsonl", lines_of(tmp_path, 30, choices=["0", "1"]))
    splits = load_splits(DataConfig(dataset=path, metric="multiple_choice"))
    assert splits.metric("a", splits.test[0]) == 1.0


@pytest.mark.parametrize("changed", ["answer", "question", "picture", "choices", "fewer"])
def test_a_changed_part_has_another_identity(tmp_path: Path, changed: str) -> None:
    lines = lines_of(tmp_path, 40, num_questions=2, choices=["0", "1"])
    config = DataConfig(dataset=write(tmp_path / "data.jsonl", lines))
    before = load_splits(config)
    for part in PARTS:
        example: Example = getattr(before, part)[0]
        number = next(i for i, line in enumerate(lines) if line["question"] == example.question)
        new = list(lines)
        old_picture = Path(str(example.source)).read_bytes()
        if changed == "picture":
            new_color = next(
                color
                for color in ((c, 200, 200) for c in range(256))
                if part_of(
                    dataclasses.replace(
                        example, source=Image.new("RGB", (8, 8), color), known_picture_id=None
                    ).picture_id,
                    0,
                )
                == part
            )
            Image.new("RGB", (8, 8), new_color).save(example.source)
        elif changed == "fewer":
            del new[number]
        else:
            values: dict[str, Any] = {"answer": ["0", "1"], "question": "Else?", "choices": ["0", "2"]}
            new[number] = {**lines[number], changed: values[changed]}
        write(tmp_path / "data.jsonl", new)
        after = load_splits(config)
        assert [after.identity[p] != before.identity[p] for p in PARTS] == [p == part for p in PARTS]
        Path(str(example.source)).write_bytes(old_picture)
    write(tmp_path / "data.jsonl", lines)
    assert load_splits(config).identity == before.identity
