#!/usr/bin/env python3
"""What bfloat16 and float16 cost a model in accuracy on the same questions, and how large its numbers grow.

Full knobs answer questions of the embedded data set in each dtype. The largest numbers are of the float32 pass, by
where they arise: float16 ends at 65,504. Writes RESULTS/half-precision-DEVICE.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from result_file import provenance, write_result
from rich.console import Console
from rich.table import Table

from pacevlm.data.digit_tasks import load_digits
from pacevlm.evaluation.statistics import percentile_interval, resampled_means
from pacevlm.latency.profile import collect_device_facts
from pacevlm.models.elastic import ElasticModel
from pacevlm.models.molmoe.vision import VisionBackbone
from pacevlm.rollout.engine import RolloutEngine
from pacevlm.types import Example

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def score(model: ElasticModel, examples: list[Example]) -> np.ndarray:
    """Accuracy of each answer with full knobs, `(examples,)`."""
    full = model.knob_space.full
    return np.array([outcome.accuracy for outcome in RolloutEngine(model).run([(e, full) for e in examples])])


@torch.no_grad()
def largest_numbers(model: ElasticModel, examples: list[Example]) -> dict[str, float]:
    """The largest magnitude at each place of a MolmoE's vision half and stream."""
    backbone: VisionBackbone = model.adapter.model.model.vision_backbone
    found: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, given: Any, out: Any) -> None:
            found[name] = max(found.get(name, 0.0), float(out.abs().max()))

        return hook

    watched = {f"tower block {i}": block for i, block in enumerate(backbone.image_vit.transformer.resblocks)}
    watched |= {f"hidden of tower block {i}": b.feed_forward.w1 for i, b in enumerate(watched.values())}
    watched |= {"pooled": backbone.image_pooling_2d, "projector gate": backbone.image_projector.w1}
    watched |= {"projector value": backbone.image_projector.w3, "features": backbone.image_projector}
    hooks = [module.register_forward_hook(watch(name)) for name, module in watched.items()]
    hooks.append(
        backbone.image_projector.w2.register_forward_hook(
            lambda module, given, out: watch("projector product")(module, out, given[0])
        )
    )
    for example in examples:
        prompt = model.adapter.encode_question(example.question)
        prepared = model.adapter.prepare(example.image, prompt, model.vision_budgets[model.knob_space.tiers[-1]])
        crops, masks = prepared.images.to(model.device), prepared.image_masks.to(model.device)
        features = backbone(crops, masks)  # by the modules, which can be watched
        stream = model.adapter.embed(prepared, features).hidden
        watch("embedded prompt")(None, None, stream)
    for hook in hooks:
        hook.remove()
    return found


def main() -> None:
    """Answer, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--num-examples", type=int, default=1000)
    parser.add_argument("--mixture", default="crossed", help="what is asked, as for --data.mixture")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(stderr=True)
    examples = list(load_digits("test", arguments.num_examples, arguments.mixture))
    scores, seconds, numbers = {}, {}, {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        model = ElasticModel.from_pretrained(arguments.model, dtype=dtype, device=arguments.device)
        if dtype == torch.float32:
            facts = provenance(collect_device_facts(model.device, dtype, compiler=model.adapter.compiler))
            numbers = largest_numbers(model, examples[:50])
        started = time.perf_counter()
        scores[name] = score(model, examples)
        seconds[name] = time.perf_counter() - started
        console.print(f"{name}: {scores[name].mean():.4f}, {seconds[name]:.0f} s")
    del facts["dtype"]
    columns = np.stack([*scores.values(), *(scores[name] - scores["float32"] for name in scores)], axis=1)
    resamples = resampled_means(columns, num_resamples=10_000)
    intervals = [percentile_interval(float(columns[:, i].mean()), resamples[:, i]) for i in range(columns.shape[1])]
    rows = {
        name: {
            "accuracy": intervals[i].to_dict(),
            "less_float32": intervals[len(scores) + i].to_dict(),
            "answers_scored_otherwise": int((scores[name] != scores["float32"]).sum()),
            "seconds": seconds[name],
        }
        for i, name in enumerate(scores)
    }
    table = Table("dtype", "accuracy", "less float32", "scored otherwise")
    for name, row in rows.items():
        words = [f"{100 * v['mean']:.1f} [{100 * v['low']:.1f}, {100 * v['high']:.1f}]" for v in list(row.values())[:2]]
        table.add_row(name, *words, str(row["answers_scored_otherwise"]))
    console.print(table)
    results = {
        **facts,
        "model": Path(arguments.model).name,
        "mixture": arguments.mixture,
        "num_examples": len(examples),
        "dtypes": rows,
        "largest_numbers": numbers,
    }
    write_result(results, arguments.results, "half-precision", console)


if __name__ == "__main__":
    main()
