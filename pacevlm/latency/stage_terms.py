"""What the time of each stage grows with, and what a profile measured of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pacevlm.latency.profile import Sample

Array = NDArray[np.float64]
Number = TypeVar("Number", float, Array)

# What each stage's time is a non-negative sum of. `later_blocks` are the blocks after the latency token's,
# `whole_blocks` those of them that the prefill runs for every token: all but the last, of which only the prompt's last
# token is wanted. `units` are what the family cuts pictures into; `experts` are those that one token passes through in
# all blocks.
STAGE_TERMS: dict[str, tuple[str, ...]] = {
    "prepare_ms": ("constant", "units", "pixels"),
    "stage1_ms": ("constant",),
    "vision_ms": ("constant", "units", "unit_pairs"),
    "first_block_ms": ("constant", "tokens", "tokens^2"),
    "prefill_ms": (
        "constant",
        "later_blocks",
        "later_blocks*tokens",
        "whole_blocks*tokens^2",
        "whole_blocks*tokens*top_k",
        "later_blocks*top_k",
    ),
    "decode_ms_per_token": ("constant", "blocks", "blocks*context", "experts"),
    # What passes between the stages: end to end less the sum of the stages.
    "overhead_ms": ("constant",),
}

# Terms of these grow with the work of a request; the others are what every block or stage costs anyway. A faster or
# slower device changes the two by different factors.
WORK_UNITS = ("tokens", "unit", "pixels", "context", "experts")


def stage_terms(samples: Sequence[Sample], trained_top_k: int, stage2_after: int) -> dict[str, Array]:
    """Every stage's terms for measured requests, each of shape `(samples, terms)`."""
    work = [
        (s.num_units, s.num_unit_pairs, s.num_prompt_tokens, s.num_pixels, *s.knobs.compute, s.num_output_tokens - 1)
        for s in samples
    ]
    return terms_of(np.array(work, dtype=np.float64).reshape(len(samples), 7), trained_top_k, stage2_after)


def terms_of(work: Array, trained_top_k: int, stage2_after: int) -> dict[str, Array]:
    """Every stage's terms, each of shape `(n, terms)`; the order is `STAGE_TERMS`'.

    Args:
        work: units and pairs of units of the picture, prompt tokens, pixels, top_k, num_blocks and decode steps of each
            request, `(n, 7)`.
    """
    columns = term_columns(*work.T, trained_top_k=trained_top_k, stage2_after=stage2_after)
    return {stage: np.stack(stage_columns, axis=1) for stage, stage_columns in columns.items()}


def term_columns(
    units: Number,
    unit_pairs: Number,
    tokens: Number,
    pixels: Number,
    top_k: Number,
    num_blocks: Number,
    steps: Number,
    *,
    trained_top_k: int,
    stage2_after: int,
) -> dict[str, list[Number]]:
    """`terms_of`, a list for every stage: of floats for one request, which takes a fifth of the time, or of arrays."""
    one = tokens * 0.0 + 1.0
    later = num_blocks - stage2_after
    whole = (later - 1.0) * (later > 1.0)
    # Decode step i attends to the prompt and i generated tokens, i = 1..steps: this is the mean over the steps.
    context = tokens + 0.5 * (steps + 1.0)
    return {
        "prepare_ms": [one, units, pixels],
        "stage1_ms": [one],
        "vision_ms": [one, units, unit_pairs],
        "first_block_ms": [one, tokens, tokens**2],
        "prefill_ms": [one, later, later * tokens, whole * tokens**2, whole * tokens * top_k, later * top_k],
        "decode_ms_per_token": [
            one,
            num_blocks,
            num_blocks * context,
            stage2_after * trained_top_k + later * top_k,
        ],
        "overhead_ms": [one],
    }


def measured_stages(samples: Sequence[Sample]) -> dict[str, Array]:
    """Every stage's measured milliseconds, each of shape `(samples,)`; NaN where a request never decoded."""
    measured: dict[str, list[float]] = {stage: [] for stage in STAGE_TERMS}
    for sample in samples:
        times = sample.stages
        # In the order of STAGE_TERMS.
        parts_ms = (times.prepare_ms, times.stage1_ms, times.vision_ms, times.first_block_ms, times.prefill_ms)
        for stage, part_ms in zip(STAGE_TERMS, parts_ms, strict=False):
            measured[stage].append(part_ms)
        decode_ms = sum(times.decode_ms)
        # The mean, not the median: it is the sum over the steps that a budget pays for.
        measured["decode_ms_per_token"].append(decode_ms / len(times.decode_ms) if times.decode_ms else np.nan)
        measured["overhead_ms"].append(max(times.e2e_ms - times.read_ms - sum(parts_ms) - decode_ms, 0.0))
    return {stage: np.array(values) for stage, values in measured.items()}
