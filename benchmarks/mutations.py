"""Damage done to files, seeded: of bytes as they come, JSON values, safetensors headers and numbers, and databases."""

from __future__ import annotations

import json
import sqlite3
import struct
from contextlib import closing, suppress
from typing import Any

import numpy as np

from pacevlm.artefact import content_sha256

# What Python's JSON writes no form for, put into the text behind it.
_RAW = {
    "@huge": "1" + "0" * 400,
    "@float": "1e999",
    "@nan": "NaN",
    "@inf": "-Infinity",
    "@deep": "[" * 100_000 + "]" * 100_000,
    "@surrogate": '"\\ud800"',
    "@twice": '{"a": 1, "a": 2}',
}
EXTREMES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3.0, 0.5, 2**31, 2**53 + 1, 2**63, 1e-320, 1e-9, 1e16, 1e308, -1e308, -0.0),
    *("", " ", "x", "true", "1", "NaN", "e2e", "low/4/12", "/etc/passwd", "../..", "\x00", "\u202e", "é" * 5000),
    *([], {}, [[]], [None], [1, 2, 3], {"": 0}, {"mean": 1}, [[[[[[0]]]]]]),
    *_RAW,
)


def mutate_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip, cut, move or add some bytes."""
    place = int(rng.integers(len(data) + 1))
    other = int(rng.integers(len(data) + 1))
    length = int(rng.integers(1, 40))
    damaged = bytearray(data)
    kind = rng.integers(8)
    if kind <= 2 and data:
        damaged[place % len(data)] ^= 1 << int(rng.integers(8))
    elif kind == 3:
        del damaged[place:]
    elif kind == 4:
        del damaged[place : place + length]
    elif kind == 5:
        damaged[place:place] = data[other : other + length]
    elif kind == 6:
        damaged[place : place + length] = rng.bytes(length)
    else:
        damaged = bytearray([b"\xef\xbb\xbf" + data, data * 2, data[::-1], b"\x00" * len(data), b""][rng.integers(5)])
    return bytes(damaged)


def mutate_json(values: Any, rng: np.random.Generator) -> str:
    """JSON text in which one value, at any depth, is another, is gone, or changed places with a neighbour."""
    values = json.loads(json.dumps(values))
    holders = _holders(values)
    if not holders:
        return _text(EXTREMES[rng.integers(len(EXTREMES))])
    holder, key = holders[rng.integers(len(holders))]
    kind = rng.integers(10)
    if kind <= 3:
        holder[key] = EXTREMES[rng.integers(len(EXTREMES))]
    elif kind <= 5:
        holder[key] = _other(holder[key], rng)
    elif kind == 6:
        del holder[key]
    elif kind == 7:
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        second = list(keys)[rng.integers(len(keys))]
        holder[key], holder[second] = holder[second], holder[key]
    elif kind == 8:
        there, place = holders[rng.integers(len(holders))]
        holder[key] = json.loads(json.dumps(there[place]))
    elif isinstance(holder, dict):
        holder[["", "extra", str(key) + " "][rng.integers(3)]] = holder[key]
    else:
        holder.insert(key, holder[key])
    return _text(values)


def with_fresh_digest(text: str) -> str:
    """JSON text of an artefact with the digest that belongs to it, as somebody would write who knows how."""
    try:
        values = json.loads(text)
        return json.dumps({**values, "sha256": content_sha256(values)})
    except (ValueError, TypeError, RecursionError):
        return text


def mutate_safetensors(data: bytes, rng: np.random.Generator) -> bytes:
    """Another header length, another entry of the header, or numbers that no weight has."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    kind = rng.integers(4)
    if kind == 0:
        lengths = (0, 1, length - 1, length + 1, len(data), 2**31, 2**62, 2**64 - 1)
        return struct.pack("<Q", lengths[rng.integers(len(lengths))]) + data[8:]
    if kind == 1:
        text = mutate_json(header, rng).encode()
        return struct.pack("<Q", len(text)) + text + body
    names = [name for name in header if name != "__metadata__"]
    entry = header[names[rng.integers(len(names))]]
    if kind == 2:
        entry["dtype"] = ("F16", "BF16", "I32", "F64", "BOOL", "F8_E4M3", "X9")[rng.integers(7)]
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + body
    start, end = entry["data_offsets"]
    if end - start >= 4:
        place = start + 4 * int(rng.integers((end - start) // 4))
        numbers = (np.nan, np.inf, -np.inf, 3e38, -3e38)
        body[place : place + 4] = struct.pack("<f", numbers[rng.integers(len(numbers))])
    return data[: 8 + length] + body


def mutate_sqlite(data: bytes, rng: np.random.Generator) -> bytes:
    """A database in which one value is another, or which holds more or less than it should."""
    value = ("NULL", "''", "x'ff'", "CAST(x'ff' AS TEXT)", "0", "-1", "1e300", "'low/4/12'", "'x' || char(10)")[
        rng.integers(9)
    ]
    with closing(sqlite3.connect(":memory:")) as database, suppress(sqlite3.Error):
        database.deserialize(data)
        database.execute("PRAGMA ignore_check_constraints = ON")
        tables = database.execute("SELECT name FROM sqlite_master").fetchall()
        (table,) = tables[rng.integers(len(tables))]
        columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
        column = columns[rng.integers(len(columns))]
        statement = (
            f"UPDATE OR REPLACE {table} SET {column} = {value}",
            f"UPDATE OR REPLACE {table} SET {column} = {value} WHERE random() % 50 = 0",
            f"ALTER TABLE {table} RENAME COLUMN {column} TO other",
            f"ALTER TABLE {table} ADD COLUMN other",
            f"DROP TABLE {table}",
            f"DELETE FROM {table}",
            f"CREATE INDEX other ON {table} ({column})",
            f"CREATE VIEW other AS SELECT {value}",
            f"CREATE TRIGGER other BEFORE INSERT ON {table} BEGIN DELETE FROM {table}; END",
            f"CREATE TABLE other ({column})",
            "PRAGMA writable_schema = ON",
        )[rng.integers(11)]
        database.execute(statement)
        if "writable" in statement:  # what says where a table is and what it holds, made another
            place = ("sql", "name", "type", "tbl_name", "rootpage")[rng.integers(5)]
            database.execute(f"UPDATE sqlite_master SET {place} = {value}")
        database.commit()
        return database.serialize()
    return mutate_bytes(data, rng)


def mutate_text(text: str, rng: np.random.Generator) -> Any:
    """A question as nobody would ask it."""
    odd = ("\x00", "\x1b[2J", "\ud800", "<|image|>", "<|endoftext|>", "\u202e", "\ufeff", "🤖", "\n" * 50, " " * 500)
    kind = rng.integers(6)
    if kind == 0:
        return ("", " ", "?" * 50_000, 7, None, b"what?", ["what?"], True, float("nan"), {})[rng.integers(10)]
    place = int(rng.integers(len(text) + 1))
    if kind == 1:
        return text[:place] + "".join(map(chr, rng.integers(0, 0x3000, 20).tolist())) + text[place:]
    if kind == 2:
        return text * int(rng.integers(1, 200))
    return text[:place] + odd[rng.integers(len(odd))] * int(rng.integers(1, 4)) + text[place:]


def _holders(values: Any) -> list[tuple[Any, Any]]:
    """Every place of a nest: the list or mapping, and the index or key in it."""
    found: list[tuple[Any, Any]] = []
    waiting = [values]
    while waiting:
        holder = waiting.pop()
        entries = holder.items() if isinstance(holder, dict) else enumerate(holder) if isinstance(holder, list) else ()
        for key, value in entries:
            found.append((holder, key))
            waiting.append(value)
    return found


def _other(value: Any, rng: np.random.Generator) -> Any:
    """A value that is like another, but not it."""
    if isinstance(value, bool) or value is None:
        return (0, 1, not value, str(value).lower())[rng.integers(4)]
    if isinstance(value, (int, float)):
        factor = (-1, 0, 1e-12, 1e-3, 0.1, 0.99, 1.01, 10, 1e3, 1e12)[rng.integers(10)]
        return (value * factor, int(value * factor), str(value), [value], value + 1)[rng.integers(5)]
    if isinstance(value, str):
        return (value + " ", value.upper(), value[:-1], [value], {value: value}, value * 1000)[rng.integers(6)]
    if isinstance(value, list):
        return (value * 2, value[:-1], value[::-1], [value], {str(i): item for i, item in enumerate(value)})[
            rng.integers(5)
        ]
    return ([value], list(value.items()), {key + "_": item for key, item in value.items()}, list(value))[
        rng.integers(4)
    ]


def _text(values: Any) -> str:
    text = json.dumps(values)
    for name, raw in _RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text
