"""A model's block order measured on a data set and stored beside its weights."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence

import torch

from pacevlm.config import MADE_DATASETS, DataConfig, ImportanceConfig, ModelConfig
from pacevlm.data.splits import Splits, load_splits
from pacevlm.errors import DataError, StorageError
from pacevlm.evaluation.importance import ImportancePlan, ImportanceResult, measure_importance, plan_importance
from pacevlm.evaluation.learnable import importance_warnings
from pacevlm.models.elastic import knob_space_of, read_elastic_settings
from pacevlm.models.folder import find_model_folder
from pacevlm.models.registry import load_adapter
from pacevlm.pipeline.context import Reporter
from pacevlm.pipeline.loading import load_on_ranks
from pacevlm.pipeline.lock import one_writer
from pacevlm.printing import duration
from pacevlm.request.run import run_forced
from pacevlm.rollout.ranks import current_ranks
from pacevlm.types import Example

PARTIAL_NAME, LOCK_NAME = "elastic.json.partial.jsonl", ".elastic.json.lock"
# Metadata that say what a question is of: in the data set inside the package, and in a mixture of benchmarks.
DEFAULT_GROUPS = ("task", "benchmark")
# Seconds of work from which the time of the rest is told.
NUM_SECONDS_TOLD = 10.0


def plan_order(config: ImportanceConfig) -> ImportancePlan:
    """What `measure_order` will run; no weights are read, and nothing is written.

    Raises:
        ConfigError: a number is outside its range.
        CheckpointError: the model directory says too little.
        PacevlmError: the data set cannot be loaded.
    """
    return _plan(config, len(_choose(config)[1]))


def measure_order(config: ImportanceConfig, reporter: Reporter) -> ImportanceResult:
    """Measure the order in which a model's blocks are given up, and store it in its `elastic.json`.

    Scores are kept as they come: stopped and started again it goes on.

    Raises:
        ConfigError: a number is outside its range, or another process measures the same model.
        DataError: no example has the metadata to group by.
        StorageError: the model's folder cannot be written.
        PacevlmError: the model or the data set cannot be loaded.
    """
    folder = find_model_folder(config.path)
    if not os.access(folder, os.W_OK):
        raise StorageError(
            f"{folder} cannot be written, and the order goes into its elastic.json; make a folder of links to it, "
            f"`cp -rs {shlex.quote(str(folder.resolve()))} my-model`, and give that as --path"
        )
    data, examples = _choose(config)
    groups = _group(config, examples)
    plan = _plan(config, len(examples))
    model = load_on_ranks(
        ModelConfig(path=config.path, dtype=config.dtype, device=config.device, block_order="early_exit"),
        config.picture,
        config.dataset,
    )
    started, told = (0.0, 0), False

    def progress(done: int, total: int) -> None:
        nonlocal started, told
        reporter.progress("block passes", done, total)
        began, done_before = started
        if not began:
            started = time.monotonic(), done
            return
        seconds = time.monotonic() - began
        if not told and done > done_before and seconds > NUM_SECONDS_TOLD:
            told = True
            left = seconds * (total - done) / (done - done_before)
            reporter.told("importance", f"about {duration(left)} left, as the first {duration(seconds)} went")

    with one_writer(folder, LOCK_NAME):
        for sentence in data.remarks:
            reporter.warned("data", sentence)
        reporter.told("importance", describe_plan(plan))
        result = measure_importance(
            model,
            examples,
            plan.min_num_blocks,
            num_candidates=config.num_candidates,
            groups=groups,
            metric=data.metric,
            progress=progress,
            partial_path=folder / PARTIAL_NAME,
            ranks=current_ranks(),
        )
        scored = "" if data.metric.name == "exact_match" else f", {data.metric.name}"
        result.save(folder, f"{data.name}, {len(examples)} examples, seed {config.seed}{scored}", config.name)
        (folder / PARTIAL_NAME).unlink(missing_ok=True)
        answer = run_forced(model, examples[0].source, examples[0].question, model.knob_space.full).answer
        for sentence in importance_warnings(result.full.accuracy.mean, len(examples), examples[0], answer):
            reporter.warned("importance", sentence)
    return result


def describe_plan(plan: ImportancePlan) -> str:
    """A plan in one sentence."""
    passes, alone = (plan.num_examples * sum(numbers) for numbers in (plan.num_passes, plan.num_passes_alone))
    return (
        f"{sum(plan.num_sets)} sets of blocks in {len(plan.num_sets)} rounds, {plan.num_examples:,} examples each: "
        f"{plan.num_answers:,} answers, at most about {passes:,} block passes over prompts ({alone:,} if every set ran "
        "by itself)"
    )


def _choose(config: ImportanceConfig) -> tuple[Splits, list[Example]]:
    """The data set, and the examples that every set answers."""
    number = config.num_examples
    data = load_splits(
        DataConfig(
            config.dataset,
            fields=config.fields,
            mixture=config.mixture,
            metric=config.metric,
            num_train=number,
            num_val=number,
            seed=config.seed,
        ),
        config.picture,
    )
    return data, list(data.val if config.dataset in MADE_DATASETS else data.train)[:number]


def _plan(config: ImportanceConfig, num_examples: int) -> ImportancePlan:
    folder = find_model_folder(config.path)
    adapter = load_adapter(folder, torch.device("meta"), torch.float32)
    least = config.min_num_blocks or knob_space_of(adapter, read_elastic_settings(folder), {}).num_blocks[0]
    return plan_importance(adapter.num_blocks, adapter.fixed_blocks, num_examples, least, config.num_candidates)


def _group(config: ImportanceConfig, examples: Sequence[Example]) -> list[str] | None:
    """Each example's group; None if there is nothing to group by."""
    for key in DEFAULT_GROUPS if config.group_by is None else (config.group_by,):
        if all(key in example.metadata for example in examples):
            return [str(example.metadata[key]) for example in examples]
    if config.group_by is None:
        return None
    known = sorted({name for example in examples for name in example.metadata})
    raise DataError(
        f"group_by is {config.group_by!r}, which not every example has; their metadata are {', '.join(known)}"
    )
