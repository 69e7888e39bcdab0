"""Damaged artefacts: every file of a finished run is mutated, and what is accepted must make sense.

    python benchmarks/fuzz_artefacts.py --num 60000 --seed 1

A fault is an exception that is no PacevlmError, a load that hangs, or a file that was changed behind its digest and is
accepted all the same. Half of the structural changes get a fresh digest, as somebody would write who knows how: then
the file's own checks must refuse what is absurd, and what is accepted with bounds below half or above 20 times the
true ones is counted.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import struct
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from mutations import mutate_bytes, mutate_json, mutate_safetensors, mutate_sqlite, mutate_text, with_fresh_digest
from PIL import Image
from result_file import provenance, write_result
from rich.console import Console
from rich.table import Table

from pacevlm.artefact import content_sha256
from pacevlm.baselines.fixed import FixedPolicy
from pacevlm.baselines.lookup_table import LookupTable
from pacevlm.baselines.predictor import PredictorPolicy
from pacevlm.console import describe_step
from pacevlm.controller.policy import Controller, ControllerPolicy
from pacevlm.data.jsonl import JsonlDataset
from pacevlm.errors import PacevlmError, QuestionError
from pacevlm.evaluation.prices import PriceTable
from pacevlm.evaluation.records import read_records
from pacevlm.evaluation.report import write_report
from pacevlm.evaluation.summary import format_summary, read_results
from pacevlm.files import parse_json, sha256_file
from pacevlm.latency.drift import DriftCorrection
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.guardrail import Guardrail
from pacevlm.latency.output_length import OutputLengthModel
from pacevlm.latency.profile import Profile, collect_device_facts
from pacevlm.models.elastic import ElasticModel, read_elastic_settings
from pacevlm.pacer import BUNDLE_FILE, Pacer
from pacevlm.pipeline import load_elastic_model, run_pipeline
from pacevlm.pipeline.outputs import read_shown
from pacevlm.pipeline.run_config import load_run_config
from pacevlm.pipeline.step_log import StepLog
from pacevlm.request.pacing import Pacing
from pacevlm.rollout.outcome_store import OutcomeStore, StoredAnswer
from pacevlm.training.checkpoint import load_checkpoint
from pacevlm.training.constraint import ConstraintConfig, PIDLagrangian
from pacevlm.training.metrics_log import read_metrics
from pacevlm.training.run_record import read_run_record
from pacevlm.types import Objective

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "How many red digits are there?"
SECONDS = 10.0
LEAST, MOST = 0.5, 20.0
# Files that people may edit, or of which each line stands alone: no digest covers them.
OPEN = ("config.json", "elastic.json", "records.jsonl", "outcomes.sqlite", "train/metrics.jsonl", "data.jsonl")


@dataclass(frozen=True)
class Options:
    """Which run is damaged, how often and where results go.

    Attributes:
        num: mutations.
        seed: of the mutations.
        run_dir: a finished run; a small one of a tiny random model is made if None.
        out: folder of the result file.
    """

    num: int = 60_000
    seed: int = 0
    run_dir: Path | None = None
    out: Path = Path("benchmarks/results")


class Hang(BaseException):
    """A load that took longer than `SECONDS`."""


def make_run(folder: Path) -> Path:
    """A whole run on the tests' tiny random model; returns its directory, with the model in a folder beside it."""
    modules = {}
    for name in ("conftest", "pipeline/test_run"):
        spec = importlib.util.spec_from_file_location(f"fuzzed_{Path(name).name}", ROOT / "tests" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    model_dir = modules["conftest"].save_tiny_checkpoint(folder / "model")
    config = modules["pipeline/test_run"].make_config(folder / "run", model_dir)
    run_pipeline(config)
    return Path(config.run_dir)


class Doors:
    """The public functions that load each file of a run, and what is asked of what they load.

    Args:
        run_dir: a finished run, which is changed in place.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.bundle = run_dir, run_dir / "bundle"
        config = load_run_config(run_dir)
        self.model = load_elastic_model(config.model)
        self.space = self.model.knob_space
        self.image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
        self.view = self.model.view(self.image, QUESTION)
        self.estimator = LatencyEstimator.load(run_dir / "estimator.json")
        self.guardrail = Guardrail.load(run_dir / "guardrail.json", self.estimator)
        drift = DriftCorrection.for_guardrail(self.guardrail)
        for ratio in np.random.default_rng(0).normal(0.1, 0.1, 100):
            drift.observe(10.0, 10.0 * float(np.exp(ratio)))
        drift.save(run_dir / "drift.json")
        shutil.copy(Path(config.model.path) / "elastic.json", run_dir / "elastic.json")
        self.image.save(run_dir / "a.png")
        lines = [
            {"image": "a.png", "question": QUESTION, "answer": str(i), "id": i, "family": "count"} for i in range(3)
        ]
        (run_dir / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        parts = (
            *("bundle/estimator.json", "bundle/guardrail.json", "bundle/output_length.json"),
            *("bundle/prices.json", "bundle/predictor.json"),
            *("bundle/controller/controller.json", "bundle/controller/controller.safetensors", "bundle/bundle.json"),
        )
        self.doors: dict[str, Callable[[Path], Any]] = {
            "profile.json": lambda path: Profile.load(path).device.identity and None,
            "estimator.json": self._estimator,
            "guardrail.json": lambda path: self._bounds(Guardrail.load(path, self.estimator)),
            "guardrail_profile.json": lambda path: self._bounds(Guardrail.load(path, self.estimator)),
            "output_length.json": self._output_length,
            "drift.json": lambda path: np.array([DriftCorrection.load(path, self.guardrail).factor]),
            "controller/controller.json": self._controller,
            "controller/controller.safetensors": self._controller,
            "lookup_table.json": lambda path: self._choose(LookupTable.load(path, self.space)),
            "fixed.json": lambda path: self._choose(FixedPolicy.load(path, self.space)),
            "predictor.json": lambda path: self._choose(PredictorPolicy.load(path, self.space)),
            "prices.json": lambda path: np.array([PriceTable.load(path).full_ms]),
            "steps.json": self._steps,
            "results.json": self._results,
            "shown.json": lambda path: read_shown(path) and None,
            "records.jsonl": lambda path: read_records(path) and None,
            "outcomes.sqlite": self._outcomes,
            "config.json": lambda path: load_run_config(path.parent) and None,
            "elastic.json": lambda path: read_elastic_settings(path.parent) and None,
            "train/run.json": lambda path: read_run_record(path) and None,
            "train/checkpoint.safetensors": self._checkpoint,
            "train/metrics.jsonl": lambda path: read_metrics(path) and None,
            "data.jsonl": lambda path: [example.image for example in JsonlDataset(path)] and None,
            **dict.fromkeys(parts, lambda path: self._pacer()),
        }
        self.true = {name: door(run_dir / name) for name, door in self.doors.items()}

    def ask(self, question: Any) -> None:
        """Look at a question as a request would."""
        self.model.adapter.encode_question(question)
        self.model.view(self.image, question)

    def _bounds(self, guardrail: Guardrail, tokens: int | None = None) -> Any:
        most = self.model.max_new_tokens if tokens is None else tokens
        return np.stack([guardrail.upper_bounds_ms(self.view.sizes, most, kind) for kind in ("e2e", "ttft")])

    def _estimator(self, path: Path) -> Any:
        estimator = LatencyEstimator.load(path, self.model.made_for)
        return self._bounds(Guardrail.load(self.run_dir / "guardrail.json", estimator))

    def _output_length(self, path: Path) -> Any:
        lengths = OutputLengthModel.load(path, self.model.made_for)
        text = None if lengths.text_weight is None else self.view.sizes.num_text_tokens
        tokens = lengths.upper(self.view.question_embedding.double().numpy(), text)
        if tokens > self.model.max_new_tokens:
            return self._pacer()
        return self._bounds(self.guardrail, tokens)

    def _controller(self, path: Path) -> None:
        controller = Controller.from_pretrained(
            path.parent,
            replace(self.estimator.made_for, d_model=self.model.d_model),
        )
        policy = ControllerPolicy(controller.eval())
        with torch.no_grad():
            tokens = controller.latency_tokens([Objective(50.0, price=5.0)])
            assert bool(torch.isfinite(tokens).all()), "the latency token is not finite"
        self._choose(policy)

    def _choose(self, policy: Any) -> None:
        pacing = Pacing(self.guardrail, None, self.model.max_new_tokens)
        request = pacing.look(self.view, Objective(1e6))
        tier = policy.choose_tier(request)
        policy.choose_compute(request, tier, torch.zeros(self.model.d_model))

    def _steps(self, path: Path) -> Any:
        log = StepLog(path.parent)
        for name in ("profile", "lookup", "train", "calibrate", "evaluate"):
            step = log.get(name)
            if step is not None:
                describe_step(name, step.facts)
                step.changes({})
        profile = log.get("profile")
        return None if profile is None else np.array([profile.facts["full_p50_ms"]["e2e"]])

    def _results(self, path: Path) -> None:
        results = read_results(path)
        format_summary(results)
        if np.random.default_rng(path.stat().st_size).random() < 0.005:
            write_report(results, path.parent / "fuzzed.html")

    def _outcomes(self, path: Path) -> None:
        """What opens has to be read to its end, and to be written to."""
        store = OutcomeStore(self.model.identity, path)
        assert all(store.get(*key) is not None for key in store), "an outcome is not found"
        store.add([("fuzzed", self.space.full, StoredAnswer("", 1, 1))])

    def _checkpoint(self, path: Path) -> None:
        checkpoint = load_checkpoint(path)
        PIDLagrangian(ConstraintConfig()).load_state_dict(checkpoint.multiplier)

    def _pacer(self) -> Any:
        """The bundle through its one door; the model is there already."""
        loading = ElasticModel.__dict__["from_pretrained"]
        ElasticModel.from_pretrained = lambda *_, **__: self.model  # type: ignore[method-assign]
        try:
            pacer = Pacer.from_pretrained(self.run_dir)
        finally:
            ElasticModel.from_pretrained = loading
        self._choose(pacer.policy)
        return np.stack(
            [
                pacer.pacing.upper_bounds_ms([self.view], pacer.kind)[0],
                np.full(self.space.shape, pacer.full_p50_ms),
            ]
        )


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `Hang` in the block once it has taken so long."""

    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)  # a test's own limit goes on


def is_absurd(found: Any, true: Any) -> bool:
    """Whether bounds are below half or above 20 times what they should be, or of another shape."""
    if true is None or found is None:
        return False
    return found.shape != true.shape or not bool(((found >= LEAST * true) & (found <= MOST * true)).all())


def refresh(run_dir: Path, name: str) -> None:
    """Write the digests that cover a changed file anew: its description's and its bundle's."""
    if name.endswith("controller.safetensors"):
        description = (run_dir / name).with_name("controller.json")
        values = json.loads(description.read_text())
        values["weights_sha256"] = sha256_file(run_dir / name)
        description.write_text(with_fresh_digest(json.dumps(values)))
    if name.startswith("bundle/") and not name.endswith(BUNDLE_FILE):
        bundle = run_dir / "bundle" / BUNDLE_FILE
        values = json.loads(bundle.read_text())
        values["files"] = {file: sha256_file(run_dir / "bundle" / file) for file in values["files"]}
        values["sha256"] = content_sha256(values)
        bundle.write_text(json.dumps(values))


def mutate(name: str, data: bytes, rng: np.random.Generator) -> tuple[bytes, bool]:
    """A damaged file, and whether it gets a fresh digest."""
    structural = bool(rng.random() < 0.7)
    if not structural:
        return mutate_bytes(data, rng), False
    # A training checkpoint carries its digest inside, and has nothing to say but what it covers.
    fresh = bool(rng.random() < 0.5) and not name.startswith("train/checkpoint")
    if name.endswith(".safetensors"):
        return mutate_safetensors(data, rng), fresh
    if name.endswith(".sqlite"):
        return mutate_sqlite(data, rng), False
    if name.endswith(".jsonl"):
        lines = data.decode().splitlines()
        place = int(rng.integers(len(lines)))
        lines[place] = mutate_json(json.loads(lines[place]), rng)
        return ("\n".join(lines) + "\n").encode(), False
    text = mutate_json(json.loads(data), rng)
    return (with_fresh_digest(text) if fresh else text).encode(), fresh


def try_one(doors: Doors, name: str, rng: np.random.Generator) -> tuple[str, str]:
    """Damage one file, load it and put it back; returns what came of it, and a note on faults."""
    saved = {path: path.read_bytes() for path in _touched(doors.run_dir, name)}
    path = doors.run_dir / name
    damaged, fresh = mutate(name, saved[path], rng)
    path.write_bytes(damaged)
    try:
        if fresh:
            refresh(doors.run_dir, name)
        outcome, note, found = attempt(lambda: doors.doors[name](path), PacevlmError)
        if outcome != "accepted":
            return outcome, note
        absurd = is_absurd(found, doors.true[name])
        if fresh or name in OPEN:
            return ("accepted, absurd" if absurd else "accepted"), "bounds"
        if not _same(name, saved[path], damaged):
            return "FAULT", "accepted though it was changed behind its digest"
        return "unchanged", ""
    finally:
        for file, data in saved.items():
            file.write_bytes(data)


def ask_one(doors: Doors, rng: np.random.Generator) -> tuple[str, str]:
    """Ask an odd question; only QuestionError may come."""
    question = mutate_text(QUESTION, rng)
    outcome, note, _ = attempt(lambda: doors.ask(question), QuestionError)
    return outcome, f"{note} for {str(question)[:60]!a}"


def attempt(action: Callable[[], Any], allowed: type[Exception]) -> tuple[str, str, Any]:
    """Do something that may raise one class of error: what came of it, a note on a fault, and what it gave."""
    try:
        with limited(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            return "accepted", "", action()
    except allowed:
        return "refused", "", None
    except Hang:
        return "FAULT", "hangs", None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a library is no Exception
        return "FAULT", f"{type(error).__name__}: {str(error)[:160]}", None


def _touched(run_dir: Path, name: str) -> list[Path]:
    names = {name}
    if name.endswith("controller.safetensors"):
        names.add(name.replace("safetensors", "json"))
    if name.startswith("bundle/"):
        names.add(f"bundle/{BUNDLE_FILE}")
    return [run_dir / each for each in names]


def _same(name: str, before: bytes, after: bytes) -> bool:
    """Whether a changed file says what it said, to the digit: keys in another order, or nothing changed at all."""
    if before == after:
        return True
    if name.endswith(".safetensors"):
        # A word that the format has no use for, in the header: neither numbers nor what is said of them changed.
        return _tensors(before) == _tensors(after)
    try:
        return name.endswith(".json") and content_sha256(parse_json(before)) == content_sha256(parse_json(after))
    except ValueError:
        return False


def _tensors(data: bytes) -> Any:
    from safetensors.torch import load

    (length,) = struct.unpack("<Q", data[:8])
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    return metadata, {name: (str(tensor.dtype), tensor.tolist()) for name, tensor in load(data).items()}


def special_files(doors: Doors, name: str) -> Iterator[tuple[str, str]]:
    """A folder, a pipe, nothing at all and a dead link in a file's place."""
    path = doors.run_dir / name
    aside = path.with_name(path.name + ".aside")
    for kind in ("folder", "pipe", "nothing", "link"):
        path.rename(aside)
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to(path)
        try:
            outcome, note, _ = attempt(lambda: doors.doors[name](path), PacevlmError)
            yield outcome, f"{note}: {kind}"
        finally:
            if kind == "folder":
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
            aside.rename(path)


def fuzz(
    doors: Doors, num: int, seed: int, names: tuple[str, ...] | None = None
) -> tuple[dict[str, Counter[str]], list]:
    """Damage files in turn; returns what came of it by file, and the faults."""
    chosen = names or (*doors.doors, "questions")
    tallies: dict[str, Counter[str]] = {name: Counter() for name in chosen}
    faults: list[tuple[str, int, str]] = []

    def count(name: str, number: int, outcome: str, note: str) -> None:
        tallies[name][outcome] += 1
        if outcome in ("FAULT", "accepted, absurd"):
            faults.append((f"{outcome}: {name}", number, note))

    for name in chosen:
        if name != "questions":
            for outcome, note in special_files(doors, name):
                count(name, -1, outcome, note)
    # A bundle takes longest, and what its files hold is tried on its own as well.
    turns = [name for name in chosen for _ in range(1 if name.startswith("bundle/") else 3)]
    for number in range(num):
        name = turns[number % len(turns)]
        rng = np.random.default_rng([seed, number])
        count(name, number, *(ask_one(doors, rng) if name == "questions" else try_one(doors, name, rng)))
    return tallies, faults


def main(options: Options) -> int:
    """Print the table and the result line; 1 if there are faults."""
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        if options.run_dir is None:
            run_dir = make_run(Path(folder))
        else:
            run_dir = Path(shutil.copytree(options.run_dir, Path(folder) / "run"))
        doors = Doors(run_dir)
        tallies, faults = fuzz(doors, options.num, options.seed)
        device = collect_device_facts("cpu", doors.model.dtype)
    table = Table("file", "tried", "refused", "accepted", "absurd, fresh digest", "faults")
    for name, counts in tallies.items():
        columns = (counts.total(), counts["refused"], counts["accepted"] + counts["unchanged"])
        table.add_row(name, *map(str, (*columns, counts["accepted, absurd"], counts["FAULT"])))
    console.print(table)
    for what, number, note in faults[:60]:
        console.print(f"{what}, mutation {number}: {note}", markup=False)
    num_faults = sum(counts["FAULT"] for counts in tallies.values())
    results = {
        **provenance(device),
        "seed": options.seed,
        "num": sum(counts.total() for counts in tallies.values()),
        "num_faults": num_faults,
        "num_absurd_with_fresh_digest": sum(counts["accepted, absurd"] for counts in tallies.values()),
        "files": {name: dict(counts) for name, counts in tallies.items()},
    }
    write_result(results, options.out, "fuzz-artefacts", console)
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
