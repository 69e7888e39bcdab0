"""Lists of data sets: what they mean, what is refused, and how many examples each gives."""

from __future__ import annotations

import itertools
import os

import pytest

from pacevlm.config import DataConfig, ImportanceConfig
from pacevlm.dataset_list import dataset_shares, parse_datasets, parse_fields, with_paths
from pacevlm.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("digits", [("digits", None, None, None, 1.0)]),
        ("textvqa", [("textvqa", "textvqa", None, None, 1.0)]),
        ("textvqa,vqa2:0.5", [("textvqa", "textvqa", None, None, 1.0), ("vqa2", "vqa2", None, None, 0.5)]),
        ("docvqa=/data/docvqa:2", [("docvqa", "docvqa", "/data/docvqa", None, 2.0)]),
        ("docvqa=hf:me/copy", [("docvqa", "docvqa", None, "me/copy", 1.0)]),
        ("hf:a/b", [("b", None, None, "a/b", 1.0)]),
        ("hf:a/b/part:.25, q.jsonl", [("b", None, None, "a/b/part", 0.25), ("q", None, "q.jsonl", None, 1.0)]),
        ("/x/a=b.jsonl", [("a=b", None, "/x/a=b.jsonl", None, 1.0)]),
        ("C:/x.jsonl", [("x", None, "C:/x.jsonl", None, 1.0)]),
    ],
)
def test_a_list_is_read_and_written_the_same(text: str, expected: list[tuple[object, ...]]) -> None:
    entries = parse_datasets(text)
    assert [(e.name, e.benchmark, e.path, e.hub, e.weight) for e in entries] == expected
    assert parse_datasets(",".join(map(str, entries))) == entries
    assert parse_datasets(with_paths(text, lambda path: path)) == entries


def test_only_paths_change_with_the_folder() -> None:
    text = "textvqa,docvqa=d/x:2,hf:a/b,q.jsonl"
    assert with_paths(text, lambda path: os.path.join("/data", path)) == (
        "textvqa,docvqa=/data/d/x:2,hf:a/b,/data/q.jsonl"
    )
    assert with_paths("digits", str.upper) == "digits"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("textvqa,,vqa2", "dataset is empty"),
        ("textvqa,textvqa=/data", "names 'textvqa' twice"),
        ("digits,textvqa", "digits is made and not read"),
        ("textvqa:0", "weight 0 is no number from 1e-06 to 1e\\+06"),
        ("textvqa:-1", "weight -1 is no number"),
        ("q.jsonl:nan", "weight nan is no number"),
        ("textvqa:1e9", "weight 1e9 is no number"),
        ("textvqa:1.2.3", "weight 1.2.3 is no number"),
        ("texvqa=/data", "'texvqa' is no benchmark; use one of vqa2, textvqa"),
        ("hf:alone", "hf:owner/name or hf:owner/name/configuration"),
        ("docvqa=~/x", "only a shell knows what ~ stands for"),
    ],
)
def test_a_list_that_means_nothing_is_refused_early(text: str, message: str) -> None:
    for kind in (DataConfig, ImportanceConfig):
        with pytest.raises(ConfigError, match=message):
            kind(dataset=text)


def test_shares_follow_the_weights_and_add_up() -> None:
    entries = parse_datasets("textvqa,vqa2:0.5,pope:3")
    for number in (3, 10, 900, 1001):
        shares = dataset_shares(entries, number)
        assert sum(shares) == number
        assert all(abs(share - number * e.weight / 4.5) <= 1 for share, e in zip(shares, entries, strict=True))
    assert dataset_shares(entries, 900) == [200, 100, 600]
    for few, more in itertools.pairwise(range(1, 60)):
        assert all(a <= b for a, b in zip(dataset_shares(entries, few), dataset_shares(entries, more), strict=True))


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_val is 3, of which vqa2 with its weight 0\.01 gets none"):
        DataConfig("textvqa,vqa2:0.01", num_val=3)
    with pytest.raises(ConfigError, match=r"only a single JSON-lines file has such files beside it"):
        DataConfig("textvqa", test_dataset="q.jsonl")


@pytest.mark.parametrize("fields", [("image",), ("=a",), ("image=",), ("image=a", "image=b")])
def test_fields_are_pairs(fields: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="each must be name=column"):
        DataConfig("q.jsonl", fields=fields)


def test_fields_are_read_and_refused_where_columns_are_known() -> None:
    assert parse_fields(["image=img", "answer = a=b"]) == {"image": "img", "answer": "a=b"}
    assert DataConfig("textvqa,q.jsonl", fields=("image=img",)).fields == ("image=img",)
    for dataset in ("digits", "textvqa,docvqa=/data"):
        with pytest.raises(ConfigError, match=r"the columns of .* are known; leave fields out"):
            DataConfig(dataset, fields=("image=img",))
