"""Starts pacevlm with hundreds of odd command lines in odd surroundings, each as a process of its own.

Whatever is given, a command must end soon, with a documented exit code, without a traceback, and without a character
that acts on the terminal; and where it refuses, it must say something.

    python benchmarks/fuzz_commands.py --num-commands 300 --seed 0
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from PIL import Image
from result_file import provenance, write_result
from rich.console import Console
from rich.table import Table

from pacevlm.cli import COMMANDS
from pacevlm.config import config_to_dict, flatten_settings
from pacevlm.latency.profile import collect_device_facts
from pacevlm.pipeline import RunConfig

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "import sys; from pacevlm.cli import main; sys.exit(main())"
# Done, unusable input, interrupted, nobody reads; 1 would be a fault of pacevlm itself.
CODES = {0, 2, 130, 141}

TEXTS = (
    *("", " ", "nan", "inf", "-inf", "-1", "0", "-0", "1e400", "9" * 40, "1.5", "0x10", "1_0", "True", "None", "none"),
    *("é", "日本語", "🙂", "e\u0301", "\x1b[31mred", "\x1b]0;title\x07", "a\nb", "\r\npacevlm: error: forged", "\t"),
    *("\x9b", "\u202egnp", "\u2028", "\u200b", "\udcff", "caf\udce9.png", "[bold]x[/bold]", "[/", "%s%n", "`id`"),
    *("../..", "/", "/dev/null", "~", "~/x", "x" * 5000, "a/" * 200, "-", "--", "=", "--help=1", "'", '"', "\\", "#"),
)
SURROUNDINGS: tuple[dict[str, str], ...] = (
    *({}, {}, {"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}),
    *({"COLUMNS": "1"}, {"COLUMNS": "x"}, {"COLUMNS": "100000"}, {"TERM": "dumb"}, {"TERM": ""}, {"NO_COLOR": "1"}),
    *({"HOME": ""}, {"LC_ALL": "xx_YY"}, {"PYTHONIOENCODING": "cp1252", "COLUMNS": "5"}),
)
STREAMS = ("", "", "", "", ">&-", "2>&-", "<&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", "| true")


@dataclass(frozen=True)
class FuzzOptions:
    """How much is tried.

    Attributes:
        num_commands: processes to start.
        seed: of the command lines.
        timeout_s: a command that takes longer counts as one that hangs, seconds.
        folder: where the result is written.
    """

    num_commands: int = 300
    seed: int = 0
    timeout_s: float = 120.0
    folder: Path = Path("benchmarks/results")


@dataclass
class Found:
    """What the commands of one kind did."""

    codes: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class CommandLines:
    """Draws command lines; none of them can begin anything long.

    Args:
        rng: what is drawn from.
        folder: holds a finished `run`, its `model`, a picture and things that are neither.
    """

    def __init__(self, rng: random.Random, folder: Path) -> None:
        self.rng, self.folder = rng, folder
        names = [name.replace("_", "-") for name, _ in flatten_settings(config_to_dict(RunConfig()))]
        self.settings = [name for name in names if name != "run-dir"]
        paths = ("run", "model", "picture.png", "text.txt", "empty", "empty.jsonl", "bad.jsonl", "missing", "locked")
        self.values = [*TEXTS, *(str(folder / name) for name in paths)]

    def value(self) -> str:
        """Any odd value."""
        return self.rng.choice(self.values)

    def draw(self) -> tuple[str, list[str]]:
        """The kind of a command line, and its words."""
        kinds = (self.no_command, self.mangled, self.run, self.answer, self.finished, self.importance)
        # What loads a model takes its time.
        (kind,) = self.rng.choices(kinds, (4, 6, 12, 4, 1, 3))
        return kind.__name__, kind()

    def no_command(self) -> list[str]:
        return [self.value() for _ in range(self.rng.randint(0, 3))]

    def mangled(self) -> list[str]:
        words = [self.rng.choice(list(COMMANDS)), f"--{self.rng.choice(self.settings)}", self.value()]
        place = self.rng.randrange(len(words))
        mangled = list(words[place])
        for _ in range(self.rng.randint(1, 4)):
            mangled.insert(self.rng.randint(0, len(mangled)), self.rng.choice("-=. \n\x1bé[]\\'\udcff"))
        words[place] = "".join(mangled)
        if words[0] in COMMANDS:
            words += ["--run-dir", str(self.folder / "missing"), "--no-such-option"]
        return words

    def run(self) -> list[str]:
        words = [self.rng.choice(("quickstart", "profile", "train", "evaluate"))]
        words += ["--run-dir", self.value() if self.rng.random() < 0.4 else str(self.folder / "new")]
        # Neither is there, so that nothing begins where all else happens to be allowed.
        words += ["--model.path", str(self.folder / "missing"), "--data.dataset", str(self.folder / "missing.jsonl")]
        for _ in range(self.rng.randint(0, 3)):
            name, value = self.rng.choice(self.settings), self.value()
            words += self.rng.choice(([f"--{name}", value], [f"--{name}={value}"], [f"--{name}"]))
        words += self.rng.choice(([], [], ["--fresh"], [self.value()], ["--help"]))
        return words

    def answer(self) -> list[str]:
        good = self.rng.random() < 0.2
        words = ["answer", str(self.folder / "picture.png") if good else self.value()]
        words += ["Which number?" if self.rng.random() < 0.3 else self.value()]
        words += ["--budget-ms", "50" if good else self.value()]
        words += ["--run-dir", str(self.folder / "run") if self.rng.random() < 0.7 else self.value()]
        return [*words, *self.rng.choice(([], ["--json"], ["--device", self.value()], ["--price", self.value()]))]

    def finished(self) -> list[str]:
        words = [self.rng.choice(("report", "evaluate", "quickstart", "prices")), "--run-dir", str(self.folder / "run")]
        return words if self.rng.random() < 0.5 else [*words, self.value()]

    def importance(self) -> list[str]:
        words = ["importance", "--path", str(self.folder / "missing") if self.rng.random() < 0.5 else self.value()]
        words += ["--dataset", str(self.folder / "missing.jsonl")]
        option = self.rng.choice(("num-examples", "min-num-blocks", "num-candidates", "dtype", "device", "seed"))
        return [*words, f"--{option}", self.value()]


def main(options: FuzzOptions) -> None:
    """Start all commands and print what they did."""
    console = Console(stderr=True)
    rng = random.Random(options.seed)
    found: dict[str, Found] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        lines = CommandLines(rng, folder)
        for number in range(options.num_commands):
            kind, words = lines.draw()
            surroundings, streams = rng.choice(SURROUNDINGS), rng.choice(STREAMS)
            code, seconds, problems = start(words, surroundings, streams, folder, options.timeout_s)
            entry = found.setdefault(kind, Found())
            entry.codes[code] += 1
            entry.seconds.append(seconds)
            entry.problems += [f"{problem}: {words!r} {surroundings} {streams}" for problem in problems]
            for problem in entry.problems[len(entry.problems) - len(problems) :]:
                console.print(f"{number}: {problem}", markup=False)
    table = Table("command line", "started", "exit codes", "longest s", "problems")
    for kind, entry in found.items():
        codes = ", ".join(f"{code}: {count}" for code, count in sorted(entry.codes.items()))
        table.add_row(kind, str(len(entry.seconds)), codes, f"{max(entry.seconds):.1f}", str(len(entry.problems)))
    console.print(table)
    results: dict[str, Any] = {
        **provenance(collect_device_facts("cpu", torch.float32)),
        "seed": options.seed,
        "num_commands": options.num_commands,
        "num_problems": sum(len(entry.problems) for entry in found.values()),
        "kinds": {
            kind: {
                "num_commands": len(entry.seconds),
                "exit_codes": {str(code): count for code, count in sorted(entry.codes.items())},
                "num_problems": len(entry.problems),
            }
            for kind, entry in found.items()
        },
    }
    write_result(results, options.folder, "fuzz-commands", console)
    if results["num_problems"]:
        sys.exit(1)


def prepare(folder: Path) -> None:
    """A finished run of a tiny model, and what is no run, model or data set."""
    sys.path.insert(0, str(ROOT))
    from tests.conftest import save_tiny_checkpoint
    from tests.test_cli import tiny_arguments

    (folder / "model").mkdir()
    save_tiny_checkpoint(folder / "model")
    words = [sys.executable, "-c", PROGRAM, "quickstart", *tiny_arguments(folder / "run", folder / "model")]
    subprocess.run(words, env=environment({}), cwd=folder, check=True, stdout=subprocess.DEVNULL)
    Image.new("RGB", (40, 30), (200, 30, 30)).save(folder / "picture.png")
    (folder / "text.txt").write_text("no picture")
    (folder / "empty.jsonl").write_text("")
    (folder / "bad.jsonl").write_text('{"image": "\\u001b[31m", "question": "\\u202e", "answer": ""}\n')
    (folder / "empty").mkdir()
    (folder / "locked").mkdir(mode=0)


def environment(surroundings: dict[str, str]) -> dict[str, str]:
    """This process's environment, changed; one thread, because nothing here is about speed."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **surroundings}


def start(
    words: list[str], surroundings: dict[str, str], streams: str, folder: Path, timeout_s: float
) -> tuple[int, float, list[str]]:
    """Run one command; returns its exit code, its seconds and what is wrong with what it did."""
    # The code goes to a third stream, because a shell tells the last part of a pipe's only.
    script = f'{{ "$@"; echo $? >&3; }} 3>code {streams}' if "|" in streams else f'"$@" {streams}; echo $? >code'
    command = ["sh", "-c", script, "sh", sys.executable, "-c", PROGRAM, *words]
    (folder / "code").unlink(missing_ok=True)
    began = time.monotonic()
    try:
        done = subprocess.run(
            [os.fsencode(word) for word in command],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            env=environment(surroundings),
            cwd=folder,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return -1, timeout_s, ["hangs"]
    seconds = time.monotonic() - began
    code = int((folder / "code").read_text())
    text = (done.stdout + done.stderr).decode(surroundings.get("PYTHONIOENCODING", "utf-8"), "replace")
    problems = [] if code in CODES else [f"exit code {code}, {text[-300:]!r}"]
    if "Traceback" in text or "Exception ignored" in text:
        problems.append(f"a traceback, {text[-300:]!r}")
    acting = {character for character in text if not character.isprintable() and character != "\n"}
    if acting - {"\xa0"}:
        problems.append(f"prints {sorted(acting)!r}")
    if any(line.startswith("pacevlm: error: forged") for line in text.splitlines()):
        problems.append("a forged line")
    if code == 2 and "2>" not in streams and not done.stderr.strip():
        problems.append("refuses without a word")
    return code, seconds, problems


if __name__ == "__main__":
    main(tyro.cli(FuzzOptions, description=__doc__))
