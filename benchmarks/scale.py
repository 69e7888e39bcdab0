#!/usr/bin/env python3
"""What a second rank is worth: two ranks of one thread over one process of two threads, and what kills of ranks lose.

Both ways train one controller to compare, and then answer the same fresh rollouts in turns: a sweep over all
configurations, and training steps. Last, random ranks of a run are killed, each time followed by the same command with
another number of ranks. Prints tables and one JSON line; the same goes to RESULTS/scale-DEVICE.json. Exits with 1 if
anything was lost. Two idle cores are wanted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kill_runs import SMALL, STEPS, arguments_of, count_done, steps_of, torn_files
from result_file import provenance, write_result
from rich.console import Console
from rich.table import Table

from pacevlm.controller.checkpoint import WEIGHTS_NAME
from pacevlm.data.digits import DigitVQA
from pacevlm.errors import DataError
from pacevlm.evaluation.statistics import Interval
from pacevlm.evaluation.sweep import exhaustive_sweep
from pacevlm.files import load_safetensors, read_json
from pacevlm.latency.profile import collect_device_facts
from pacevlm.launch import read_launch
from pacevlm.pipeline.artefacts import CONTROLLER_NAME, OUTCOMES_NAME, PROFILE_GUARDRAIL_NAME
from pacevlm.pipeline.context import RunContext
from pacevlm.pipeline.helper_rank import help_rank_0
from pacevlm.pipeline.run_config import load_run_config
from pacevlm.pipeline.steps import new_controller
from pacevlm.rollout.engine import RolloutEngine
from pacevlm.rollout.ranks import leading
from pacevlm.rollout.wire import Wire
from pacevlm.training.trainer import Trainer

# Two ways of using two cores: how many ranks, and threads of each.
WAYS = {"two_ranks": (2, 1), "one_process": (1, 2)}
NUM_COMPARED_STEPS = 20
# Seconds from the start to a kill: while libraries load, in the first step, or later.
KILL_AFTER_S = 4.0, 20.0
RESULTS_OF = ("sweep", "train")


# The processes that work ----------------------------------------------------------------------------------------------


def start_ranks(
    num_ranks: int, num_threads: int, arguments: Sequence[Any], **pipes: Any
) -> list[subprocess.Popen[str]]:
    """Start `python ARGUMENTS` as so many ranks, as torchrun would; as a plain process if it is one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    ranks = []
    for rank in range(num_ranks):
        own = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        env = environment | (own if num_ranks > 1 else {})
        ranks.append(subprocess.Popen([sys.executable, *map(str, arguments)], env=env, text=True, **pipes))
    return ranks


class Way:
    """One way of working, kept running; it sleeps while it is not asked."""

    def __init__(self, name: str, folder: Path) -> None:
        program = [__file__, "--serve", folder / "profiled"]
        self.ranks = start_ranks(*WAYS[name], program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, **work: Any) -> dict[str, Any]:
        """Have it do some work; returns what it says."""
        stdin, stdout = self.ranks[0].stdin, self.ranks[0].stdout
        assert stdin is not None
        assert stdout is not None
        print(json.dumps(work), file=stdin, flush=True)
        answer: dict[str, Any] = json.loads(stdout.readline())
        return answer

    def end(self) -> None:
        """Let it end."""
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.close()
        for rank in self.ranks:
            rank.wait()


def serve(profiled: Path) -> None:
    """Do what stdin asks, on all ranks that there are."""
    launch = read_launch()
    if launch is not None and launch.rank > 0:
        help_rank_0(launch)
        return
    with nullcontext() if launch is None else leading(Wire(launch)) as ranks:
        run = RunContext(load_run_config(profiled))
        _ = run.model
        for line in sys.stdin:
            work = json.loads(line)
            # A fresh engine knows no answer; the other rank's prefixes go with a model that is loaded anew.
            engine = RolloutEngine(run.model, run.splits.metric, ranks=ranks)
            before = None if ranks is None else ranks.totals()
            answer = {"sweep": sweep, "train": train}[work["do"]](run, engine, work)
            if ranks is not None and before is not None:
                done = [now.since(then) for now, then in zip(ranks.totals(), before, strict=True)]
                answer["ranks"] = [dataclasses.asdict(rank) for rank in done]
            print(json.dumps(answer), flush=True)


def sweep(run: RunContext, engine: RolloutEngine, work: dict[str, Any]) -> dict[str, Any]:
    """Examples that nothing is known of, with every configuration."""
    start, end = work["examples"]
    dataset = DigitVQA("train", end, seed=17)
    examples = [dataset[number] for number in range(start, end)]
    started = time.perf_counter()
    accuracy = exhaustive_sweep(engine, examples)
    return {"seconds": time.perf_counter() - started, "num": engine.num_run, "accuracy": float(accuracy.mean())}


def train(run: RunContext, engine: RolloutEngine, work: dict[str, Any]) -> dict[str, Any]:
    """Training steps from the beginning, on examples of their own."""
    start, end = work["examples"]
    folder = Path(work["folder"])
    config = dataclasses.replace(
        run.config.train_config, run_dir=folder, steps=work["steps"], batch_size=work["batch"], seed=work["seed"]
    )
    controller = new_controller(run, config.seed)
    pacing = run.pacing(PROFILE_GUARDRAIL_NAME)
    trainer = Trainer(controller, engine, pacing, run.splits.train[start:end], config, run.full_bound_ms)
    started = time.perf_counter()
    trainer.run()
    seconds = time.perf_counter() - started
    trainer.result.save_pretrained(folder / CONTROLLER_NAME)
    return {"seconds": seconds, "num": engine.num_run, "steps": work["steps"]}


# Measuring ------------------------------------------------------------------------------------------------------------


def measure(folder: Path, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Both ways in turns."""
    ways = {name: Way(name, folder) for name in WAYS}
    found: dict[str, Any] = {}
    try:
        weights = []
        for name, way in ways.items():  # which warms both up, too
            place = folder / f"compared-{name}"
            work = {"do": "train", "examples": [0, arguments.num_trained], "folder": str(place)}
            way.ask(**work, steps=NUM_COMPARED_STEPS, batch=8, seed=0)
            weights.append(load_safetensors(place / CONTROLLER_NAME / WEIGHTS_NAME))
        furthest = max(float((tensor - weights[1][name]).abs().max()) for name, tensor in weights[0].items())
        found["max_abs_difference"] = furthest
        console.print(f"parameters after {NUM_COMPARED_STEPS} steps differ by at most {furthest:.2g}")
        order = np.random.default_rng(arguments.seed)
        seconds: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in WAYS} for kind in RESULTS_OF}
        last: dict[str, Any] = {}
        for number in range(arguments.rounds):
            for kind in RESULTS_OF:
                size = arguments.num_swept if kind == "sweep" else arguments.num_trained
                work = {"do": kind, "examples": [(number + 1) * size, (number + 2) * size]}
                for name in order.permutation(list(WAYS)).tolist():
                    place = folder / f"{kind}-{name}-{number}"
                    more = {"steps": arguments.steps, "batch": arguments.batch, "seed": number, "folder": str(place)}
                    answer = ways[name].ask(**work, **(more if kind == "train" else {}))
                    seconds[kind][name].append(answer["seconds"])
                    last[f"{kind} {name}"] = answer
                pair = {name: seconds[kind][name][-1] for name in WAYS}
                console.print(f"round {number}, {kind}: " + ", ".join(f"{n} {s:.2f} s" for n, s in pair.items()))
    finally:
        for way in ways.values():
            way.end()
    for kind in RESULTS_OF:
        ratios = np.array(seconds[kind]["one_process"]) / np.array(seconds[kind]["two_ranks"])
        interval = Interval(float(ratios.mean()), float(ratios.min()), float(ratios.max()))
        found[f"{kind}_ratio"] = dataclasses.asdict(interval)
        found[f"{kind}_seconds"] = seconds[kind]
        found[f"{kind}_rollouts"] = last[f"{kind} one_process"]["num"]
        found[f"{kind}_ranks"] = last[f"{kind} two_ranks"]["ranks"]
    return found


# Kills ----------------------------------------------------------------------------------------------------------------


def stored(run_dir: Path) -> list[tuple[str, str]]:
    """Keys of the outcome store."""
    path = run_dir / OUTCOMES_NAME
    if not path.exists() or not path.stat().st_size:
        return []
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT content, knobs FROM outcomes").fetchall()


def kill_once(number: int, run_dir: Path, source: Path, num_ranks: int, delay_s: float, victim: int) -> dict[str, Any]:
    """Start a run on some ranks, kill one, and look at what it left; the others are told to stop, as torchrun does."""
    before, done_before = set(stored(run_dir)), count_done(run_dir)
    command = ["-m", "pacevlm", *arguments_of("train", run_dir, **{"profile.source": source})]
    ranks = start_ranks(num_ranks, 1, command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    time.sleep(delay_s)
    was_running = ranks[victim].poll() is None
    ranks[victim].kill()
    killed_at, at_kill = time.monotonic(), set(stored(run_dir))
    time.sleep(0.5)
    for rank in ranks:
        rank.terminate()
    texts = [rank.communicate(timeout=60)[1] for rank in ranks]
    ended_s = time.monotonic() - killed_at
    after, done = stored(run_dir), count_done(run_dir)
    sentences = [line for text in texts for line in text.splitlines() if "pacevlm: error" in line]
    faults = torn_files(run_dir, was_killed=victim == 0)
    faults += [f"{len(at_kill - set(after))} answers lost"] if at_kill - set(after) else []
    faults += [f"{len(after) - len(set(after))} answers stored twice"] if len(after) > len(set(after)) else []
    fewer = [what for what in done_before if done[what] < done_before[what]]
    faults += [f"{what}: {done_before[what]} before, {done[what]} after" for what in fewer]
    faults += ["it went on for more than 30 s"] if ended_s > 30 else []
    had_begun = any(line.startswith(STEPS) for line in texts[0].splitlines())
    has_ended = "calibrate" in steps_of(run_dir)  # the last step of the command: it was leaving when it was killed
    # One that was killed while the others loaded may be noticed by the launcher alone.
    if was_running and not (had_begun and not has_ended) <= len(sentences) <= 1:
        faults.append(f"{len(sentences)} sentences: {sentences}")
    if has_ended and victim != 0 and ranks[0].returncode != 0 and not sentences:
        faults.append(f"rank 0 ended with {ranks[0].returncode} and said nothing")
    return {
        "number": number,
        "num_ranks": num_ranks,
        "victim": victim,
        "delay_s": round(delay_s, 2),
        "was_running": was_running,
        "ended_s": round(ended_s, 2),
        "num_answers": [len(before), len(at_kill), len(after)],
        "steps_done": sorted(steps_of(run_dir)),
        "faults": faults,
    }


def kill_ranks(folder: Path, num: int, seed: int, console: Console) -> dict[str, Any]:
    """Kill random ranks of runs again and again; the last run is left to end."""
    rng = np.random.default_rng(seed)
    source, run_dir = folder / "profiled" / "profile.json", folder / "killed"
    kills = []
    for number in range(num):
        num_ranks = 2 + number % 2
        victim, delay_s = int(rng.integers(num_ranks)), float(rng.uniform(*KILL_AFTER_S))
        if "train" in steps_of(run_dir):  # done too soon: a new one
            shutil.rmtree(run_dir)
        kills.append(kill_once(number, run_dir, source, num_ranks, delay_s, victim))
        console.print(f"kill {number}: {kills[-1]}", highlight=False)
    kept = set(stored(run_dir))
    (alone,) = start_ranks(1, 2, ["-m", "pacevlm", *arguments_of("train", run_dir, **{"profile.source": source})])
    faults = [fault for kill in kills for fault in kill["faults"]]
    faults += ["the last run failed"] if alone.wait() else []
    faults += ["answers were lost at last"] if kept - set(stored(run_dir)) else []
    return {"kills": kills, "lost": faults}


def show(results: dict[str, Any], console: Console) -> None:
    """Print the ratios and the kills."""
    table = Table("two ranks over one process", "mean", "low", "high", "rollouts")
    for kind in RESULTS_OF:
        ratio = results[f"{kind}_ratio"]
        table.add_row(
            kind, *(f"{ratio[name]:.3f}" for name in ("mean", "low", "high")), str(results[f"{kind}_rollouts"])
        )
    console.print(table)
    slowest = max((kill["ended_s"] for kill in results["kills"]), default=0.0)
    console.print(f"{len(results['kills'])} kills, ended within {slowest:.1f} s; lost: {results['lost'] or 'nothing'}")


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-swept", type=int, default=16, help="examples of a sweep")
    parser.add_argument("--num-trained", type=int, default=64, help="examples of a training")
    parser.add_argument("--steps", type=int, default=4, help="training steps of a round")
    parser.add_argument("--batch", type=int, default=32, help="contexts of a training step")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve)
        return
    console = Console(stderr=True)
    SMALL["data.num-train"] = (arguments.rounds + 1) * arguments.num_trained
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run([sys.executable, "-m", "pacevlm", *arguments_of("profile", folder / "profiled")], check=True)
        results = {
            **provenance(collect_device_facts("cpu", torch.float32)),
            "seed": arguments.seed,
            **measure(folder, arguments, console),
            **kill_ranks(folder, arguments.kills, arguments.seed, console),
        }
    earlier = arguments.results / "outcome-store-cpu.json"
    if earlier.exists():
        results["store"] = read_json(earlier, "results of the outcome store", DataError)["store"]
    show(results, Console())
    write_result(results, arguments.results, "scale", console)
    if results["lost"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
