"""Which data sets a run asks, as people write them: `textvqa,vqa2:0.5`, `docvqa=/data/docvqa,questions.jsonl`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from pacevlm.checks import check_path, shown
from pacevlm.errors import ConfigError
from pacevlm.mixture import MAX_WEIGHT

MADE_DATASETS = ("digits",)
"""The data sets inside the package, which are made and not read; those of `data.splits.MADE`, which a test compares."""
BENCHMARKS = ("vqa2", "textvqa", "docvqa", "chartqa", "scienceqa", "pope")
"""Short names of published benchmarks; those of `data.benchmarks.BENCHMARKS`, which a test compares."""
FIELDS = ("image", "question", "answer", "choices", "id", "split", "context")
"""What a column may stand for; any other name is metadata."""
HUB = "hf:"
"""What the name of a data set on the Hugging Face hub begins with."""

_NUMBER = r"[-+]?(\d[\d.e+-]*|\.\d+|nan|inf)"


@dataclass(frozen=True)
class DatasetEntry:
    """One of the data sets that are asked together.

    Attributes:
        name: what reports call it: the short name, or the last part of the path or hub name.
        benchmark: short name of a published benchmark, or None.
        path: a JSON-lines file or a folder; None for what is read from the hub or inside the package.
        hub: `owner/name` on the Hugging Face hub, or `owner/name/configuration`; None for what is not there.
        weight: how often it is asked, next to the others' weights.
    """

    name: str
    benchmark: str | None = None
    path: str | None = None
    hub: str | None = None
    weight: float = 1.0

    def __str__(self) -> str:
        """As `parse_datasets` reads it."""
        where = f"{HUB}{self.hub}" if self.hub else self.path
        text = self.name if where is None else f"{self.benchmark}={where}" if self.benchmark else where
        return text if self.weight == 1 else f"{text}:{repr(self.weight).removesuffix('.0')}"


def parse_datasets(text: str) -> tuple[DatasetEntry, ...]:
    """Read a list of data sets, in the order given.

    Between commas stands a short name, a path, `hf:owner/name` or `name=path`, each with `:weight` behind it or not.

    Raises:
        ConfigError: a path cannot be one, a name before `=` is no benchmark's, a weight is no number from 1e-06 to
            1e+06, a data set is named twice, or one of those inside the package stands beside others.
    """
    check_path("dataset", text)
    entries = tuple(_parse_entry(part.strip()) for part in text.split(","))
    names = [entry.name for entry in entries]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"dataset is {shown(text)}, which names {twice!r} twice; name each data set once")
    if len(entries) > 1 and (made := set(names) & set(MADE_DATASETS)):
        raise ConfigError(
            f"dataset is {shown(text)}, but {', '.join(made)} is made and not read, and has a mixture of its own; name "
            "it alone"
        )
    return entries


def _parse_entry(text: str) -> DatasetEntry:
    found = re.fullmatch(rf"(?P<where>.*?)(:(?P<weight>{_NUMBER}))?", text, re.ASCII | re.IGNORECASE | re.DOTALL)
    assert found is not None
    where, weight = found["where"], 1.0 if found["weight"] is None else _weight(text, found["weight"])
    if where in (*BENCHMARKS, *MADE_DATASETS):
        return DatasetEntry(where, where if where in BENCHMARKS else None, weight=weight)
    name, equals, path = where.partition("=")
    if not equals or "/" in name:
        name, path = "", where
    elif name not in BENCHMARKS:
        raise ConfigError(f"dataset is {shown(text)}, but {name!r} is no benchmark; use one of {', '.join(BENCHMARKS)}")
    if path.startswith(HUB):
        hub = path.removeprefix(HUB)
        if not re.fullmatch(r"[\w.-]+/[\w.-]+(/[^/\s]+)?", hub):
            raise ConfigError(
                f"dataset is {shown(text)}; a data set on the hub is {HUB}owner/name or {HUB}owner/name/configuration"
            )
        return DatasetEntry(name or hub.split("/")[1], name or None, hub=hub, weight=weight)
    check_path("dataset", path)
    return DatasetEntry(name or PurePath(path).stem or path, name or None, path, weight=weight)


def _weight(text: str, number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 1 / MAX_WEIGHT <= weight <= MAX_WEIGHT:
        raise ConfigError(
            f"dataset is {shown(text)}, but the weight {number} is no number from {1 / MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
        )
    return weight


def with_paths(text: str, change: Callable[[str], str]) -> str:
    """The same list with every path changed; what is read from the hub or inside the package stays."""
    entries = parse_datasets(text)
    paths = [None if entry.path is None else change(entry.path) for entry in entries]
    return ",".join(
        str(DatasetEntry(entry.name, entry.benchmark, path, entry.hub, entry.weight))
        for entry, path in zip(entries, paths, strict=True)
    )


def dataset_shares(entries: Sequence[DatasetEntry], number: int) -> list[int]:
    """How many of a number of examples each data set gives, by its weight; they add up to the number."""
    total = sum(entry.weight for entry in entries)
    shares = [math.floor(number * entry.weight / total) for entry in entries]
    while sum(shares) < number:
        # Webster's method, which `interleaved` orders examples by.
        next_one = min(range(len(entries)), key=lambda i: (shares[i] + 0.5) / entries[i].weight)
        shares[next_one] += 1
    return shares


def check_shares(text: str, **numbers: int) -> None:
    """Raise ConfigError unless every data set has a share of each number of examples."""
    entries = parse_datasets(text)
    for name, number in numbers.items():
        for entry, share in zip(entries, dataset_shares(entries, number), strict=True):
            if not share:
                raise ConfigError(
                    f"{name} is {number}, of which {entry.name} with its weight {entry.weight:g} gets none; give a "
                    f"larger {name} or weight"
                )


def parse_fields(fields: Sequence[str]) -> Mapping[str, str]:
    """Columns by what they stand for, from texts such as `image=img`.

    Raises:
        ConfigError: a text is no pair, or a name is given twice.
    """
    pairs = [field.partition("=") if isinstance(field, str) else ("", "", "") for field in fields]
    found = {name.strip(): column.strip() for name, _, column in pairs}
    if len(found) < len(pairs) or not all(name and column for name, column in found.items()):
        raise ConfigError(
            f"fields are {shown(list(fields))}; each must be name=column, once for each of {', '.join(FIELDS)} that "
            "there is, or for metadata, for example image=img question=q answer=a"
        )
    return found
