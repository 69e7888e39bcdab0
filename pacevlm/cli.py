"""The command line: parse, build, call. What needs torch loads inside the commands."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from pacevlm.config import ImportanceConfig
from pacevlm.errors import ConfigError, PacevlmError

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import TaskID

    from pacevlm.pacer import Answer
    from pacevlm.pipeline import RunConfig

OptionsT = TypeVar("OptionsT")

QUICKSTART_DIR = Path("runs/quickstart")
DEFAULT_DIR = Path("runs/default")

FRESH_HELP = "start over: remove what an earlier run left in the run directory, and its settings."

# Exit codes: 0 done, 1 a fault of pacevlm itself, 2 what the user gave cannot be used, 130 interrupted.
USAGE_ERROR, INTERRUPTED, PIPE_CLOSED = 2, 130, 141


# Commands ------------------------------------------------------------------------------------------------------------


def quickstart(arguments: Sequence[str]) -> None:
    """Profile, train and evaluate on the embedded model and data: about ten minutes on two CPU cores.

    Everything it finds is in the run directory, the report in report.html. A second start goes on where the first was
    stopped and skips what is done.

    Examples:
      pacevlm quickstart
      pacevlm quickstart --run-dir /tmp/first --train.steps 300 --evaluate.num-timed 100
      pacevlm quickstart --fresh
    """
    from pacevlm.pipeline import quickstart_config

    config = _run_steps("quickstart", arguments, QUICKSTART_DIR, quickstart_config, "evaluate")
    _print_results(config)
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
    """
    from pacevlm.pipeline import RunConfig

    config = _run_steps("train", arguments, DEFAULT_DIR, RunConfig, "calibrate")
    print(f"\ncontroller, guardrail and estimator: {config.run_dir / 'bundle'}")


def evaluate(arguments: Sequence[str]) -> None:
    """Run the controller and all baselines on the same test examples and budgets, with measured latency.

    Accuracies come from all test examples, latencies from `--evaluate.num-timed` of them, one request at a time in
    random order. Writes results.json, records.jsonl, pareto.png, knobs.png and report.html into the run directory.

    Examples:
      pacevlm evaluate --run-dir runs/mine
      pacevlm evaluate --run-dir runs/mine --evaluate.budgets 0.4 0.6 0.8 1.0 --evaluate.num-timed 200
    """
    from pacevlm.pipeline import RunConfig

    run_dir = _given_run_dir(arguments) or DEFAULT_DIR
    if not {"-h", "--help"} & set(arguments) and not (run_dir / "steps.json").exists():
        raise ConfigError(f"{run_dir} holds no run; train one with `pacevlm train --run-dir {run_dir}` first")
    _print_results(_run_steps("evaluate", arguments, DEFAULT_DIR, RunConfig, "evaluate"))


@dataclass(frozen=True)
class ReportOptions:
    """Which evaluation to show.

    Attributes:
        run_dir: folder of the run.
    """

    run_dir: Path = DEFAULT_DIR


def report(arguments: Sequence[str]) -> None:
    """Print the table of a finished evaluation and draw its figures and report again.

    Examples:
      pacevlm report --run-dir runs/quickstart
    """
    options = _parse("report", ReportOptions, arguments)
    from pacevlm.config import config_to_dict, load_config
    from pacevlm.data.splits import load_splits
    from pacevlm.pipeline import RunConfig
    from pacevlm.pipeline.outputs import draw_outputs, read_outputs

    results, records = read_outputs(options.run_dir)
    config = load_config(options.run_dir / "config.json", RunConfig)
    examples = list(load_splits(config.data).test)
    draw_outputs(options.run_dir, results, records, examples=examples, config=config_to_dict(config))
    _print_results(config)


@dataclass(frozen=True)
class AnswerOptions:
    """A question about an image.

    Attributes:
        image: path of the image.
        question: what to ask.
        budget_ms: latency budget of the whole request, in milliseconds.
        run_dir: folder of a trained run, or a bundle.
        device: `cpu`, or `cuda` with an optional number; the one that was profiled.
        drift_state: file that remembers, from answer to answer, how much slower the machine is than profiled; bounds
            are corrected by it. It is made if missing; without this option nothing is corrected.
        json: print one JSON object instead of text.
    """

    image: tyro.conf.Positional[Path]
    question: tyro.conf.Positional[str]
    budget_ms: float
    run_dir: Path = QUICKSTART_DIR
    device: str = "cpu"
    drift_state: Path | None = None
    json: bool = False


def answer(arguments: Sequence[str]) -> None:
    """Answer one question about one image within a latency budget.

    Prints the answer, the knobs that ran and the milliseconds of every stage. Loading the model is not part of the
    budget; one small request runs first, so that the measured one finds everything warm.

    Examples:
      pacevlm answer kitchen.png "How many cups are on the table?" --budget-ms 80
      pacevlm answer kitchen.png "What colour is the kettle?" --budget-ms 40 --run-dir runs/mine --json
      pacevlm answer kitchen.png "Is it on?" --budget-ms 80 --drift-state runs/mine/drift.json
    """
    options = _parse("answer", AnswerOptions, arguments)
    from pacevlm.images import open_picture
    from pacevlm.knobs import check_budget_ms
    from pacevlm.pacer import Pacer

    budget_ms = check_budget_ms(options.budget_ms)
    image = options.image
    open_picture(image)  # says what is wrong with it before the model is loaded
    pacer = Pacer.from_pretrained(options.run_dir, device=options.device)
    pacer.answer(image, options.question, budget_ms)
    if options.drift_state is None:
        _print_answer(pacer.answer(image, options.question, budget_ms), as_json=options.json)
        return
    # After the warm-up, which would look like a slow machine.
    pacer.track_drift(options.drift_state)
    _print_answer(pacer.answer(image, options.question, budget_ms), as_json=options.json, with_drift=True)
    pacer.save_drift()


def importance(arguments: Sequence[str]) -> None:
    """Measure which transformer blocks a model can best do without, and store the order in its elastic.json.

    Every block is left out alone, then the least important ones together, always on the same examples. A model needs
    this once before its num_blocks can be chosen by importance.

    Examples:
      pacevlm importance --path ./MolmoE-1B --dataset questions.jsonl --num-examples 500
    """
    config = _parse("importance", ImportanceConfig, arguments)
    from pacevlm.config import DataConfig, ModelConfig
    from pacevlm.data.splits import load_splits
    from pacevlm.evaluation.importance import measure_importance
    from pacevlm.models.embedded import EMBEDDED_DIR
    from pacevlm.pipeline import load_elastic_model

    model_config = ModelConfig(path=config.path, dtype=config.dtype, device=config.device, block_policy="prefix")
    model = load_elastic_model(model_config)
    data = load_splits(DataConfig(config.dataset, num_val=config.num_examples, seed=config.seed))
    examples = list(data.val if config.dataset == "digits" else data.train)[: config.num_examples]
    with _RichReporter() as reporter:
        result = measure_importance(
            model,
            examples,
            config.min_num_blocks,
            num_candidates=config.num_candidates,
            progress=lambda done, total: reporter.progress("sets of blocks", done, total),
        )
    folder = EMBEDDED_DIR if config.path == "embedded" else Path(config.path)
    result.save(folder, f"{data.name}, {len(examples)} examples, seed {config.seed}")
    print(f"{'without blocks':<40}  accuracy %   lost %")
    for figure in (result.full, *result.greedy):
        removed = ", ".join(map(str, figure.removed)) or "none"
        lost = figure.accuracy_lost.to_dict()["mean"]
        print(f"{removed:<40}  {100 * figure.accuracy.to_dict()['mean']:>10.1f}  {100 * lost:>7.1f}")
    print(f"\nthe order is in {folder / 'elastic.json'}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "quickstart": quickstart,
    "profile": profile,
    "train": train,
    "evaluate": evaluate,
    "report": report,
    "answer": answer,
    "importance": importance,
}


# Entry ---------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else USAGE_ERROR
    if arguments[0] == "--version":
        print(f"pacevlm {_version()}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail(f"there is no command {name!r}; use one of {', '.join(COMMANDS)}, or --help")
    try:
        COMMANDS[name](rest)
    except PacevlmError as error:
        if debug:
            raise
        return _fail(str(error))
    except KeyboardInterrupt:
        if debug:
            raise
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    return 0


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
    print(f"pacevlm: error: {message}", file=sys.stderr)
    return USAGE_ERROR


def _version() -> str:
    try:
        return metadata.version("pacevlm")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


# Settings ------------------------------------------------------------------------------------------------------------


def _parse(
    command: str,
    kind: type[OptionsT],
    arguments: Sequence[str],
    *,
    default: OptionsT | None = None,
) -> OptionsT:
    """Options of a command; exits with a message if they are unknown or malformed, or if help was asked for."""
    settings: dict[str, Any] = {} if default is None else {"default": default}
    description = inspect.cleandoc(COMMANDS[command].__doc__ or "")
    return tyro.cli(  # type: ignore[no-any-return]
        kind,
        prog=f"pacevlm {command}",
        description=description,
        args=list(arguments),
        config=(tyro.conf.FlagCreatePairsOff,),
        **settings,
    )


def _run_steps(
    command: str,
    arguments: Sequence[str],
    default_dir: Path,
    defaults: Callable[[Path], RunConfig],
    until: Literal["profile", "calibrate", "evaluate"],
) -> RunConfig:
    """Parse the settings of a run, on top of those its directory holds, and run its steps."""
    from pacevlm.config import load_config
    from pacevlm.pipeline import RunConfig, run_pipeline

    run_dir = _given_run_dir(arguments) or default_dir
    stored = run_dir / "config.json"
    fresh = "--fresh" in arguments
    config = defaults(run_dir)
    if stored.exists() and not fresh:
        config = dataclasses.replace(load_config(stored, RunConfig), run_dir=run_dir)

    # Made here, because its fields are of types that load torch.
    options_type = dataclasses.make_dataclass(
        "RunOptions",
        [
            ("config", Annotated[RunConfig, tyro.conf.arg(name="")]),
            ("fresh", Annotated[bool, tyro.conf.arg(help=FRESH_HELP)], dataclasses.field(default=False)),
        ],
        frozen=True,
    )
    options: Any = _parse(command, options_type, arguments, default=options_type(config))
    with _RichReporter() as reporter:
        run_pipeline(
            options.config,
            until,
            fresh=options.fresh,
            reporter=reporter,
            command=shlex.join(["pacevlm", command, *arguments]),
        )
    result: RunConfig = options.config
    return result


def _given_run_dir(arguments: Sequence[str]) -> Path | None:
    """The run directory on a command line, read before the rest because its stored settings are the defaults."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--run-dir", "--run_dir"):
            if equals:
                return Path(value)
            return Path(arguments[i + 1]) if i + 1 < len(arguments) else None
    return None


# Output --------------------------------------------------------------------------------------------------------------


class _RichReporter:
    """Progress bars with the time left on stderr, and a line for every step that ends; see `pipeline.Reporter`."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True, highlight=False)
        self._bars = Progress(
            TextColumn("  {task.description:<20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _RichReporter:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def started(self, step: str) -> None:
        self._say(f"[bold]{step}[/bold]")

    def skipped(self, step: str, facts: Mapping[str, Any]) -> None:
        self._say(f"[bold]{step}[/bold] is done already: {_describe(step, facts)}")

    def finished(self, step: str, seconds: float, facts: Mapping[str, Any]) -> None:
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks.clear()
        self._say(f"  {_describe(step, facts)} [dim]({_duration(seconds)})[/dim]")

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        if what not in self._tasks:
            # What another piece of work showed is over.
            for task in self._tasks.values():
                self._bars.remove_task(task)
            self._tasks = {what: self._bars.add_task(what, total=total, note=note)}
        self._bars.update(self._tasks[what], completed=done, total=total, note=note)

    def _say(self, text: str) -> None:
        self._console.print(text)


def _describe(step: str, facts: Mapping[str, Any]) -> str:
    """What a finished step found, in one line."""
    if step == "profile":
        text = (
            f"{facts['num_samples']} requests timed; the full model takes {facts['full_p50_ms']['e2e']:.1f} ms (median)"
        )
        coverage = "" if facts["coverage"] is None else f", {100 * facts['coverage']:.0f} % within their bound"
        noise = f"one request repeated varies by {100 * facts['noise_cv']:.1f} %"
        if facts["num_noisy_windows"]:
            noise += f", {facts['num_noisy_windows']} windows were noisy"
        return f"{text}; predictions are off by {100 * facts['ape_p50']:.1f} % (median){coverage}; {noise}"
    if step == "lookup":
        return (
            f"{facts['num_examples']} training examples with every configuration; accuracy "
            f"{100 * facts['accuracy_full']:.1f} % full, {100 * facts['accuracy_cheapest']:.1f} % cheapest"
        )
    if step == "train":
        return f"{facts['num_steps']} steps; reward {facts['reward']:.3f}, entropy {facts['entropy']:.2f}"
    if step == "calibrate":
        factors = ", ".join(f"{group} {factor:.2f}" for group, factor in facts["factors"].items())
        return f"{facts['num_requests']} requests timed; bounds are predictions times {factors}"
    text = f"{facts['num_examples']} test examples, {facts['num_timed_requests']} timed requests"
    if facts["num_disagreements"]:
        text += f", of which {facts['num_disagreements']} scored otherwise than in the batch"
    return text


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _print_results(config: RunConfig) -> None:
    from pacevlm.evaluation.summary import format_summary
    from pacevlm.pipeline.outputs import REPORT_NAME, read_outputs

    results, _ = read_outputs(config.run_dir)
    print("\n" + format_summary(results), end="")
    print(f"\nreport: {config.run_dir / REPORT_NAME}")


def _answer_sample(config: RunConfig) -> None:
    """Answer the first test question with the bundle, as a user would."""
    from pacevlm.data.splits import load_splits
    from pacevlm.pacer import Pacer

    example = load_splits(config.data).test[0]
    pacer = Pacer.from_pretrained(config.run_dir, device=config.model.device)
    budget_ms = round(0.8 * pacer.full_p50_ms, 1)
    pacer.answer(example.source, example.question, budget_ms)
    print(f"\nsample question: {example.question} (reference answer: {example.references[0]})")
    _print_answer(pacer.answer(example.source, example.question, budget_ms))


def _print_answer(result: Answer, *, as_json: bool = False, with_drift: bool = False) -> None:
    if as_json:
        bound_ms = result.upper_bound_ms if math.isfinite(result.upper_bound_ms) else None
        values = {**dataclasses.asdict(result), "knobs": str(result.knobs), "upper_bound_ms": bound_ms}
        print(json.dumps(values, allow_nan=False))
        return
    knobs, times = result.knobs, result.times
    if not result.feasible:
        kept = f"no: {result.why_infeasible}; the cheapest knobs ran"
    else:
        kept = "yes" if result.budget_met else "no"
    rows = {
        "answer": result.answer,
        "knobs": f"{knobs}  (tier {knobs.tier}, top_k {knobs.top_k}, num_blocks {knobs.num_blocks})",
        "latency": f"{result.measured_ms:.1f} ms of {result.budget_ms:g} ms; predicted {result.predicted_ms:.1f} ms, "
        + (f"at most {result.upper_bound_ms:.1f} ms" if math.isfinite(result.upper_bound_ms) else "nothing promised"),
        "budget met": kept,
        "stages": f"read {times.read_ms:.1f}, prepare {times.prepare_ms:.1f}, stage 1 {times.stage1_ms:.1f}, "
        f"vision {times.vision_ms:.1f}, first block and stage 2 {times.first_block_ms:.1f}, "
        f"prefill {times.prefill_ms:.1f}, decode {sum(times.decode_ms):.1f} ms ({result.num_output_tokens} tokens)",
    }
    if with_drift:
        rows["drift"] = f"bounds were {result.drift_factor:.2f} times the profiled ones"
    for name, text in rows.items():
        print(f"  {name:<10}  {text}")
