#!/usr/bin/env python3
"""How fast one request is: against transformers' own generate, knob by knob, and against what the hardware can do.

All ways are timed interleaved in one run, on the same requests, and have to give the same tokens. Prints tables and,
last, one JSON line; the same goes to RESULTS/request-DEVICE.json. The device should be idle.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ceilings import decode_bytes, measure_bandwidth, measure_flops, prefill_flops
from other_experts import loop_over_experts
from result_file import provenance, write_result
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from timing import Interleaved, bootstrap_ratio

from pacevlm.controller.policy import ControllerPolicy
from pacevlm.data.digits import DigitVQA
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.latency.measuring import use_num_threads
from pacevlm.latency.profile import collect_device_facts
from pacevlm.models.elastic import ElasticModel
from pacevlm.models.molmoe.runtime.adapter import MolmoEAdapter
from pacevlm.pacer import Pacer
from pacevlm.request.run import run_forced
from pacevlm.types import Example, Objective

# The cheapest of MolmoE-1B's default knobs, whose cost against full knobs is a bar.
DEFAULT_CHEAPEST = Knobs("low", 4, 12)


def generate_with_transformers(model: ElasticModel, example: Example) -> tuple[int, ...]:
    """Answer with the processor and `generate`, nothing of the elastic loop; the image at the dearest tier."""
    processor, network = model.adapter.processor, model.adapter.model
    inputs = processor(images=example.image, text=example.question)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    ids = network.generate(
        **inputs, max_new_tokens=model.max_new_tokens, do_sample=False, eos_token_id=sorted(model.adapter.end_token_ids)
    )
    return tuple(ids[0, inputs["input_ids"].shape[1] :].tolist())


def one_at_a_time(space: KnobSpace) -> list[Knobs]:
    """Full knobs, each knob lowered alone, and the cheapest ones."""
    full = space.full
    chosen = [Knobs(tier, full.top_k, full.num_blocks) for tier in space.tiers]
    chosen += [Knobs(full.tier, top_k, full.num_blocks) for top_k in space.top_ks]
    chosen += [Knobs(full.tier, full.top_k, num_blocks) for num_blocks in space.num_blocks]
    chosen += [space.cheapest, cheapest_of(space)]
    return list(dict.fromkeys(chosen))


def cheapest_of(space: KnobSpace) -> Knobs:
    """The cheapest of MolmoE-1B's default knobs, or of these where they are not among them."""
    return DEFAULT_CHEAPEST if DEFAULT_CHEAPEST in space else space.cheapest


def without_compiled_loops(model: ElasticModel) -> ElasticModel | None:
    """The same model and weights with torch alone between the matrix products; None where nothing is compiled."""
    adapter = model.adapter
    if type(adapter) is MolmoEAdapter:
        return None
    plain = MolmoEAdapter(adapter.model, adapter.processor)
    return ElasticModel(
        plain,
        model.knob_space,
        model.vision_budgets,
        model.order,
        model.identity,
        stage2_after=model.stage2_after,
        max_new_tokens=model.max_new_tokens,
    )


def run_requests(
    model: ElasticModel, examples: Sequence[Example], repeats: int, progress: Progress
) -> tuple[Interleaved, dict[str, Any]]:
    """Time every way of answering every request, interleaved."""
    space = model.knob_space
    ways: dict[str, Callable[[Example], Any]] = {"transformers": lambda e: generate_with_transformers(model, e)}
    for knobs in one_at_a_time(space):
        ways[str(knobs)] = lambda e, knobs=knobs: run_forced(model, e.image, e.question, knobs)  # type: ignore[misc]
    plain = without_compiled_loops(model)
    if plain is not None:
        for knobs in (space.full, cheapest_of(space)):
            ways[f"{knobs}, not compiled"] = lambda e, knobs=knobs: run_forced(
                plain,  # type: ignore[misc]
                e.image,
                e.question,
                knobs,
            )
    timed = Interleaved(ways, model.synchronise)
    timed.run(examples, repeats, progress, "requests")
    results = timed.last_results
    same = [results["transformers"][i] == results[str(space.full)][i].token_ids for i in range(len(examples))]
    for name in results:
        knobs, _, other = name.partition(", ")
        if other:
            pairs = zip(results[name], results[knobs], strict=True)
            same += [one.token_ids == compiled.token_ids for one, compiled in pairs]
    return timed, {"same_tokens": bool(np.all(same)), "num_compared": len(same)}


def stage_spans(timed: Interleaved, name: str) -> dict[str, float]:
    """Median prefill and decode step of one configuration, milliseconds."""
    times = [result.times for result in timed.all_results[name]]
    steps = [step for t in times for step in t.decode_ms]
    return {
        "prefill_ms": float(np.median([t.first_block_ms + t.prefill_ms for t in times])),
        "decode_step_ms": float(np.median(steps)),
    }


def decode_against_loop(model: ElasticModel, examples: Sequence[Example], progress: Progress) -> dict[str, Any]:
    """Decode steps against the same ones with a Python loop over all experts, as first published."""
    full, steps = model.knob_space.full, 12
    ways: dict[str, Callable[[Example], Any]] = {
        "ours": lambda e: _run_fixed(model, e, full, steps),
        "loop over experts": lambda e: _with_loop(model, lambda: _run_fixed(model, e, full, steps)),
    }
    timed = Interleaved(ways, model.synchronise)
    timed.run(examples, 2, progress, "decode against a loop over experts")
    step_ms = {name: stage_spans(timed, name)["decode_step_ms"] for name in ways}
    tokens = {name: [result.token_ids for result in timed.last_results[name]] for name in ways}
    return {
        "decode_speedup_over_loop": step_ms["loop over experts"] / step_ms["ours"],
        "loop_decode_step_ms": step_ms["loop over experts"],
        "loop_same_tokens": tokens["ours"] == tokens["loop over experts"],
    }


def _run_fixed(model: ElasticModel, example: Example, knobs: Knobs, steps: int) -> Any:
    return run_forced(model, example.source, example.question, knobs, num_output_tokens=steps)


def _with_loop(model: ElasticModel, work: Callable[[], Any]) -> Any:
    with loop_over_experts(model):
        return work()


def controller_cost(
    run_dir: Path, examples: Sequence[Example], progress: Progress, device: str = "cpu"
) -> dict[str, Any]:
    """What the decision takes: encoding the budget, the guardrail, both stages, the latency token, a predictor."""
    pacer = Pacer.from_pretrained(run_dir, device=device)
    model, policy = pacer.model, ControllerPolicy(pacer.controller)
    objective = Objective(pacer.full_p50_ms, pacer.kind)
    parts: dict[str, list[float]] = {}

    @torch.inference_mode()
    def decide(example: Example) -> None:
        view = model.view(example.source, example.question)
        prompt = model.adapter.encode_question(example.question)
        request = pacer.pacing.look(view, objective, example.example_id)
        token = policy.latency_token(request)
        tier = policy.choose_tier(request)
        prepared = model.adapter.prepare(example.image, prompt, model.vision_budgets[tier])
        prefix = model.decoder.prefix([model.adapter.embed(prepared, model.adapter.encode_vision([prepared])[0])])[0]
        output = model.decoder.latency_token([prefix], [token[None].to(prefix.hidden)])[0]
        ways: dict[str, Callable[[Any], Any]] = {
            "encode the budget": lambda _: policy.latency_token(request),
            "guardrail": lambda _: pacer.pacing.look(view, objective, example.example_id),
            "stage 1": lambda _: policy.choose_tier(request),
            "latency token": lambda _: model.decoder.latency_token([prefix], [token[None].to(prefix.hidden)]),
            "stage 2": lambda _: policy.choose_compute(request, tier, output),
        }
        if pacer.predictor is not None:
            ways["predictor"] = lambda _: pacer.policy.choose_compute(request, pacer.policy.choose_tier(request), None)
        timed = Interleaved(ways, model.synchronise)
        timed.run([None], 5, None, "")
        for name in ways:
            parts.setdefault(name, []).append(float(np.median(timed.times_ms[name])))

    task = progress.add_task("controller", total=len(examples))
    for example in examples:
        decide(example)
        progress.advance(task)
    return {name: float(np.median(values)) for name, values in parts.items()}


def growth(model: ElasticModel, example: Example, progress: Progress) -> list[dict[str, Any]]:
    """Time of one request against the tokens it generates and against the tokens of its image."""
    full = model.knob_space.full
    ways: dict[str, Callable[[Example], Any]] = {
        f"{steps} output tokens": lambda e, steps=steps: _run_fixed(model, e, full, steps)  # type: ignore[misc]
        for steps in (1, 2, 4, 8, 16, 32)
    }
    timed = Interleaved(ways, model.synchronise)
    timed.run([example], 15, progress, "growth with output tokens")
    rows = [{"axis": "output tokens", "at": int(name.split()[0]), "p50_ms": timed.p50_ms(name)} for name in ways]
    sides = [(64, 64), (64, 128), (128, 128), (128, 192), (192, 192), (192, 320)]
    images = {}
    for height, width in sides:
        image = example.image.resize((width, height))
        tokens = model.view(image, example.question).sizes.vision[-1].num_image_tokens
        images.setdefault(tokens, image)
    ways = {
        f"{tokens}": lambda e, image=image: _run_fixed(  # type: ignore[misc]
            model, dataclasses.replace(e, source=image), full, 2
        )
        for tokens, image in images.items()
    }
    timed = Interleaved(ways, model.synchronise)
    timed.run([example], 15, progress, "growth with image tokens")
    rows += [{"axis": "image tokens", "at": int(name), "p50_ms": timed.p50_ms(name)} for name in ways]
    return rows


def run_benchmark(arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """All measurements."""
    dtype = getattr(torch, arguments.dtype)
    model = ElasticModel.from_pretrained(arguments.model, device=arguments.device, dtype=dtype)
    space, full = model.knob_space, str(model.knob_space.full)
    examples = list(DigitVQA("val", arguments.num_requests, seed=arguments.seed))
    with use_num_threads(arguments.num_threads):
        device = collect_device_facts(model.device, model.dtype, compiler=model.adapter.compiler)
        timed, same = run_requests(model, examples, arguments.repeats, progress)
        by_knob = {
            name: {"ratio": ratio.mean, "low": ratio.low, "high": ratio.high, "p50_ms": timed.p50_ms(name)}
            for name in timed.times_ms
            for ratio in [bootstrap_ratio(timed, name, full)]
        }
        loop = decode_against_loop(model, examples[: max(4, len(examples) // 4)], progress)
        bandwidth, flops = measure_bandwidth(model), measure_flops(model)
        spans = stage_spans(timed, full)
        results = timed.all_results[full]
        context = float(np.median([r.vision.num_image_tokens + r.sizes.num_text_tokens for r in results]))
        decode_limit_ms = decode_bytes(model, space.full, context) / bandwidth * 1e3
        prefill_limit_ms = prefill_flops(model, space.full, context) / flops * 1e3
        rows = growth(model, examples[0], progress)
        controller = None if arguments.run_dir is None else controller_cost(arguments.run_dir, examples[:50], progress)
    cheapest = str(cheapest_of(space))
    out: dict[str, Any] = {
        **provenance(device),
        "model": arguments.model,
        "seed": arguments.seed,
        "num_requests": len(examples),
        "repeats": arguments.repeats,
        **same,
        "full_p50_ms": timed.p50_ms(full),
        "transformers_over_full": by_knob["transformers"]["ratio"],
        "cheapest_over_full": by_knob[cheapest]["ratio"],
        "cheapest_knobs": cheapest,
        "by_knob": by_knob,
        "context_tokens": context,
        **spans,
        "bandwidth_gb_per_s": bandwidth / 1e9,
        "gflops_per_s": flops / 1e9,
        "decode_limit_ms": decode_limit_ms,
        "decode_over_limit": spans["decode_step_ms"] / decode_limit_ms,
        "prefill_limit_ms": prefill_limit_ms,
        "prefill_over_limit": spans["prefill_ms"] / prefill_limit_ms,
        **loop,
        "growth": rows,
    }
    if controller is not None:
        out["controller_parts_ms"] = controller
        out["controller_ms"] = sum(controller.values())
        out["controller_share_of_full"] = out["controller_ms"] / out["full_p50_ms"]
    return out


def show(results: dict[str, Any], console: Console) -> None:
    """Print what the JSON line holds."""
    device = results["device"]
    table = Table(title=f"one request on {device['name']}, {device['num_threads']} thread(s), {results['dtype']}")
    for column in ("way", "p50 ms", "over full knobs", "95 % interval"):
        table.add_column(column)
    for name, row in results["by_knob"].items():
        table.add_row(name, f"{row['p50_ms']:.2f}", f"{row['ratio']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}")
    console.print(table)
    table = Table(title="against the hardware's limit, full knobs")
    for column in ("stage", "measured ms", "limit ms", "ratio"):
        table.add_column(column)
    for stage, name in (("decode", "decode_step_ms"), ("prefill", "prefill_ms")):
        limit, ratio = results[f"{stage}_limit_ms"], results[f"{stage}_over_limit"]
        table.add_row(stage, f"{results[name]:.3f}", f"{limit:.3f}", f"{ratio:.2f}")
    console.print(table)
    console.print(
        f"decode is {results['decode_speedup_over_loop']:.2f} times faster than a loop over all experts; same tokens: "
        f"{results['same_tokens'] and results['loop_same_tokens']}"
    )
    if "controller_ms" in results:
        parts = ", ".join(f"{name} {value:.3f}" for name, value in results["controller_parts_ms"].items())
        share = results["controller_share_of_full"]
        console.print(f"controller {results['controller_ms']:.3f} ms, {share:.1%} of a full request ({parts})")
    table = Table(title="growth, full knobs")
    for column in ("axis", "at", "p50 ms"):
        table.add_column(column)
    for row in results["growth"]:
        table.add_row(row["axis"], str(row["at"]), f"{row['p50_ms']:.2f}")
    console.print(table)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded", help="a model directory, or 'embedded'")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--num-requests", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run-dir", type=Path, help="a finished run or bundle whose controller is timed too")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        results = run_benchmark(arguments, progress)
    show(results, Console())
    write_result(results, arguments.results, "request", console)


if __name__ == "__main__":
    main()
