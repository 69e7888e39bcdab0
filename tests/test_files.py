"""Files are whole or not there at all, and damage is reported as what it is."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pacevlm import files
from pacevlm.errors import CheckpointError, DataError, ProfileError, StorageError
from pacevlm.files import (
    append_jsonl,
    load_safetensors,
    load_safetensors_metadata,
    read_json,
    read_jsonl,
    save_safetensors_atomic,
    sha256_file,
    write_atomic,
    write_json_atomic,
    write_new,
    write_text_atomic,
)

RECORDS: list[dict[str, Any]] = [
    {"step": 0, "reward": 0.25},
    {"step": 1, "note": "naïve – ×"},
    {"step": 2, "nested": {"a": [1, None]}},
]


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """The system refuses to let a file grow past a size: the nearest thing to a full disk that needs no disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_creates_folders_and_leaves_only_the_file(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "a" / "b" / "x.txt", "new – ×\n")
    assert (tmp_path / "a" / "b" / "x.txt").read_bytes() == "new – ×\n".encode()
    assert names(tmp_path / "a" / "b") == ["x.txt"]


def test_old_content_stays_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    with write_atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent  # a rename across file systems would not be atomic
    assert path.read_text() == "new"


def test_a_new_file_takes_the_place_of_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a" / "x.png"
    for content in (b"", b"one", b"two!", b"2two"):  # others of the same size and of other sizes
        if path.exists():
            before = path.read_bytes()
            with pytest.raises(StorageError, match="is there already and holds something else"):
                write_new(path, content)
            assert path.read_bytes() == before
        write_new(path, content, overwrite=True)
        stored = path.stat()
        write_new(path, content)  # the same is not written again
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (stored.st_ino, stored.st_mtime_ns)
        assert path.read_bytes() == content
    assert names(tmp_path / "a") == ["x.png"]


def test_a_new_file_takes_the_place_of_nothing_but_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    before = names(tmp_path)
    for name in before:
        for overwrite in (False, True):
            with pytest.raises(StorageError, match=name):
                write_new(tmp_path / name, b"content", overwrite=overwrite)
    assert names(tmp_path) == before
    with pytest.raises(StorageError, match="could not be written"):
        write_new(tmp_path / "pipe" / "x", b"content")


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()], ids=["bug", "ctrl-c"])
def test_failing_block_keeps_the_old_file_and_its_own_error(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")

    def write() -> None:
        with write_atomic(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_full_disk_at_the_end_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "x.json"
    write_json_atomic(path, {"version": 1})
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(StorageError, match=r"x\.json could not be written: No space left on device"):
        write_json_atomic(path, {"version": 2})
    monkeypatch.undo()
    assert read_json(path, "file", DataError) == {"version": 1}
    assert names(tmp_path) == ["x.json"]


def test_full_disk_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    with file_size_limit(4096), pytest.raises(StorageError, match="could not be written"):
        write_text_atomic(path, "x" * 10_000)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_full_device_is_a_storage_error(tmp_path: Path) -> None:
    def write() -> None:
        with write_atomic(tmp_path / "x.txt") as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_text("x")

    with pytest.raises(StorageError, match="No space left on device"):
        write()
    assert names(tmp_path) == []
    with pytest.raises(StorageError, match="No space left on device"):
        append_jsonl("/dev/full", {"a": 1})


def test_parent_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        write_json_atomic(tmp_path / "run" / "config.json", {})
    with pytest.raises(StorageError, match="could not be written"):
        append_jsonl(tmp_path / "run" / "metrics.jsonl", {"a": 1})


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True], "ü": "–"}
    write_json_atomic(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json", "file", DataError) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, torch.ones(1)])
def test_what_json_cannot_hold_writes_nothing(tmp_path: Path, value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        write_json_atomic(tmp_path / "x.json", {"value": value})
    with pytest.raises((TypeError, ValueError)):
        append_jsonl(tmp_path / "x.jsonl", {"a": 1}, {"value": value})
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1}}', b"\xff\xfe\x00"])
def test_damaged_json_raises_the_class_asked_for(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ProfileError, match=r"latency profile .*x\.json is not valid JSON"):
        read_json(tmp_path / "x.json", "latency profile", ProfileError)


@pytest.mark.parametrize("read", [read_json, read_jsonl])
def test_missing_file_and_folder_raise_the_class_asked_for(tmp_path: Path, read: object) -> None:
    assert callable(read)
    with pytest.raises(DataError, match="there is no data set at"):
        read(tmp_path / "none", "data set", DataError)
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path, "data set", DataError)


@pytest.mark.parametrize(
    "text",
    [
        *('{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', '{"a": 1' + "0" * 400 + "}", '{"a": 9223372036854775808}'),
        *('{"a": 1, "a": 2}', '{"a": "\\ud800"}', "[" * 100_000 + "]" * 100_000, "\ufeff{}", '{"a": "\x00"}', ""),
    ],
    ids=lambda text: text[:12],
)
def test_what_is_no_json_is_refused_in_files_and_lines(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json is not valid JSON"):
        read_json(tmp_path / "x.json", "file", DataError)
    (tmp_path / "x.jsonl").write_text(f'{{"a": 1}}\n{text or "x"}\n')
    with pytest.raises(DataError, match="line 2"):
        read_jsonl(tmp_path / "x.jsonl", "log", DataError)


@pytest.mark.timeout(20)
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (read_json, read_jsonl):
        with pytest.raises(DataError, match="no regular file"):
            read(tmp_path / "pipe", "log", DataError)
    for load in (load_safetensors, load_safetensors_metadata, sha256_file):
        with pytest.raises(CheckpointError, match="no regular file"):
            load(tmp_path / "pipe")
    with pytest.raises(DataError, match="cannot be read"):
        read_json("null\x00character", "log", DataError)


def test_jsonl_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "run" / "log.jsonl"
    append_jsonl(path, RECORDS[0])
    append_jsonl(path, *RECORDS[1:])
    append_jsonl(path)
    assert read_jsonl(path, "log", DataError) == RECORDS
    assert path.read_bytes().count(b"\n") == len(RECORDS)


def test_jsonl_cut_anywhere_keeps_every_whole_record_and_can_be_continued(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_jsonl(path, *RECORDS)
    content = path.read_bytes()
    ends = [i for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = RECORDS[: sum(end <= cut for end in ends)]
        assert read_jsonl(path, "log", DataError) == whole
        append_jsonl(path, {"step": "new"})
        assert read_jsonl(path, "log", DataError) == [*whole, {"step": "new"}]
        assert path.read_bytes().endswith(b'{"step": "new"}\n')


@pytest.mark.parametrize("line", [b'{"step": ', b"[1]", b"3", b"\xff"])
def test_jsonl_damage_that_is_not_a_torn_end_is_an_error(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(DataError, match=r"log\.jsonl is damaged: line 2"):
        read_jsonl(path, "log", DataError)
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")  # its line end was written, so it is not torn
    with pytest.raises(DataError, match="line 2"):
        read_jsonl(path, "log", DataError)


def test_jsonl_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_jsonl(path, RECORDS[0])
    before = path.read_bytes()
    with file_size_limit(4096), pytest.raises(StorageError, match="could not be written"):
        append_jsonl(path, RECORDS[1], {"text": "x" * 10_000})
    assert path.read_bytes() == before


def test_jsonl_of_a_killed_process_is_readable(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    program = (
        "import sys; from pacevlm.files import append_jsonl\n"
        "step = 0\n"
        "while True:\n"
        "    append_jsonl(sys.argv[1], {'step': step, 'text': 'x' * 5000}); step += 1\n"
        "    if step == 20: print('going', flush=True)\n"
    )
    root = Path(files.__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, cwd=root)
    assert process.stdout is not None
    with process, process.stdout:
        process.stdout.readline()
        process.kill()
    records = read_jsonl(path, "log", DataError)
    assert len(records) >= 20
    assert [record["step"] for record in records] == list(range(len(records)))


TENSORS = {
    "a": torch.arange(600.0).reshape(20, 30),
    "b": torch.tensor([1, -2]),
    "c": torch.ones(3, dtype=torch.bfloat16),
}


def test_safetensors_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "run" / "policy.safetensors"
    save_safetensors_atomic({**TENSORS, "view": TENSORS["a"].T}, path, {"format_version": "1"})
    loaded = load_safetensors(path)
    assert set(loaded) == {*TENSORS, "view"}
    for name, tensor in {**TENSORS, "view": TENSORS["a"].T}.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert load_safetensors_metadata(path) == {"format_version": "1"}
    assert names(path.parent) == ["policy.safetensors"]


def test_safetensors_may_be_overwritten_while_loaded(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    save_safetensors_atomic(TENSORS, path)
    loaded = load_safetensors(path)
    save_safetensors_atomic({"a": torch.zeros(20, 30)}, path)
    assert torch.equal(loaded["a"], TENSORS["a"])
    assert load_safetensors_metadata(path) == {}


def test_safetensors_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    save_safetensors_atomic({"a": torch.zeros(4)}, path)
    with file_size_limit(4096), pytest.raises(StorageError, match=r"policy\.safetensors could not be written"):
        save_safetensors_atomic({"a": torch.zeros(10_000)}, path)
    assert torch.equal(load_safetensors(path)["a"], torch.zeros(4))
    assert names(tmp_path) == ["policy.safetensors"]


def test_safetensors_truncated_anywhere_is_a_checkpoint_error(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    save_safetensors_atomic(TENSORS, path, {"format_version": "1"})
    content = path.read_bytes()
    for size in [0, 1, 7, 8, 9, 60, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:size])
        for load in (load_safetensors, load_safetensors_metadata):
            with pytest.raises(CheckpointError, match=r"policy\.safetensors cannot be read as safetensors"):
                load(path)


def test_safetensors_missing_folder_or_other_format_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"not": "tensors"}' * 100)
    for load in (load_safetensors, load_safetensors_metadata):
        with pytest.raises(CheckpointError, match="there is no checkpoint file"):
            load(tmp_path / "none.safetensors")
        with pytest.raises(CheckpointError, match="is a folder"):
            load(tmp_path)
        with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
            load(tmp_path / "x.json")


def test_sha256(tmp_path: Path) -> None:
    content = b"x" * 300_000
    (tmp_path / "x").write_bytes(content)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(content).hexdigest()
    with pytest.raises(CheckpointError, match="there is no file"):
        sha256_file(tmp_path / "none")
    with pytest.raises(DataError, match="there is no file"):
        sha256_file(tmp_path / "none", DataError)
