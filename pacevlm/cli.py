"""The command line: parse, build, call. What needs torch loads inside the commands."""

from __future__ import annotations

import dataclasses
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from pacevlm.checks import MAX_COUNT, MAX_SEED, check_path, check_whole
from pacevlm.config import SMALL_STUDY, HeadroomConfig, ImportanceConfig, StudyConfig
from pacevlm.config_file import ConfigFile, read_config_file
from pacevlm.console import (
    RichReporter,
    print_answer,
    print_importance,
    print_importance_plan,
    print_inspection,
    print_plan,
    print_prices,
    print_results,
)
from pacevlm.errors import ConfigError, PacevlmError, QuestionError
from pacevlm.launch import read_launch
from pacevlm.models.folder import find_model_folder
from pacevlm.options import USAGE_ERROR, given_file, given_run_dir, parse_options, parse_settings
from pacevlm.printing import printable
from pacevlm.signals import Stopped, stopping_on_signals

if TYPE_CHECKING:
    from pacevlm.pipeline import RunConfig

OptionsT = TypeVar("OptionsT")

QUICKSTART_DIR = Path("runs/quickstart")
DEFAULT_DIR = Path("runs/default")

# Asks "Which digit is red?", which the embedded model answers right with all of its configurations.
SAMPLE_INDEX, SAMPLE_BUDGET_MS = 305, "40"

# What ends before any work begins, on one rank as well as on several.
_ONLY_SHOWN = frozenset(("-h", "--help", "--plan"))

FRESH_HELP = "start over: remove what an earlier run left in the run directory, and its settings."

PLAN_HELP = (
    "print what the steps will take, requests timed, rollouts, disk and time, and start nothing: nothing is written, "
    "and the model's weights are not read."
)

# Exit codes: 0 done, 1 a fault of pacevlm itself, 2 what the user gave cannot be used, 128 + n stopped by signal n, 141
# nobody reads the output any more.
FAULT, SIGNALLED, PIPE_CLOSED = 1, 128, 141


# Commands ------------------------------------------------------------------------------------------------------------


def quickstart(arguments: Sequence[str]) -> None:
    """Profile, train and evaluate on the embedded model and data: some nine minutes on two CPU cores.

    Everything it finds is in the run directory, the report in report.html. A second start goes on where the first was
    stopped and skips what is done.

    Examples:
      pacevlm quickstart
      pacevlm quickstart --run-dir /tmp/first --train.steps 300 --evaluate.num-timed 100
      pacevlm quickstart --fresh
    """
    from pacevlm.pipeline import quickstart_config

    config = _run_steps("quickstart", arguments, QUICKSTART_DIR, quickstart_config, "evaluate")
    if config is None:
        return
    print_results(config)
    _answer_sample(config)


def profile(arguments: Sequence[str]) -> None:
    """Measure the latencies of a model on this device, and fit and calibrate the latency estimator.

    Requests run alone (batch 1) with knobs spread over all configurations. Writes profile.json, estimator.json,
    guardrail_profile.json and output_length.json into the run directory.

    Examples:
      pacevlm profile --run-dir runs/mine --model.path ./MolmoE-1B --data.dataset questions.jsonl
      pacevlm profile --run-dir runs/mine --model.device cuda --model.dtype bfloat16
      pacevlm profile --run-dir runs/small --model.top-ks 4 6 8 --model.num-blocks 12 14 16
    """
    from pacevlm.pipeline import RunConfig

    _run_steps("profile", arguments, DEFAULT_DIR, RunConfig, "profile")


def train(arguments: Sequence[str]) -> None:
    """Learn a controller for a model, a data set and a profile; what is missing of these steps runs first.

    The run directory remembers its settings: give only what changes. Training goes on from its last checkpoint. In the
    end the guardrail is calibrated on the knobs that the controller picks, and bundle/ holds all that answering needs.

    Examples:
      pacevlm train --run-dir runs/mine
      pacevlm train --run-dir runs/mine --train.steps 1000 --train.lr 3e-4 --train.grpo.group-size 32
      pacevlm train --config run.toml --train.seed 1
    """
    from pacevlm.pipeline import RunConfig

    config = _run_steps("train", arguments, DEFAULT_DIR, RunConfig, "calibrate")
    if config is None:
        return
    print(f"\ncontroller, guardrail and estimator: {printable(config.run_dir / 'bundle')}")


def evaluate(arguments: Sequence[str]) -> None:
    """Run the controller and all baselines on the same test examples and budgets, with measured latency.

    Accuracies come from all test examples, latencies from `--evaluate.num-timed` of them, one request at a time in
    random order. Writes results.json, records.jsonl, pareto.png, knobs.png and report.html into the run directory.

    Examples:
      pacevlm evaluate --run-dir runs/mine
      pacevlm evaluate --run-dir runs/mine --evaluate.budgets 0.4 0.6 0.8 1.0 --evaluate.num-timed 200
    """
    from pacevlm.pipeline import RunConfig

    config = _run_steps("evaluate", arguments, DEFAULT_DIR, RunConfig, "evaluate")
    if config is not None:
        print_results(config)


@dataclass(frozen=True)
class RebaseOptions:
    """Which run's controller to keep, and where.

    Attributes:
        source: a run directory whose controller is trained; it stays as it is.
        run_dir: folder of the new run; SOURCE-rebased if None.
        device: where the model runs, for example `cuda`; where it ran if None.
        num_threads: CPU threads of a request; as many as it had if None.
        transfer: carry the latencies over with some eighty measurements instead of a whole profile.
    """

    source: tyro.conf.Positional[Path]
    run_dir: Path | None = None
    device: str | None = None
    num_threads: int | None = None
    transfer: bool = False


def rebase(arguments: Sequence[str]) -> None:
    """Keep a trained controller on this device: profile and calibrate anew, and do not train again.

    For another GPU, an update of the driver, another number of threads. The new run directory is one like any other:
    `pacevlm evaluate` tells what the controller is worth there.

    Examples:
      pacevlm rebase runs/mine
      pacevlm rebase runs/mine --run-dir runs/other --num-threads 2 --transfer
    """
    options = parse_options(rebase, RebaseOptions, arguments)
    check_path("source", options.source)
    source = options.source.resolve()
    run_dir = options.run_dir or source.parent / f"{source.name}-rebased"
    from pacevlm.pipeline.rebase import rebase_run

    with RichReporter() as reporter:
        rebase_run(
            options.source,
            run_dir,
            device=options.device,
            num_threads=options.num_threads,
            transfer=options.transfer,
            reporter=reporter,
        )
    print(f"\ncontroller, guardrail and estimator: {printable(run_dir / 'bundle')}")


@dataclass(frozen=True)
class HeadroomOptions:
    """Which run's data to measure, and how.

    Attributes:
        run_dir: folder of the run, of which at least the profile is finished.
        settings: how it is measured.
    """

    run_dir: Path = DEFAULT_DIR
    settings: Annotated[HeadroomConfig, tyro.conf.arg(name="")] = field(default_factory=HeadroomConfig)


def headroom(arguments: Sequence[str]) -> None:
    """Say before training what a controller could gain over the lookup table, and where.

    Predictors of accuracy, fitted on other pictures, are used as policies at the budgets of --evaluate.budgets; what
    the better one gains is learnable. Only training examples are used. Writes headroom.json into the run directory;
    the next report shows it.

    Examples:
      pacevlm headroom --run-dir runs/mine
      pacevlm headroom --run-dir runs/mine --num-examples 2000 --num-moved 0 --margin 1.2
    """
    options = parse_options(headroom, HeadroomOptions, arguments)
    from pacevlm.evaluation.headroom_summary import format_headroom
    from pacevlm.pipeline.headroom import run_headroom

    with RichReporter() as reporter:
        results = run_headroom(options.run_dir, options.settings, reporter)
    print("\n" + format_headroom(results), end="")


@dataclass(frozen=True)
class StudyOptions:
    """How much of a study to make.

    Attributes:
        small: a first look of some twenty minutes: one profile, two seeds, 500 questions and 200 steps.
        settings: how much is made.
    """

    small: bool = False
    settings: Annotated[StudyConfig, tyro.conf.arg(name="")] = field(default_factory=StudyConfig)


def study(arguments: Sequence[str]) -> None:
    """Train controllers of several seeds under several profiles, and judge them with every other policy.

    Latencies are replayed: predictions, off by what the profile's measurements were off by. Writes worth.json into the
    study directory; a second start does what is missing, and goes on where the first was stopped.

    Examples:
      pacevlm study --small
      pacevlm study --study-dir runs/study --traffics crossed --num-seeds 3
      pacevlm study --ablations no-latency-token reinforce
    """
    default = StudyOptions(small=True, settings=SMALL_STUDY) if "--small" in arguments else None
    options = parse_options(study, StudyOptions, arguments, default=default)
    find_model_folder(options.settings.model)
    from pacevlm.evaluation.worth import format_worth
    from pacevlm.pipeline.study import run_study

    with RichReporter() as reporter:
        worth = run_study(options.settings, reporter)
    print("\n" + format_worth(worth), end="")
    print(f"\nall tables: {printable(options.settings.study_dir / 'worth.json')}")


@dataclass(frozen=True)
class ReportOptions:
    """Which evaluation to show.

    Attributes:
        run_dir: folder of the run.
    """

    run_dir: Path = DEFAULT_DIR


def report(arguments: Sequence[str]) -> None:
    """Print the table of a finished evaluation and draw its figures and report again.

    Nothing is evaluated again, so of a settings file only run_dir counts.

    Examples:
      pacevlm report --run-dir runs/quickstart
    """
    file, run_dir = _find_run(arguments, DEFAULT_DIR)
    options = parse_settings(report, arguments, ReportOptions(run_dir)).settings
    from pacevlm.pipeline.lock import one_writer
    from pacevlm.pipeline.outputs import draw_outputs, read_outputs
    from pacevlm.pipeline.run_config import load_run_config

    read_outputs(options.run_dir)  # or there is nothing to lock and draw
    config = load_run_config(options.run_dir)
    if file is not None:
        file.on_top_of(config)  # refuses what is wrong in it, though only the run directory counts
    with one_writer(options.run_dir):
        draw_outputs(config)
    print_results(config)


@dataclass(frozen=True)
class SampleOptions:
    """Which picture of the embedded data set, and where it goes.

    Attributes:
        path: file to write, which ends in .png.
        index: which picture of the test split; every number gives another one.
        seed: which examples are composed, as `--data.seed` of a run.
        overwrite: replace a file of this name that holds something else.

    Raises:
        ConfigError: the path is no PNG's, or a number is outside its range.
    """

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")] = "scene.png"
    index: int = SAMPLE_INDEX
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_path("path", self.path)
        if not self.path.lower().endswith(".png"):
            raise ConfigError(f"path is {self.path!r}, but the picture is a PNG; give a name that ends in .png")
        check_whole(self, 0, MAX_COUNT - 1, "index")
        check_whole(self, 0, MAX_SEED, "seed")


def sample(arguments: Sequence[str]) -> None:
    """Write a picture of the embedded data set, with a question about it to ask.

    The same numbers always give the same picture and question; no training has seen the scans that it shows.

    Examples:
      pacevlm sample
      pacevlm sample pictures/seven.png --index 7
    """
    options = parse_options(sample, SampleOptions, arguments)
    from pacevlm.data.digit_tasks import load_digits
    from pacevlm.files import write_new

    example = load_digits("test", options.index + 1, seed=options.seed)[options.index]
    content = io.BytesIO()
    example.image.save(content, "PNG")
    write_new(options.path, content.getvalue(), overwrite=options.overwrite)
    print(f"{options.path}\nquestion: {example.question}\nanswer: {example.references[0]}")
    image = f"./{options.path}" if options.path.startswith("-") else options.path  # or it would be taken for an option
    print("\nask it once `pacevlm quickstart` is done:")
    print("  " + shlex.join(["pacevlm", "answer", image, example.question, "--budget-ms", SAMPLE_BUDGET_MS]))


@dataclass(frozen=True)
class AnswerOptions:
    """A question about an image.

    Attributes:
        words: path of the image, if there is one, and what to ask.
        budget_ms: latency budget of the whole request, in milliseconds.
        price: what time is worth below the budget, in points of accuracy for one full latency; 0 spends the budget
            wherever that may help. What was calibrated if None; see `pacevlm prices`.
        run_dir: folder of a trained run, or a bundle.
        device: `cpu`, or `cuda` with an optional number; the one that was profiled.
        drift_state: file that remembers, from answer to answer, how much slower the machine is than profiled; bounds
            are corrected by it. It is made if missing; without this option nothing is corrected.
        json: print one JSON object instead of text.
    """

    words: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[IMAGE] QUESTION")]
    budget_ms: float
    price: float | None = None
    run_dir: Path = QUICKSTART_DIR
    device: str = "cpu"
    drift_state: Path | None = None
    json: bool = False


def answer(arguments: Sequence[str]) -> None:
    """Answer one question, about one image or about none, within a latency budget.

    Prints the answer, the knobs that ran and the milliseconds of every stage. Loading the model is not part of the
    budget; one small request runs first, so that the measured one finds everything warm.

    Examples:
      pacevlm answer kitchen.png "How many cups are on the table?" --budget-ms 80
      pacevlm answer kitchen.png "What colour is the kettle?" --budget-ms 40 --run-dir runs/mine --json
      pacevlm answer kitchen.png "Is it on?" --budget-ms 80 --drift-state runs/mine/drift.json
      pacevlm answer kitchen.png "Is it on?" --budget-ms 80 --price 10
      pacevlm answer "Which is larger, 7 or 12?" --budget-ms 80
    """
    options = parse_options(answer, AnswerOptions, arguments)
    from pacevlm.images import open_picture
    from pacevlm.knobs import check_budget_ms, check_price

    budget_ms = check_budget_ms(options.budget_ms)
    price = None if options.price is None else check_price(options.price)
    if not options.words:
        raise QuestionError("no question was given; ask one in quotes, behind the path of its image if it has one")
    *images, question = options.words
    if len(images) > 1:
        raise QuestionError(
            f"{len(images)} images were given for one question; give at most one, and put the question in quotes"
        )
    image = images[0] if images else None
    if image is not None:
        open_picture(image)  # before the model loads, which takes seconds
    elif Path(question).is_file():
        raise QuestionError(f"{question!r} is a file; give the question behind it")
    from pacevlm.pacer import Pacer

    pacer = Pacer.from_pretrained(options.run_dir, device=options.device)
    pacer.answer(image, question, budget_ms, price=price)
    if options.drift_state is None:
        print_answer(pacer.answer(image, question, budget_ms, price=price), as_json=options.json)
        return
    # After the warm-up, which would look like a slow machine.
    pacer.track_drift(options.drift_state)
    result = pacer.answer(image, question, budget_ms, price=price)
    print_answer(result, as_json=options.json, with_drift=True)
    pacer.save_drift()


@dataclass(frozen=True)
class PricesOptions:
    """Which prices of time to show.

    Attributes:
        run_dir: folder of a trained run, or a bundle.
        mean_ms: find the lowest price that brings the mean latency down to so many milliseconds.
        points: find the highest price that costs at most so many points of accuracy.
    """

    run_dir: Path = QUICKSTART_DIR
    mean_ms: float | None = None
    points: float | None = None


def prices(arguments: Sequence[str]) -> None:
    """Show what prices of time cost and save, or find the one for a mean latency or a loss of accuracy.

    As measured on validation examples once the controller was trained, where the budget hardly ever binds, on the
    machine as profiled.

    Examples:
      pacevlm prices --run-dir runs/mine
      pacevlm prices --run-dir runs/mine --mean-ms 40
      pacevlm prices --run-dir runs/mine --points 0.5
    """
    options = parse_options(prices, PricesOptions, arguments)
    from pacevlm.pacer import read_prices

    table = read_prices(options.run_dir)
    if options.mean_ms is None and options.points is None:
        print_prices(table)
    else:
        print_prices(table, table.choose(mean_ms=options.mean_ms, points=options.points))


def importance(arguments: Sequence[str]) -> None:
    """Measure which transformer blocks a model can best do without, and store the order in its elastic.json.

    Every block is left out alone, then the least important ones together, always on the same examples. A model needs
    this once before its num_blocks can be chosen by importance. It says beforehand what that takes. Where examples have
    groups, such as tasks, it says how far their own orders agree with that of all.

    Examples:
      pacevlm importance --path ./MolmoE-1B --dataset questions.jsonl --num-examples 500
      pacevlm importance --path ./MolmoE-1B --dataset docvqa.jsonl --name docvqa
      pacevlm train --run-dir runs/mine --model.path ./MolmoE-1B --model.block-order docvqa
    """
    file = given_file(arguments, lambda path: read_config_file(path, (("path",), ("dataset",))))
    options = parse_settings(importance, arguments, ImportanceConfig(), file, _switch("plan", PLAN_HELP))
    config = options.settings
    folder = find_model_folder(config.path)
    from pacevlm.models.elastic import ELASTIC_FILE
    from pacevlm.pipeline.importance import measure_order, plan_order

    if options.plan:
        print_importance_plan(plan_order(config))
        return
    with RichReporter() as reporter:
        result = measure_order(config, reporter)
    print_importance(result)
    called = "" if config.name is None else f", as --model.block-order {config.name}"
    print(f"\nthe order is in {printable(folder / ELASTIC_FILE)}{called}")


@dataclass(frozen=True)
class InspectOptions:
    """Which model to look at.

    Attributes:
        path: a model directory, `embedded`, a hub id such as allenai/MolmoE-1B-0924, or the folder of one in a hub
            cache.
        block_order: which blocks would be left out first, as `--model.block-order` of a run.
    """

    path: tyro.conf.Positional[str]
    block_order: str = "importance"


def inspect(arguments: Sequence[str]) -> int:
    """Say what a model directory holds, whether it will run, and what its tiers cost; reads no weights.

    Looks for missing, extra and misshapen tensors, and names the knobs and the block order that a run would have. The
    exit code is 0 if it will run.

    Examples:
      pacevlm inspect ./MolmoE-1B
      pacevlm inspect allenai/MolmoE-1B-0924 --block-order early_exit
    """
    options = parse_options(inspect, InspectOptions, arguments)
    check_path("path", options.path)
    find_model_folder(options.path)
    from pacevlm.models.inspection import inspect_checkpoint

    found = inspect_checkpoint(options.path, options.block_order)
    print_inspection(found)
    return USAGE_ERROR if found.problems else 0


def serve(arguments: Sequence[str]) -> None:
    """Answer requests over HTTP, each within its budget, time in the queue included; OpenAI's clients fit.

    Says where it listens once the model is loaded and warm. SIGTERM and Ctrl-C finish what was accepted. Objectives,
    metrics and errors are in docs/serving.md.

    Examples:
      pacevlm serve --run-dir runs/mine
      pacevlm serve --run-dir runs/mine --host 0.0.0.0 --port 8080
      pacevlm serve --image-hosts images.example.org upload.example.org
    """
    from pacevlm.server.config import ServeConfig

    config = parse_options(serve, ServeConfig, arguments)
    from pacevlm.server.run import run_server

    run_server(config, lambda address: print(f"listening on {address}", flush=True))
    print("stopped; what was accepted is finished")


def capacity(arguments: Sequence[str]) -> None:
    """Say how many devices answer so many requests a second in time, by a simulation of the server's queue.

    Requests are like the run's test questions, and take what they are predicted to on the profiled device, off by what
    its profile was off by. Each device has a queue of its own. Nothing is run but what is not known yet of the test
    questions.

    Examples:
      pacevlm capacity --requests-per-s 100 --budgets-ms 150
      pacevlm capacity --run-dir runs/mine --requests-per-s 40 --budgets-ms 50 100 200 --kept 0.95
      pacevlm capacity --requests-per-s 100 --budgets-ms 150 --policy full
    """
    from pacevlm.server.capacity import CapacityConfig

    options = parse_options(capacity, CapacityConfig, arguments)
    from pacevlm.server.capacity import format_capacity, plan_capacity
    from pacevlm.server.simulation import Traffic

    with RichReporter() as reporter:
        traffic = Traffic.of_run(options.run_dir, reporter)
    print("\n" + format_capacity(plan_capacity(traffic, options), options), end="")


# Each returns its exit code, or None for 0.
COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "quickstart": quickstart,
    "profile": profile,
    "headroom": headroom,
    "train": train,
    "evaluate": evaluate,
    "report": report,
    "rebase": rebase,
    "study": study,
    "sample": sample,
    "answer": answer,
    "prices": prices,
    "importance": importance,
    "inspect": inspect,
    "serve": serve,
    "capacity": capacity,
}


# What works on several ranks. The others run no rollouts.
ON_RANKS = frozenset(
    ("quickstart", "profile", "headroom", "train", "evaluate", "rebase", "study", "importance", "capacity")
)


# Entry ---------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    with _forgiving_streams():
        try:
            code = _run_command(arguments)
            # Here, because Python would complain of a full disk or a closed pipe when it flushes at exit.
            sys.stdout.flush()
            return code
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 0
        except (Exception, KeyboardInterrupt) as error:
            if debug and not isinstance(error, BrokenPipeError):
                raise
            return _end_early(error, arguments)


def _run_command(arguments: Sequence[str]) -> int:
    launch = read_launch()
    rolls_out = bool(arguments) and arguments[0] in ON_RANKS and not _ONLY_SHOWN.intersection(arguments)
    if launch is not None and launch.rank > 0:
        if rolls_out:
            from pacevlm.pipeline.helper_rank import help_rank_0

            help_rank_0(launch)
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else USAGE_ERROR
    if arguments[0] == "--version":
        print(f"pacevlm {_version()}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        raise ConfigError(f"there is no command {name!r}; use one of {', '.join(COMMANDS)}, or --help")
    if launch is None or _ONLY_SHOWN.intersection(rest):
        with stopping_on_signals():
            return COMMANDS[name](rest) or 0
    if not rolls_out:
        raise ConfigError(
            f"{name} runs in one process, but {launch.num_ranks} were started; start it without torchrun or accelerate "
            f"(several ranks help {', '.join(command for command in COMMANDS if command in ON_RANKS)})"
        )
    from pacevlm.rollout.ranks import leading
    from pacevlm.rollout.wire import Wire

    wire = Wire(launch)  # a signal while ranks wait for each other ends this one at once
    with stopping_on_signals(), leading(wire):
        return COMMANDS[name](rest) or 0


def _end_early(error: BaseException, arguments: Sequence[str]) -> int:
    """Say in one sentence why a command ends before it is done; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        number = error.signal if isinstance(error, Stopped) else signal.SIGINT
        how = "the same command without --fresh" if "--fresh" in arguments else "the same command"
        with suppress(OSError):  # a terminal that was closed takes no more
            print(f"\nstopped by {number.name}; {how} goes on where it stopped", file=sys.stderr)
        return SIGNALLED + number
    if isinstance(error, BrokenPipeError):  # whoever read the output, such as `head`, has enough
        _drop_output()
        return PIPE_CLOSED
    if isinstance(error, PacevlmError):
        return _fail(str(error))
    if isinstance(error, ModuleNotFoundError) and error.name is not None and not error.name.startswith("pacevlm"):
        return _fail(
            f"{error.name} is not installed; pip install 'pacevlm[cpu,digits,report,serve,train]' installs all of it"
        )
    if isinstance(error, OSError):
        # The package's own files raise StorageError and the like: this is the output, or a path that cannot be used.
        what = "the output" if error.filename is None else repr(error.filename)
        if error.filename is None:
            _drop_output()
        return _fail(f"{what} cannot be read or written: {error.strerror or error}")
    _fail(f"a fault of pacevlm itself, {type(error).__name__}: {error}; run again with --debug to see where")
    return FAULT


@contextmanager
def _forgiving_streams() -> Iterator[None]:
    """Let nothing that is printed fail for its encoding, or for a stream that was closed before the start."""
    before = sys.stdout, sys.stderr
    errors = [getattr(stream, "errors", None) for stream in before]
    with ExitStack() as stack:
        for name, stream in zip(("stdout", "stderr"), before, strict=True):
            if stream is None:
                setattr(sys, name, stack.enter_context(open(os.devnull, "w", encoding="utf-8")))
            elif isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            for stream, handling in zip(before, errors, strict=True):
                if isinstance(stream, io.TextIOWrapper) and not stream.closed:
                    stream.reconfigure(errors=handling)


def _drop_output() -> None:
    """Send what is still to be written to stdout nowhere, so that Python does not complain once more at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def usage() -> str:
    """The top-level help."""
    lines = [
        "usage: pacevlm [--version] [--debug] COMMAND [OPTIONS]",
        "",
        "Learns, for each request, how much of a frozen vision-language mixture-of-experts model to run within a",
        "latency budget.",
        "",
        "commands:",
        *(f"  {name:<12} {(function.__doc__ or '').splitlines()[0]}" for name, function in COMMANDS.items()),
        "",
        "options:",
        "  -h, --help   show this help; `pacevlm COMMAND --help` lists all settings with defaults and units",
        "  --version    show the version",
        "  --debug      show the traceback of an error",
        "",
        "examples:",
        "  pacevlm quickstart",
        "  pacevlm train --run-dir runs/mine --model.path ./MolmoE-1B --data.dataset questions.jsonl",
        "  pacevlm evaluate --run-dir runs/mine",
        '  pacevlm answer kitchen.png "How many cups are on the table?" --budget-ms 80 --run-dir runs/mine',
    ]
    return "\n".join(lines)


def _fail(message: str) -> int:
    with suppress(OSError):  # nobody reads it, or there is no room for it: the exit code still tells
        print(f"pacevlm: error: {printable(message)}", file=sys.stderr, flush=True)
    return USAGE_ERROR


def _version() -> str:
    try:
        return metadata.version("pacevlm")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


# Settings ------------------------------------------------------------------------------------------------------------


def _run_steps(
    command: str,
    arguments: Sequence[str],
    default_dir: Path,
    defaults: Callable[[Path], RunConfig],
    until: Literal["profile", "calibrate", "evaluate"],
) -> RunConfig | None:
    """Parse the settings of a run, on top of those its directory holds, and run its steps; None if that was planned."""
    config, fresh, plan = _read_settings(command, arguments, default_dir, defaults)
    if plan:
        from pacevlm.pipeline.plan import plan_run

        with RichReporter() as reporter:
            planned = plan_run(config, until, fresh=fresh, reporter=reporter)
        print_plan(planned)
        return None
    if command == "evaluate" and not (config.run_dir / "steps.json").exists():
        run_dir = config.run_dir
        raise ConfigError(f"{run_dir} holds no run; train one with `pacevlm train --run-dir {run_dir}` first")
    find_model_folder(config.model.path)
    from pacevlm.pipeline import run_pipeline

    with RichReporter() as reporter:
        run_pipeline(
            config,
            until,
            fresh=fresh,
            reporter=reporter,
            command=printable(shlex.join(["pacevlm", command, *arguments])),
        )
    return config


def _answer_sample(config: RunConfig) -> None:
    """Answer the first test question with the bundle, as a user would."""
    from pacevlm.data.splits import load_splits
    from pacevlm.pacer import Pacer

    example = load_splits(config.data, config.picture).test[0]
    pacer = Pacer.from_pretrained(config.run_dir, device=config.model.device)
    budget_ms = round(0.8 * pacer.full_p50_ms, 1)
    pacer.answer(example.source, example.question, budget_ms)
    question, reference = printable(example.question), printable(example.references[0])
    print(f"\nsample question: {question} (reference answer: {reference})")
    print_answer(pacer.answer(example.source, example.question, budget_ms))


def _read_settings(
    command: str, arguments: Sequence[str], default_dir: Path, defaults: Callable[[Path], RunConfig]
) -> tuple[RunConfig, bool, bool]:
    """The settings of a run, whether it starts over, and whether it is only planned; torch is not needed for that."""
    from pacevlm.pipeline.run_config import load_run_config

    file, run_dir = _find_run(arguments, default_dir)
    config = defaults(run_dir)
    if (run_dir / "config.json").exists() and "--fresh" not in arguments:
        config = load_run_config(run_dir)
    options = parse_settings(
        COMMANDS[command], arguments, config, file, _switch("fresh", FRESH_HELP), _switch("plan", PLAN_HELP)
    )
    return options.settings, options.fresh, options.plan


def _switch(name: str, description: str) -> tuple[str, Any, Any]:
    """An option of a command that is no setting."""
    return name, Annotated[bool, tyro.conf.arg(help=description)], dataclasses.field(default=False)


def _find_run(arguments: Sequence[str], default_dir: Path) -> tuple[ConfigFile | None, Path]:
    """The settings file on a command line, and the run directory that the command line, or else the file, names."""
    from pacevlm.pipeline.run_config import read_run_file

    file = given_file(arguments, read_run_file)
    named = None if file is None else file.values.get("run_dir")
    return file, given_run_dir(arguments) or Path(named or default_dir)
