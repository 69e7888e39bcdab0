"""Published benchmarks and other data sets in their format: true columns in, examples of the right part out."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stand_ins import BENCHMARKS as STAND_INS
from stand_ins import write_stand_in

from pacevlm import dataset_list
from pacevlm.config import DataConfig
from pacevlm.data import published
from pacevlm.data.benchmarks import BENCHMARKS, max_new_tokens
from pacevlm.data.division import part_of
from pacevlm.data.splits import Splits, load_splits
from pacevlm.dataset_list import parse_datasets
from pacevlm.errors import ConfigError, DataError, ImageError
from pacevlm.types import Example

PARTS = ("train", "val", "test")
NUMBER = 48
SIZES: dict[str, Any] = {"num_train": 24, "num_val": 3, "num_test": 6}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stand-in of every benchmark."""
    folder = tmp_path_factory.mktemp("published")
    for name in STAND_INS:
        write_stand_in(folder, name, NUMBER)
    return folder


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where rows are kept."""
    monkeypatch.setattr(published, "keeping_folder", lambda: tmp_path / "kept")
    return tmp_path / "kept"


def load(home: Path, *names: str, **settings: Any) -> Splits:
    """The parts of one stand-in, or of several with their weights."""
    pairs = [name.partition(":") for name in names]
    text = ",".join(f"{name}={home / name}{colon}{weight}" for name, colon, weight in pairs)
    return load_splits(DataConfig(text, **(SIZES | settings)))


def everything(splits: Splits) -> list[Example]:
    return [example for part in PARTS for example in getattr(splits, part)]


def pictures(examples: Any) -> set[str]:
    # Of the pixels as they are now, not as they were noted.
    return {dataclasses.replace(example, known_picture_id=None).picture_id for example in examples}


# Each benchmark ------------------------------------------------------------------------------------------------------


def test_every_benchmark_has_its_name_in_the_settings() -> None:
    assert tuple(BENCHMARKS) == dataset_list.BENCHMARKS
    assert set(BENCHMARKS) == set(STAND_INS)
    assert max_new_tokens(parse_datasets("digits")) is None
    assert max_new_tokens(parse_datasets("q.jsonl,docvqa=/data")) == BENCHMARKS["docvqa"].max_new_tokens


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_comes_in_parts_that_share_no_picture(home: Path, name: str) -> None:
    splits = load(home, name)
    assert (splits.name, splits.metric.name) == (name, BENCHMARKS[name].metric)
    assert [len(getattr(splits, part)) for part in PARTS] == [24, 3, 6]
    found = [pictures(getattr(splits, part)) for part in PARTS]
    assert not found[0] & found[1] | found[0] & found[2] | found[1] & found[2]
    for example in everything(splits):
        assert example.question.startswith(f"{BENCHMARKS[name].style}: ")
        assert example.metadata["benchmark"] == name
        assert splits.metric(example.references[0], example) == 1.0
        assert isinstance(example.source, Path)  # pixels are read when they are wanted
    assert len({example.example_id for example in everything(splits)}) == 33


def test_questions_answers_and_options_are_those_of_the_rows(home: Path) -> None:
    vqa2 = load(home, "vqa2")
    for example in everything(vqa2):  # whose training split has texts, and whose test split records
        assert len(example.references) == 10
        assert example.metadata["answer_type"] in ("number", "other")
        assert example.example_id.startswith("vqa2-2621")
    science = load(home, "scienceqa")
    hinted = [example for example in everything(science) if "The picture shows digits." in example.question]
    assert 0 < len(hinted) < 33
    example = hinted[0]
    letters = "".join(f"{letter}: {text}\n" for letter, text in zip("ABC", example.choices, strict=True))
    context, question, rest = example.question.split("\n", 2)
    assert (context, rest) == ("science_qa: The picture shows digits.", letters)
    assert question.startswith("What colour is")
    place = example.choices.index(example.references[0])
    assert [science.metric(letter, example) for letter in "ABC"] == [float(i == place) for i in range(3)]
    assert {example.metadata["author"] for example in everything(load(home, "chartqa"))} == {"human", "machine"}
    assert {example.metadata["category"] for example in everything(load(home, "pope"))} == {
        *("adversarial", "popular", "random")
    }
    assert {example.references for example in everything(load(home, "pope"))} == {("yes",), ("no",)}


def test_official_splits_are_kept_and_the_rest_goes_by_the_pixels(home: Path) -> None:
    def rows(name: str, split: str, inside: str = "") -> set[str]:
        import pyarrow.parquet as parquet

        (path,) = (home / name / inside / "data").glob(f"{split}-*.parquet")
        column = BENCHMARKS[name].fields["id"]
        return {f"{name}-{value}" for value in parquet.read_table(path, columns=[column]).to_pydict()[column]}

    for name, train, test in (
        ("textvqa", rows("textvqa", "train"), rows("textvqa", "validation")),
        ("vqa2", rows("vqa2", "train", "VQAv2_train"), rows("vqa2", "validation", "VQAv2")),
    ):
        splits = load(home, name, num_test=NUMBER)
        assert {example.example_id for example in splits.test} == test
        assert {example.example_id for example in (*splits.train, *splits.val)} <= train
        assert {part_of(picture, 0) for picture in pictures(splits.val)} == {"val"}
        assert "val" not in {part_of(picture, 0) for picture in pictures(splits.train)}
    pope = load(home, "pope")  # has a test split alone
    for part in PARTS:
        assert {part_of(picture, 0) for picture in pictures(getattr(pope, part))} == {part}


# Order and keeping ---------------------------------------------------------------------------------------------------


def test_the_seed_decides_the_order_and_a_longer_part_begins_the_same(
    home: Path, monkeypatch: pytest.MonkeyPatch, kept: Path
) -> None:
    monkeypatch.setattr(published, "WINDOW", 8)
    first = load(home, "textvqa")
    shutil.rmtree(kept)
    again = load(home, "textvqa")
    assert everything(again) == everything(first)
    assert again.identity == first.identity
    other = load(home, "textvqa", seed=1)
    assert {e.example_id for e in other.test} != {e.example_id for e in first.test}
    # Goes on behind the windows that are kept, as one that was stopped does.
    for lost in kept.glob("textvqa-train-*/1.json"):
        lost.unlink()
    longer = load(home, "textvqa", num_train=40, num_test=12)
    shutil.rmtree(kept)
    anew = load(home, "textvqa", num_train=40, num_test=12)
    assert everything(longer) == everything(anew)
    assert [e.example_id for e in longer.train[:24]] == [e.example_id for e in first.train]


def test_what_was_read_is_not_read_again(home: Path, monkeypatch: pytest.MonkeyPatch, kept: Path) -> None:
    first = load(home, "docvqa")
    windows = {path: path.read_bytes() for path in kept.rglob("*.json")}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(published.PublishedRows, "_open", refuse)
    monkeypatch.setattr(published, "load_image", refuse)
    assert everything(load(home, "docvqa")) == everything(first)
    monkeypatch.undo()
    monkeypatch.setattr(published, "keeping_folder", lambda: kept)
    # A picture that is gone is kept again.
    Path(str(first.test[0].source)).resolve().unlink()
    assert everything(load(home, "docvqa")) == everything(first)
    assert {path: path.read_bytes() for path in kept.rglob("*.json")} == windows
    assert all(example.image for example in first.test)


def test_no_more_is_read_than_the_parts_take(home: Path, monkeypatch: pytest.MonkeyPatch, kept: Path) -> None:
    monkeypatch.setattr(published, "WINDOW", 4)
    load(home, "chartqa", num_train=5, num_val=2, num_test=2)
    rows = [len(json.loads(path.read_text())["rows"]) for path in kept.rglob("*.json")]
    assert sum(rows) <= 9 + 3 * 4


def test_a_changed_copy_is_read_anew(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "chartqa", tmp_path / "chartqa")
    first = load(tmp_path, "chartqa")
    write_stand_in(tmp_path, "chartqa", NUMBER, seed=5)
    changed = load(tmp_path, "chartqa")
    assert all(changed.identity[part] != first.identity[part] for part in PARTS)


# Mixtures ------------------------------------------------------------------------------------------------------------


def test_a_mixture_keeps_shares_turns_and_metrics(home: Path) -> None:
    splits = load(home, "textvqa", "docvqa:0.5", "pope:0.5", num_val=4, num_test=8)
    assert (splits.name, splits.metric.name) == ("textvqa,docvqa:0.5,pope:0.5", "anls+vqa+yes_no")
    for part, number in (("train", 24), ("val", 4), ("test", 8)):
        names = [example.metadata["benchmark"] for example in getattr(splits, part)]
        assert [names.count(name) for name in ("textvqa", "docvqa", "pope")] == [number // 2, number // 4, number // 4]
        assert [names[:4].count(name) for name in ("textvqa", "docvqa", "pope")] == [2, 1, 1]
    for example in everything(splits):
        wanted = BENCHMARKS[example.metadata["benchmark"]].metric
        assert splits.metric.of(example).name == wanted
        if wanted == "anls":
            nearly = example.references[-1] + "x"
            assert splits.metric(nearly, example) == (1 - 1 / len(nearly) if len(nearly) > 2 else 0.0)
    alone = load(home, "textvqa", num_train=12, num_val=2, num_test=4)
    mixed = [example for example in splits.train if example.metadata["benchmark"] == "textvqa"]
    assert mixed == list(alone.train)
    given = load(home, "textvqa", "docvqa", metric="exact_match")
    assert given.metric.name == "exact_match"
    assert {example.metric for example in everything(given)} == {None}


def test_a_picture_is_in_one_part_of_a_whole_mixture(home: Path, tmp_path: Path) -> None:
    """A test picture of one data set is in no other part of another, though that one's splits say so."""
    lines = []
    for example in load(home, "textvqa", num_test=30).test:
        shutil.copy(Path(str(example.source)).resolve(), tmp_path / f"{example.picture_id}.png")
        lines += [{"image": f"{example.picture_id}.png", "question": f"{q}?", "answer": "x"} for q in range(3)]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    numbers = {"num_train": 60, "num_val": 8, "num_test": 60}
    for text in (f"{path},textvqa={home / 'textvqa'}", f"textvqa={home / 'textvqa'},{path}"):
        with pytest.raises(DataError, match=r"mine\.jsonl has too few pictures"):
            load_splits(DataConfig(text, **numbers))  # all its pictures test
    more = [json.dumps(line | {"split": "val"}) for line in lines[-3:]]
    # Of its own validation pictures the other's test is told before.
    path.write_text("\n".join([*map(json.dumps, lines[:-3]), *more]))
    with pytest.raises(DataError, match=r"mine\.jsonl has too few pictures .*\(0 for train, 0 for val, \d for test"):
        load_splits(DataConfig(f"{path},textvqa={home / 'textvqa'}", **numbers))


def test_undivided_pictures_train_nowhere(home: Path, tmp_path: Path) -> None:
    """The same pictures with splits of their own and without: what is set aside of the second is not trained on."""
    lines = []
    for example in load(home, "pope", num_train=60, num_val=20, num_test=20).train[:20]:
        shutil.copy(Path(str(example.source)).resolve(), tmp_path / f"{example.picture_id}.png")
    for number, picture in enumerate(sorted(tmp_path.glob("*.png"))):
        lines.append(
            {
                "image": picture.name,
                "question": "A?",
                "answer": "x",
                "split": "test" if number < 3 else "val" if number < 5 else "train",
            }
        )
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    splits = load_splits(DataConfig(f"{path},pope={home / 'pope'}", num_train=40, num_val=4, num_test=6, seed=3))
    found = [pictures(getattr(splits, part)) for part in PARTS]
    assert not found[0] & found[1] | found[0] & found[2] | found[1] & found[2]
    assert {"mine", "pope"} == {example.metadata["benchmark"] for example in splits.train}


# Any other data set --------------------------------------------------------------------------------------------------


FIELDS = ("question=query", "answer=label", "by=human_or_machine")


def test_any_other_data_set_is_read_with_its_fields(home: Path) -> None:
    splits = load_splits(DataConfig(str(home / "chartqa"), fields=FIELDS, **SIZES))
    benchmark = load(home, "chartqa")
    assert (splits.name, splits.metric.name) == ("chartqa", "exact_match")
    assert {example.metadata["by"] for example in everything(splits)} == {"human", "machine"}
    assert [f"chart_qa: {example.question}" for example in splits.test] == [e.question for e in benchmark.test]
    assert [example.references for example in splits.test] == [e.references for e in benchmark.test]


def test_withheld_answers_are_passed_over(home: Path) -> None:
    """The test split of `textvqa` has none, so its validation split is the test part, and val is set aside."""
    fields = ("answer=answers", "id=question_id")
    splits = load_splits(DataConfig(str(home / "textvqa"), fields=fields, **SIZES))
    assert [e.references for e in splits.test] == [e.references for e in load(home, "textvqa").test]
    assert {part_of(picture, 0) for picture in pictures(splits.val)} == {"val"}
    (single := home / "single" / "data").mkdir(parents=True, exist_ok=True)
    shutil.copy(next((home / "textvqa" / "data").glob("test-*")), single / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"row 1 as read has no answer: those of the split test .* are withheld"):
        load_splits(DataConfig(str(home / "single"), fields=fields))


def test_fields_of_a_json_lines_file(home: Path, tmp_path: Path) -> None:
    example = load(home, "pope").train[0]
    shutil.copy(Path(str(example.source)).resolve(), tmp_path / "a.png")
    line = {"img": "a.png", "q": "What?", "a": [7], "image": "a sunny day", "opts": ["7", "8"]}
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(line))
    from pacevlm.data.jsonl import JsonlDataset

    names = {"image": "img", "question": "q", "answer": "a", "choices": "opts"}
    (found,) = JsonlDataset(path, names=names)
    assert (found.question, found.references, found.choices) == ("What?", ("7",), ("7", "8"))
    assert set(found.metadata) == {"choices"}
    with pytest.raises(DataError, match=r"line 1: there is no field 'picture', which was given as the image"):
        JsonlDataset(path, names=names | {"image": "picture"})


# What is refused -----------------------------------------------------------------------------------------------------


def write_rows(folder: Path, rows: list[dict[str, Any]], split: str = "train") -> str:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    (folder / "data").mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def rows_like(home: Path, number: int = 40) -> list[dict[str, Any]]:
    from stand_ins import rows_of

    return list(rows_of("docvqa", "train", number, 0))


def test_a_missing_column_is_named_with_those_there_are(home: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="chartqa has no column 'question', which holds the question; it has image, query"
    ):
        load_splits(DataConfig(str(home / "chartqa")))
    path = write_rows(tmp_path / "x", [{"image": None, "question": "a"}], "test")
    with pytest.raises(DataError, match=r"pope has no column 'answer'.*check whether it is the right data set"):
        load_splits(DataConfig(f"pope={path}"))


def test_names_that_stand_for_nothing_are_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data set 'texvqa': it is no file, no folder and none of vqa2"):
        load_splits(DataConfig("texvqa"))
    with pytest.raises(DataError, match="there is no folder '/nowhere' with a copy of textvqa"):
        load_splits(DataConfig("textvqa=/nowhere"))
    with pytest.raises(DataError, match="has no split 'validation'; it has train"):
        load_splits(DataConfig(f"textvqa={write_rows(tmp_path / 'x', rows_like(home))}"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty cannot be read as a data set"):
        load_splits(DataConfig(str(tmp_path / "empty")))


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("docvqa", "hf:owner/name", "textvqa=hf:owner/copy"):
        with pytest.raises(DataError, match=r"cannot be read from the Hugging Face hub .*local copy, NAME=FOLDER"):
            load_splits(DataConfig(name))


def test_a_missing_library_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"datasets is not installed.*pip install 'pacevlm\[benchmarks\]'"):
        load(home, "textvqa")


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ({"bytes": b"\x89PNG\r\n\x1a\n but no more", "path": None}, "cannot be read"),
        (None, "it has no picture"),
        ({"bytes": None, "path": "/nowhere.png"}, "its picture /nowhere.png cannot be read"),
    ],
)
def test_a_picture_that_cannot_be_decoded_is_named_or_skipped(
    home: Path, tmp_path: Path, picture: Any, message: str
) -> None:
    rows = rows_like(home)
    rows[7]["image"] = picture
    path = write_rows(tmp_path / "mine", rows)
    numbers: dict[str, Any] = {"num_train": 20, "num_val": 2, "num_test": 4}
    config = DataConfig(path, fields=("answer=answers",), **numbers)
    whole = dataclasses.replace(config, num_train=40)
    with pytest.raises(ImageError, match=rf"mine \(train\), row \d+ as read: .*{message}"):
        load_splits(whole)
    skipped = load_splits(dataclasses.replace(whole, skip_unreadable=True))
    assert len(skipped.skipped) == 1
    assert message in skipped.skipped[0]
    assert len(everything(skipped)) > 30


def test_an_empty_split_and_too_few_pictures_are_said(home: Path, tmp_path: Path) -> None:
    rows = rows_like(home)
    mine = write_rows(tmp_path / "mine", rows)
    write_rows(tmp_path / "mine", [row | {"image": None} for row in rows], "test")
    with pytest.raises(
        DataError, match=r"has no test examples: the split is empty, or none of its pictures can be read"
    ):
        load_splits(DataConfig(mine, fields=("answer=answers",), skip_unreadable=True))
    few = write_rows(tmp_path / "few", rows_like(home, 2))
    with pytest.raises(DataError, match="few has too few pictures to be divided by their content"):
        load_splits(DataConfig(few, fields=("answer=answers",)))
