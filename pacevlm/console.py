"""What the command line shows: progress and finished steps on stderr, results and answers on stdout."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pacevlm.printing import duration, printable

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import TaskID

    from pacevlm.evaluation.importance import ImportancePlan, ImportanceResult
    from pacevlm.evaluation.prices import PricePoint, PriceTable
    from pacevlm.models.inspection import Inspection
    from pacevlm.pipeline import RunConfig
    from pacevlm.pipeline.plan import RunPlan
    from pacevlm.types import Answer


class RichReporter:
    """Progress bars with the time left on stderr, and a line for every step that ends; see `pipeline.Reporter`."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True, highlight=False)
        self._bars = Progress(
            TextColumn("  {task.description:<20}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> RichReporter:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a terminal that was closed takes no more
            self._bars.stop()

    def missing(self, step: str, names: Sequence[str]) -> None:
        """Name the files of a finished step that are gone."""
        self._say((step, "bold"), f": {', '.join(names)} {'is' if len(names) == 1 else 'are'} gone and made again")

    def started(self, step: str) -> None:
        """Head what a step will show."""
        self._say((step, "bold"))

    def skipped(self, step: str, facts: Mapping[str, Any]) -> None:
        """Tell what a step found that was done before."""
        self._say((step, "bold"), f" is done already: {describe_step(step, facts)}")

    def warned(self, step: str, sentence: str) -> None:
        """Print a warning on a line of its own."""
        self._say(("  warning: ", "bold"), sentence)

    def told(self, step: str, sentence: str) -> None:
        """Print what is known of a step before it is done."""
        self._say((step, "bold"), f": {sentence}")

    def finished(self, step: str, seconds: float, facts: Mapping[str, Any]) -> None:
        """Take the step's bar away, and tell what it found and how long it took."""
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks.clear()
        ranks = describe_ranks(facts.get("ranks", ()), seconds)
        self._say(f"  {describe_step(step, facts)}{ranks} ", (f"({duration(seconds)})", "dim"))

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """Move the bar of a piece of work, or begin one in place of another's."""
        if what not in self._tasks:
            # What another piece of work showed is over.
            for task in self._tasks.values():
                self._bars.remove_task(task)
            self._tasks = {what: self._bars.add_task(what, total=total, note=note)}
        self._bars.update(self._tasks[what], completed=done, total=total, note=printable(note))

    def _say(self, *parts: str | tuple[str, str]) -> None:
        """Print one line, of plain texts and of texts with a style; what they hold is no markup."""
        from rich.text import Text

        styled = [(part, "") if isinstance(part, str) else part for part in parts]
        self._console.print(Text.assemble(*[(printable(text), style) for text, style in styled]))


def describe_step(step: str, facts: Mapping[str, Any]) -> str:
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
        text = f"{facts['num_requests']} requests timed; bounds are predictions times {factors}"
        return f"{text}; the default price of time is {facts['default_price']:g}"
    text = f"{facts['num_examples']} test examples, {facts['num_timed_requests']} timed requests"
    if facts["num_disagreements"]:
        text += f", of which {facts['num_disagreements']} scored otherwise than in the batch"
    return text


def describe_ranks(ranks: Sequence[Mapping[str, Any]], seconds: float) -> str:
    """What each rank did of a step; nothing where there is one, or none ran a rollout."""
    if not any(rank["num_rollouts"] for rank in ranks):
        return ""
    shares = [
        f"{rank['num_rollouts']:,} ({100 * rank['busy_seconds'] / max(seconds, 1e-9):.0f} % busy, "
        f"{rank['peak_bytes'] / 1e9:.1f} GB)"
        for rank in ranks
    ]
    return f"; rollouts of {len(ranks)} ranks: {', '.join(shares)}"


def print_plan(plan: RunPlan) -> None:
    """Print what every step of a run will take."""
    config, (num_train, num_val, num_test) = plan.config, plan.num_examples
    print(
        f"{printable(config.run_dir)}: {printable(config.model.path)}, {len(plan.space)} configurations; "
        f"{printable(config.data.dataset)}, {num_train:,} training, {num_val:,} validation, {num_test:,} test questions"
    )
    print(
        f"{'step':<10} {'requests timed':>14} {'rollouts':>12} {'run':>12} {'first blocks':>12} {'disk, MB':>9}  time"
    )
    for step in (*plan.steps, plan.total):
        counts = [
            f"{'≤ ' if figure.is_most and figure.value else ''}{figure.value:,.0f}"
            for figure in (step.num_timed, step.num_rollouts, step.num_run, step.num_prompts)
        ]
        if step.is_done:
            time = "nothing is left" if step.name == "total" else "done already"
        elif step.seconds is None:
            time = "not known before the profile"
        else:
            time = f"{'at most' if step.seconds.is_most else 'about'} {duration(step.seconds.value)}"
        print(
            f"{step.name:<10} {counts[0]:>14} {counts[1]:>12} {counts[2]:>12} {counts[3]:>12} "
            f"{step.num_bytes / 1e6:>8,.1f}  {time}"
        )
    print(
        "run: rollouts that the model has to give, the others are repeated or stored. First blocks: of prompts, for "
        "latency tokens"
    )
    if plan.latencies is None:
        print("no profile tells how long that takes: name one with --profile.source, or run `pacevlm profile` first")
        return
    rate = "no rate of rollouts is known beside it, so each takes what a request alone takes"
    if plan.rollouts_per_s is not None:
        rate = f"{plan.rollouts_per_s:,.1f} rollouts a second as measured beside it"
    print(
        f"times: {printable(plan.latencies)}, full configuration {plan.full_ms:.1f} ms, {rate}; without loading, the "
        "updates of training and the report"
    )


def print_importance_plan(plan: ImportancePlan) -> None:
    """Print what measuring a block order will take."""
    from pacevlm.pipeline.importance import describe_plan

    print(describe_plan(plan))
    print("how long that takes is said once the first answers are there")


def print_results(config: RunConfig) -> None:
    """Print a finished evaluation's table and where its report is; raises DataError if there is none."""
    from pacevlm.evaluation.summary import format_summary
    from pacevlm.pipeline.outputs import REPORT_NAME, read_outputs

    results, _ = read_outputs(config.run_dir)
    print("\n" + format_summary(results), end="")
    print(f"\nreport: {printable(config.run_dir / REPORT_NAME)}")


def print_prices(table: PriceTable, chosen: PricePoint | None = None) -> None:
    """Print what every price costs and saves, the default marked, or those of one price."""
    print(f"{'price':>6}  {'points lost':>22}  {'mean latency, ms':>24}")
    for point in table.points if chosen is None else (chosen,):
        cost = f"{point.cost.mean:.1f} [{point.cost.low:.1f}, {point.cost.high:.1f}]"
        mean, low, high = (
            table.full_ms * value for value in (point.latency.mean, point.latency.low, point.latency.high)
        )
        mark = "  default" if point.price == table.default_price else ""
        print(f"{point.price:>6g}  {cost:>22}  {f'{mean:.1f} [{low:.1f}, {high:.1f}]':>24}{mark}")
    print(
        f"price: points of accuracy for one full latency ({table.full_ms:.1f} ms); 95 % intervals, "
        f"{table.num_examples} validation examples"
    )


def print_importance(result: ImportanceResult) -> None:
    """Print what giving up blocks costs, and how far groups of questions agree on their order."""
    print(f"{'without blocks':<40}  accuracy %   lost %")
    for figure in (result.full, *result.greedy):
        removed = ", ".join(map(str, figure.removed)) or "none"
        print(f"{removed:<40}  {100 * figure.accuracy.mean:>10.1f}  {100 * figure.accuracy_lost.mean:>7.1f}")
    if not result.groups:
        return
    print("\nblocks by what each costs alone, the cheapest first; Spearman's correlation with all questions, 95 %")
    print(f"{'group':<12} {'n':>5}  {'correlation':>18}  {'as many of all':>18}  order")
    for group in result.groups:
        both = [
            "-" if found is None else f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"
            for found in (group.correlation, group.drawn)
        ]
        order = " ".join(map(str, group.order))
        print(f"{printable(group.name):<12} {group.num_examples:>5}  {both[0]:>18}  {both[1]:>18}  {order}")


def print_answer(result: Answer, *, as_json: bool = False, with_drift: bool = False) -> None:
    """Print an answer as a few named lines, or as one line of JSON."""
    if as_json:
        print(json.dumps(result.to_dict()))
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
        "price": f"{result.price:g} points of accuracy per full latency",
        "stages": f"read {times.read_ms:.1f}, prepare {times.prepare_ms:.1f}, stage 1 {times.stage1_ms:.1f}, "
        f"vision {times.vision_ms:.1f}, first block and stage 2 {times.first_block_ms:.1f}, "
        f"prefill {times.prefill_ms:.1f}, decode {sum(times.decode_ms):.1f} ms ({result.num_output_tokens} tokens)",
    }
    if with_drift:
        rows["drift"] = f"bounds were {result.drift_factor:.2f} times the profiled ones"
    for name, text in rows.items():
        print(f"  {name:<10}  {printable(text)}")


def print_inspection(found: Inspection) -> None:
    """Print what a checkpoint is as a few named lines, and what its tiers make of pictures as a table."""
    for name, text in _inspected(found).items():
        print(f"  {name:<11}  {printable(text)}")
    for sentence in found.problems:
        print(f"    - {printable(sentence)}")
    if found.model is None:
        return
    print(f"\n  {'picture':>11}  {'tier':<8}  {'units':>6}  {'image tokens':>12}  {'prompt tokens':>13}")
    for (width, height), sizes in found.vision.items():
        picture = f"{width} x {height}"
        if not sizes:
            print(f"  {picture:>11}  cannot be taken")
        for tier, vision in zip(found.model.knob_space.tiers, sizes, strict=False):
            tokens = vision.num_image_tokens
            prompt = tokens + found.num_text_tokens
            print(f"  {picture:>11}  {printable(tier):<8}  {vision.num_units:>6,}  {tokens:>12,}  {prompt:>13,}")
            picture = ""
    print(f"  units: what the vision encoder reads, crops or patches; the question is {found.question!r}")


def _inspected(found: Inspection) -> dict[str, str]:
    rows = {"folder": str(found.folder), "family": found.model_type}
    if found.layout is not None:
        rows["family"] += f", {found.layout} layout"
    if found.stored:
        dtypes = ", ".join(f"{count:,} tensors in {dtype}" for dtype, count in found.stored_dtypes.items())
        rows["files"] = f"{found.num_files} of safetensors, {_size(found.num_bytes)}; {dtypes}"
    if found.num_parameters:
        rows["parameters"] = f"{found.num_parameters:,}"
        for dtype, (weights, cache) in found.memory.items():
            rows[dtype] = f"{_size(weights)} of weights"
            if cache:
                rows[dtype] += f"; up to {_size(cache)} of keys and values for a request of those below"
    if found.model is None:
        return rows | {"runs": "no"}
    model, adapter, space = found.model, found.model.adapter, found.model.knob_space
    experts = f"; {adapter.num_experts} experts, {adapter.trained_top_k} of them per token" * (adapter.num_experts > 1)
    dropped = model.order.removal[: adapter.num_blocks - space.num_blocks[0]]
    return rows | {
        "model": f"{adapter.num_blocks} blocks of width {adapter.d_model:,}{experts}",
        "positions": f"{adapter.max_positions:,}",
        "tiers": ", ".join(f"{tier} (vision budget {model.vision_budgets[tier]:,})" for tier in space.tiers),
        "top_k": ", ".join(map(str, space.top_ks)),
        "num_blocks": ", ".join(map(str, space.num_blocks)),
        "block order": f"{model.order.source}; blocks left out first: {', '.join(map(str, dropped)) or 'none'}",
        "answers": f"of at most {model.max_new_tokens} tokens",
        "runs": "no" if found.problems else "yes",
    }


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.2f} MB"
