#!/usr/bin/env python3
"""What a run loses when it is stopped: kills spread over all steps, each followed by the same command again.

A first run is left alone: it tells how long the steps take and measures the profile that the others share. A second one
is left alone too, and its controller is what the stopped runs have to end with, to the bit. Then a run's process is
stopped again and again, by SIGTERM, SIGKILL, SIGHUP and SIGINT, at drawn times after one of its steps began. After each
stop every file has to be whole, and nothing that was done before may be gone but the last minute. Prints a table and,
last, one JSON line; the same goes to RESULTS/kill_runs-DEVICE.json. Exits with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import json
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from result_file import provenance, write_result
from rich.console import Console
from rich.table import Table

from pacevlm.artefact import content_sha256
from pacevlm.errors import PacevlmError
from pacevlm.files import load_safetensors, read_jsonl
from pacevlm.latency.profile import collect_device_facts
from pacevlm.pipeline.artefacts import OUTCOMES_NAME, PARTIAL_NAMES
from pacevlm.pipeline.step_log import FinishedStep, StepLog
from pacevlm.training.checkpoint import load_checkpoint

PROGRAM = "import sys; from pacevlm.cli import main; sys.exit(main())"
WEIGHTS = "controller/controller.safetensors"
STEPS = ("profile", "lookup", "train", "calibrate", "evaluate")
SIGNALS = tuple(
    getattr(signal, name, signal.SIGTERM)
    for name in ("SIGTERM", "SIGKILL", "SIGTERM", "SIGKILL", "SIGHUP", "SIGKILL", "SIGINT", "SIGKILL")
)
# Small, but every step takes some seconds on two cores.
SMALL: dict[str, Any] = {
    "data.num-train": 60,
    "data.num-val": 30,
    "data.num-test": 30,
    "profile.num-requests": 16,
    "profile.num-samples": 80,
    "profile.repeats": 1,
    "profile.num-lengths": 60,
    "profile.alpha": 0.1,
    "profile.max-megapixels": 0.5,
    "lookup.num-examples": 30,
    "train.steps": 10,
    "train.batch-size": 16,
    "train.grpo.group-size": 16,
    "calibrate.num-requests": 60,
    "evaluate.budgets": "0.6 0.9",
    "evaluate.num-timed": 8,
    "evaluate.num-warmup": 4,
}
MOST_LOST_SECONDS = 60.0
FINISHED = 10**9  # what counts as done of a step that is finished


@dataclass
class Stop:
    """One stop: what was asked for, when it came, and what it cost."""

    number: int
    signal: str
    step: str
    delay_s: float
    exit_code: int
    stopped: bool
    behind_s: float
    done: dict[str, int]
    faults: list[str] = field(default_factory=list)


class Command:
    """A `pacevlm` process whose steps are followed on its stderr."""

    def __init__(self, arguments: list[str]) -> None:
        self.started: dict[str, float] = {}
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._follow, daemon=True)
        self._reader.start()

    def _follow(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if line.strip() in STEPS:
                self.started[line.strip()] = time.monotonic()

    def wait(self) -> int:
        """The exit code, once the process has ended and all it said is read."""
        code = self.process.wait()
        self._reader.join()
        return code

    def wait_for(self, step: str, delay_s: float) -> None:
        """Until a delay after a step began, or the end of the process."""
        while self.process.poll() is None:
            if step in self.started and time.monotonic() >= self.started[step] + delay_s:
                return
            time.sleep(0.01)


def arguments_of(command: str, run_dir: Path, **settings: Any) -> list[str]:
    """A command line with the small settings."""
    pairs = {**SMALL, "run-dir": run_dir, **settings}
    return [command, *(word for name, value in pairs.items() for word in (f"--{name}", *str(value).split(" ")))]


def finish(arguments: list[str]) -> float:
    """Run a command to its end; returns the seconds it took."""
    started = time.monotonic()
    command = Command(arguments)
    if command.wait():
        raise SystemExit("\n".join(["a run that nobody stopped failed:", *command.lines]))
    return time.monotonic() - started


def steps_of(run_dir: Path) -> dict[str, FinishedStep]:
    """The finished steps of a run directory."""
    log = StepLog(run_dir)
    return {name: step for name in STEPS if (step := log.get(name)) is not None}


def count_done(run_dir: Path) -> dict[str, int]:
    """How much of each piece of work a run directory holds."""
    finished = steps_of(run_dir)
    outcomes, checkpoint = run_dir / OUTCOMES_NAME, run_dir / "train" / "checkpoint.safetensors"
    done = {
        "outcomes": count_outcomes(outcomes) if outcomes.exists() else 0,
        "training steps": load_checkpoint(checkpoint).step if checkpoint.exists() else 0,
    }
    for step, names in PARTIAL_NAMES.items():
        if not names:
            continue
        path = run_dir / names[0]
        done[f"{step}: timed"] = len(read_jsonl(path, "partial file", PacevlmError)) if path.exists() else 0
        if step in finished:
            done[f"{step}: timed"] = FINISHED
    return done


def count_outcomes(path: Path) -> int:
    """Answers of a store; raises sqlite3.DatabaseError if it is damaged."""
    with closing(sqlite3.connect(path)) as database:
        (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        # A writer may be killed before it made the tables.
        tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        return int(database.execute("SELECT count(*) FROM outcomes").fetchone()[0]) if tables else 0


def torn_files(run_dir: Path, *, was_killed: bool) -> list[str]:
    """What in a run directory is not whole, one sentence each."""
    faults = []
    for path in run_dir.rglob("*"):
        try:
            if path.suffix == ".json":
                values = json.loads(path.read_bytes())
                digest = values.pop("sha256", None)
                if digest is not None and digest != content_sha256(values):
                    faults.append(f"the digest of {path.name} differs")
            elif path.suffix == ".jsonl":
                read_jsonl(path, "records", PacevlmError)
            elif path.suffix == ".sqlite":
                count_outcomes(path)
            elif path.suffix == ".safetensors":
                load_safetensors(path)
            elif path.suffix == ".tmp" and not was_killed:
                faults.append(f"{path.name} was left behind")
        except (ValueError, PacevlmError, sqlite3.Error) as error:
            faults.append(f"{path.name} is not whole: {error}")
    return faults


def seconds_behind(run_dir: Path, started_at: float, stopped_at: float) -> float:
    """Seconds of work since something was last kept, wall clock."""
    kept = [path.stat().st_mtime for path in run_dir.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return max(0.0, stopped_at - max([started_at, *(at for at in kept if at <= stopped_at)]))


def stop_once(
    number: int, step: str, delay_s: float, arguments: list[str], run_dir: Path, before: dict[str, int]
) -> Stop:
    """Start the command, stop it within a step, and look at what it left."""
    command = Command(arguments)
    command.wait_for(step, delay_s)
    sent = SIGNALS[number % len(SIGNALS)]
    stopped_at = time.time()
    work_began_at = stopped_at - (time.monotonic() - min(command.started.values(), default=time.monotonic()))
    if command.process.poll() is None:
        command.process.send_signal(sent)
    code = command.wait()
    was_killed = sent is signal.SIGKILL
    stop = Stop(number, sent.name, step, round(delay_s, 2), code, code != 0, 0.0, count_done(run_dir))
    stop.behind_s = round(seconds_behind(run_dir, work_began_at, stopped_at), 2)
    stop.faults += torn_files(run_dir, was_killed=was_killed)
    expected = -sent if was_killed else 128 + sent
    if code not in (0, expected):
        stop.faults.append(f"exit code {code}, not {int(expected)}: {' '.join(command.lines[-3:])}")
    if code == 128 + sent and not any(f"stopped by {sent.name}" in line for line in command.lines):
        stop.faults.append("it did not say by what it was stopped")
    stop.faults += [
        f"{what}: {before[what]} before, {stop.done[what]} after" for what in before if stop.done[what] < before[what]
    ]
    if stop.behind_s > MOST_LOST_SECONDS:
        stop.faults.append(f"nothing was kept for {stop.behind_s:.0f} s")
    return stop


def stop_runs(
    folder: Path, source: Path, seconds: dict[str, float], num: int, seed: int, console: Console
) -> list[Any]:
    """Stop runs again and again; returns the stops and the directories of the runs that ended."""
    rng = np.random.default_rng(seed)
    targets = [STEPS[number * len(STEPS) // num] for number in range(num)]
    stops: list[Stop] = []
    ended: list[Path] = []
    round_number = 0
    before: dict[str, int] = {}
    for number, step in enumerate(targets):
        # Only a profile that is measured can be stopped; the others share one, so that they learn the same.
        command, name, settings = "evaluate", f"stopped-{round_number}", {"profile.source": source}
        if step == "profile":
            command, name, settings = "profile", f"profiled-{round_number}", {}
        else:
            command = "quickstart"
        run_dir = folder / name
        if not run_dir.exists():
            before = {}
        share_s = seconds[step] / targets.count(step)
        stop = stop_once(
            number, step, float(rng.uniform(0, share_s)), arguments_of(command, run_dir, **settings), run_dir, before
        )
        before = stop.done
        stops.append(stop)
        console.print(f"{stop.signal} in {step}: {stop.behind_s:.1f} s behind {' '.join(stop.faults)}", highlight=False)
        if not stop.stopped:
            if step != "profile":
                ended.append(run_dir)
            round_number += 1
    run_dir = folder / f"stopped-{round_number}"
    finish(arguments_of("quickstart", run_dir, **{"profile.source": source}))
    return [stops, [*ended, run_dir]]


def show(results: dict[str, Any], console: Console) -> None:
    """Print one line per stop."""
    table = Table("stop", "step", "after s", "exit code", "s behind", "faults")
    for stop in results["stops"]:
        faults = "; ".join(stop["faults"]) or "none"
        table.add_row(
            stop["signal"],
            stop["step"],
            f"{stop['delay_s']:.1f}",
            str(stop["exit_code"]),
            f"{stop['behind_s']:.1f}",
            faults,
        )
    console.print(table)
    console.print(
        f"{results['num_stopped']} stops, at most {results['most_behind_s']:.1f} s behind; controllers of "
        f"{results['num_ended']} stopped runs equal to the uninterrupted one's: {results['num_equal']}"
    )


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="model directory with a knob space in its elastic.json")
    parser.add_argument("--num", type=int, default=20, help="stops")
    parser.add_argument("--folder", type=Path, help="where the runs go; a temporary folder if left out")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for number in SIGNALS:  # commands would inherit it if `nohup` or a background job ignores one
        if number is not signal.SIGKILL and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    console = Console(stderr=True)
    SMALL["model.path"] = arguments.model
    if arguments.model == "embedded":
        SMALL.update({"model.top-ks": "4 8", "model.num-blocks": "12 16"})
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        first, reference = folder / "first", folder / "reference"
        finish(arguments_of("quickstart", first))
        seconds = {name: step.seconds for name, step in steps_of(first).items()}
        console.print(f"seconds of each step: {seconds}")
        source = first / "profile.json"
        finish(arguments_of("train", reference, **{"profile.source": source}))
        stops, ended = stop_runs(folder, source, seconds, arguments.num, arguments.seed, console)
        expected = (reference / WEIGHTS).read_bytes()
        num_equal = sum((run_dir / WEIGHTS).read_bytes() == expected for run_dir in ended)
    results = {
        **provenance(collect_device_facts("cpu", torch.float32)),
        "seed": arguments.seed,
        "settings": SMALL,
        "seconds": seconds,
        "num_stopped": sum(stop.stopped for stop in stops),
        "most_behind_s": max(stop.behind_s for stop in stops),
        "num_ended": len(ended),
        "num_equal": num_equal,
        "stops": [asdict(stop) for stop in stops],
    }
    show(results, Console())
    write_result(results, arguments.results, "kill_runs", console)
    if num_equal < len(ended) or any(stop.faults for stop in stops):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
