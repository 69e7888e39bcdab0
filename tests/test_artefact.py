"""What is accepted makes sense: every file of a finished run, damaged in any way, is refused by an error of ours."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import pytest

from pacevlm.artefact import Ms, Range, Text, content_sha256, load_artefact, save_artefact, typed
from pacevlm.errors import CheckpointError, DataError, PacevlmError, ProfileError
from pacevlm.files import read_json
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.pipeline.lock import LOCK_NAME
from pacevlm.pipeline.step_log import StepLog

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def fuzzing() -> Iterator[Any]:
    """The benchmark that damages artefacts; it and what it imports lie in a folder of their own."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("fuzz_artefacts")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def doors(fuzzing: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run and the functions that load its files."""
    return fuzzing.Doors(fuzzing.make_run(tmp_path_factory.mktemp("fuzzed")))


# Runs ----------------------------------------------------------------------------------------------------------------


def test_every_file_of_a_run_is_damaged_here(doors: Any) -> None:
    files = {str(path.relative_to(doors.run_dir)) for path in doors.run_dir.rglob("*") if path.is_file()}
    pictures = {name for name in files if name.endswith((".png", ".svg", ".html"))}
    assert files - pictures - {LOCK_NAME} == set(doors.doors)


def test_damage_is_refused_by_an_error_of_ours(fuzzing: Any, doors: Any) -> None:
    names = tuple(name for name in (*doors.doors, "questions") if name != "data.jsonl")
    tallies, faults = fuzzing.fuzz(doors, 800, 7, names)
    assert [fault for fault in faults if fault[0].startswith("FAULT")] == []
    assert all(counts["refused"] for counts in tallies.values())


def test_a_flipped_bit_of_any_artefact_is_refused(fuzzing: Any, doors: Any) -> None:
    rng = np.random.default_rng(1)
    for name in sorted(set(doors.doors) - set(fuzzing.OPEN)):
        path = doors.run_dir / name
        content = path.read_bytes()
        for place in rng.integers(len(content), size=25).tolist():
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            with pytest.raises(PacevlmError):
                doors.doors[name](path)
        path.write_bytes(content)


def test_facts_that_are_read_again_are_checked(doors: Any, tmp_path: Path, reseal: Callable[[Path, Any], None]) -> None:
    shutil.copy(doors.run_dir / "steps.json", tmp_path)
    values = json.loads((tmp_path / "steps.json").read_text())
    for wrong in (None, -1.0, 0, 1e300, "fast", True, {}):
        values["profile"]["facts"]["full_p50_ms"]["e2e"] = wrong
        reseal(tmp_path / "steps.json", values)
        with pytest.raises(CheckpointError, match="full_p50_ms"):
            StepLog(tmp_path)


# The form ------------------------------------------------------------------------------------------------------------


def test_an_artefact_reads_back_to_the_bit_and_says_what_it_is(tmp_path: Path) -> None:
    path, content = tmp_path / "x.json", {"numbers": [0.1, 1e-300, 2**53 + 1], "nested": {"ü": None}}
    save_artefact(path, "thing", 3, content, DataError)
    assert load_artefact(path, "thing", 3, DataError) == content
    for kind, version, message in (("other", 3, "holds 'thing', not a other"), ("thing", 4, "schema version 3")):
        with pytest.raises(DataError, match=message):
            load_artefact(path, kind, version, DataError)
    with pytest.raises(DataError, match="cannot be written"):
        save_artefact(tmp_path / "y.json", "thing", 3, {"x": float("nan")}, DataError)
    assert not (tmp_path / "y.json").exists()


@pytest.mark.parametrize(("written", "read"), [("1e-05", "1E-05"), ("0.1", "0.10"), ("7", "7.0"), ("true", "false")])
def test_a_number_that_is_written_otherwise_is_another(tmp_path: Path, written: str, read: str) -> None:
    path = tmp_path / "x.json"
    save_artefact(path, "thing", 1, {"x": json.loads(written)})
    text = path.read_text()
    assert f'"x": {written}' in text
    path.write_text(text.replace(f'"x": {written}', f'"x": {read}'))
    with pytest.raises(ProfileError, match="digest"):
        load_artefact(path, "thing", 1)
    path.write_text(json.dumps(dict(reversed(json.loads(text).items()))))  # order and spaces mean nothing
    assert load_artefact(path, "thing", 1) == {"x": json.loads(written)}


def test_the_digest_of_a_value_is_that_of_its_file(tmp_path: Path) -> None:
    save_artefact(tmp_path / "x.json", "thing", 1, {"x": (1, 2.5), "y": {"z": "ü"}})
    stored = read_json(tmp_path / "x.json", "thing", DataError)
    assert (
        stored["sha256"] == content_sha256(stored) == content_sha256({k: v for k, v in stored.items() if k != "sha256"})
    )


# Types ---------------------------------------------------------------------------------------------------------------


class Entry(TypedDict):
    name: Text
    ms: Ms | None
    kind: Literal["e2e", "ttft"]
    sizes: tuple[Annotated[int, Range(1, 9)], ...]
    place: tuple[float, float]
    groups: dict[Text, float]
    knobs: Knobs
    space: KnobSpace


ENTRY: dict[str, Any] = {
    "name": "a",
    "ms": 2,
    "kind": "e2e",
    "sizes": [1, 9],
    "place": [0.5, 1],
    "groups": {"low": -1.5},
    "knobs": "low/4/12",
    "space": {"tiers": ["low"], "top_ks": [4], "num_blocks": [12]},
}


def test_values_are_read_as_the_types_that_are_declared() -> None:
    entry = typed(Entry, ENTRY, "entry")
    assert entry == {
        **ENTRY,
        "sizes": (1, 9),
        "place": (0.5, 1.0),
        "knobs": Knobs("low", 4, 12),
        "space": KnobSpace(("low",), (4,), (12,)),
    }
    assert isinstance(entry["ms"], float)
    assert typed(Entry, {**ENTRY, "ms": None}, "entry")["ms"] is None


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *[("name", value) for value in ("", "a\nb", "x" * 5000, 1, None, ["a"])],
        *[("ms", value) for value in (0, -1.0, 1e300, True, "2", float("nan"), float("inf"), [2])],
        *[("kind", value) for value in ("E2E", None, 0, ["e2e"], {})],
        *[("sizes", value) for value in ([0], [10], [1.0], [True], "12", {"0": 1}, 3, None)],
        *[("place", value) for value in ([1], [1, 2, 3], [1, None], {})],
        *[("groups", value) for value in ({"": 1}, {"a": "1"}, [], None)],
        *[
            ("knobs", value)
            for value in ("low/4", "low/4/12/1", "low/4.0/12", "low/٤/12", " low/4/12 ", 3, ["low/4/12"])
        ],
        *[("space", value) for value in ({}, [], {"tiers": ["a/b"], "top_ks": [1], "num_blocks": [1]})],
        *[
            ("space", {"tiers": ["a"], "top_ks": value, "num_blocks": [1]})
            for value in ([1.0], [True], [2, 1], [10**9])
        ],
    ],
)
def test_values_of_other_types_and_ranges_are_refused_by_name(name: str, wrong: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"entry.*{name}|{name}.*entry"):
        typed(Entry, {**ENTRY, name: wrong}, "entry", CheckpointError)
    rest = {key: value for key, value in ENTRY.items() if key != name}
    for other in (rest, {**ENTRY, "more": 1}, [], None, "text"):
        with pytest.raises(CheckpointError, match="entry must have the keys"):
            typed(Entry, other, "entry", CheckpointError)
