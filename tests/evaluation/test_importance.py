"""Measured importance: a block that does nothing goes first, and the figures are what the model really scores."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from pacevlm.data.metrics import load_metric
from pacevlm.errors import ConfigError, DataError
from pacevlm.evaluation.importance import count_passes, measure_importance, plan_importance
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.models.block_order import BlockOrder
from pacevlm.models.elastic import ElasticModel, read_elastic_settings
from pacevlm.request.run import run_forced
from pacevlm.rollout.engine import RolloutEngine

if TYPE_CHECKING:
    from pacevlm.types import Example

USELESS = (2, 4)


def without(model: ElasticModel, removed: tuple[int, ...]) -> ElasticModel:
    """The same model that never runs some blocks."""
    num_blocks = model.adapter.num_blocks
    space = KnobSpace(model.knob_space.tiers, (model.trained_top_k,), (num_blocks - len(removed),))
    order = BlockOrder(num_blocks, removed)
    return ElasticModel(model.adapter, space, model.vision_budgets, order, "x", max_new_tokens=model.max_new_tokens)


@pytest.fixture(scope="module")
def model(save_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> ElasticModel:
    """A model whose blocks 2 and 4 add nothing to the residual stream."""
    model = ElasticModel.from_pretrained(save_checkpoint(tmp_path_factory.mktemp("useless"), seed=3))
    adapter: Any = model.adapter
    with torch.no_grad():
        for index in USELESS:
            # The adapter's blocks share the memory of the modules' weights.
            block = adapter.model.model.transformer.blocks[index]
            block.attn.attn_out.weight.zero_()
            block.mlp.experts.down_proj.zero_()
    return model


@pytest.fixture(scope="module")
def examples(model: ElasticModel, law_examples: list[Example]) -> list[Example]:
    """Questions whose reference is what the whole model answers."""
    full = Knobs("high", model.trained_top_k, model.adapter.num_blocks)
    outcomes = RolloutEngine(model).run([(example, full) for example in law_examples])
    return [
        replace(example, references=(outcome.answer,)) for example, outcome in zip(law_examples, outcomes, strict=True)
    ]


def test_useless_blocks_go_first(model: ElasticModel, examples: list[Example]) -> None:
    result = measure_importance(model, examples, min_num_blocks=2)
    assert set(result.removal[:2]) == set(USELESS)
    assert sorted(result.removal) == sorted(set(result.removal))
    assert 0 not in result.removal
    assert len(result.removal) == 4
    assert result.full.accuracy.mean == 1.0
    assert [figure.accuracy_lost.mean for figure in result.greedy[:2]] == [0.0, 0.0]
    assert result.greedy[-1].accuracy_lost.mean > 0
    lost = {figure.removed: figure.accuracy_lost.mean for figure in result.single}
    assert set(lost) == {(block,) for block in range(1, 6)}
    assert all((lost[block,] == 0) == (block in USELESS) for block in range(1, 6))


def test_figures_are_what_the_model_scores(model: ElasticModel, examples: list[Example]) -> None:
    result = measure_importance(model, examples, min_num_blocks=3, num_candidates=2)
    for figure in (*result.single, *result.greedy):
        variant = without(model, figure.removed)
        answers = [
            run_forced(variant, example.image, example.question, variant.knob_space.full).answer for example in examples
        ]
        scores = [float(answer == example.references[0]) for answer, example in zip(answers, examples, strict=True)]
        assert figure.accuracy.mean == pytest.approx(np.mean(scores))
        assert figure.accuracy_lost.mean == pytest.approx(1 - np.mean(scores))
        assert figure.accuracy.low <= figure.accuracy.mean <= figure.accuracy.high
    assert result.num_examples == len(examples)
    assert [figure.removed for figure in result.greedy] == [result.removal[: i + 1] for i in range(3)]


def test_sets_are_chosen_greedily() -> None:
    """A made-up accuracy: blocks 1 and 2 replace each other, so that losing either is cheap and losing both is not."""
    # Covered on the selection itself, because a random model has no such pair.
    from pacevlm.evaluation.importance import choose_removal

    def score(removed: tuple[int, ...]) -> np.ndarray:
        gone = set(removed)
        value = 1.0 - 0.01 * (1 in gone) - 0.02 * (2 in gone) - 0.1 * (3 in gone) - 0.2 * (4 in gone)
        return np.full(5, value - 0.6 * ({1, 2} <= gone))

    def each(sets: list[tuple[int, ...]]) -> list[np.ndarray]:
        return [score(removed) for removed in sets]

    assert choose_removal(each, range(1, 5), 3, num_candidates=3).removal == (1, 3, 4)
    # A single candidate per round is the block that cost least when it was last tried: 2 by its leave-one-out figure.
    assert choose_removal(each, range(1, 5), 2, num_candidates=1).removal == (1, 2)
    ties = choose_removal(lambda sets: [np.zeros(3)] * len(sets), range(2, 6), 4, num_candidates=2)
    assert ties.removal == (2, 3, 4, 5)


def test_sets_share_what_they_have_in_common_and_the_plan_says_how_much(
    model: ElasticModel, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    num_passes, answered = 0, 0
    project, generate = model.adapter.project, model.decoder.generate_without

    def counting(block: int, x: torch.Tensor, rope: Any) -> Any:
        nonlocal num_passes
        num_passes += x.shape[0] if block >= model.stage2_after and x.shape[1] > 1 else 0
        return project(block, x, rope)

    def answering(prefixes: Any, removed: Any, limit: int) -> Any:
        nonlocal answered
        answered += len(removed)
        return generate(prefixes, removed, limit)

    monkeypatch.setattr(model.adapter, "project", counting)
    monkeypatch.setattr(model.decoder, "generate_without", answering)
    plan = plan_importance(6, (), len(examples), 3, 3)
    # All blocks and five alone, then three candidates of four, and three of three.
    assert plan.num_sets == (6, 3, 3)
    assert plan.num_passes_alone == (5 + 5 * 4, 3 * 3, 3 * 2)
    assert plan.num_passes[0] == 1 + 2 + 3 + 4 + 5  # behind a block that is left out nothing is shared with the others
    result = measure_importance(
        model, examples, 3, num_candidates=3, progress=lambda done, total: seen.append((done, total))
    )
    assert answered == plan.num_answers
    rounds = [[(), *((block,) for block in range(1, 6))]]
    total = len(examples) * sum(plan.num_passes)
    assert num_passes <= total < len(examples) * sum(plan.num_passes_alone)
    assert num_passes >= len(examples) * count_passes(rounds[0], 6)
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    assert result.num_examples == len(examples)


def test_no_later_round_takes_more_than_the_plan_says() -> None:
    plan = plan_importance(7, (), 1, 3, 3)
    for num_removed, most in zip((1, 2, 3), plan.num_passes[1:], strict=True):
        for removed in itertools.combinations(range(1, 7), num_removed):
            left = [block for block in range(1, 7) if block not in removed]
            for chosen in itertools.combinations(left, 3):
                assert count_passes([(*removed, block) for block in chosen], 7) <= most


def test_groups_have_orders_of_their_own(model: ElasticModel, examples: list[Example]) -> None:
    labels = ["a", "b"] * (len(examples) // 2) + ["a"] * (len(examples) % 2)
    result = measure_importance(model, examples, 4, groups=labels)
    alone = measure_importance(
        model, [example for example, label in zip(examples, labels, strict=True) if label == "b"], 4
    )
    lost = {figure.removed[0]: figure.accuracy_lost.mean for figure in alone.single}
    assert [group.name for group in result.groups] == ["a", "b"]
    assert result.groups[1].order == tuple(sorted(lost, key=lambda block: (round(lost[block], 12), block)))
    assert measure_importance(model, examples, 4).groups == ()


def test_the_order_is_stored_with_the_model(
    model: ElasticModel, examples: list[Example], save_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save_checkpoint(tmp_path / "model")
    before = read_elastic_settings(folder)
    result = measure_importance(model, examples, min_num_blocks=3)
    result.save(folder, "four pictures")
    settings = read_elastic_settings(folder)
    assert settings["removal"] == list(result.removal)
    assert settings["measured_on"] == "four pictures"
    assert settings["importance"] == json.loads(json.dumps(result.to_dict()))
    assert {key: settings[key] for key in before if key != "removal"} == {
        key: before[key] for key in before if key != "removal"
    }
    assert ElasticModel.from_pretrained(folder).order.removal == result.removal


def test_orders_stand_beside_each_other_under_their_names(
    model: ElasticModel, examples: list[Example], checkpoint: Path
) -> None:
    plain = ElasticModel.from_pretrained(checkpoint)
    result = measure_importance(model, examples, min_num_blocks=3)
    result.save(checkpoint, "four pictures", "docvqa")
    replace(result, removal=(5, 1, 3)).save(checkpoint, "others", "vqa2")
    settings = read_elastic_settings(checkpoint)
    assert set(settings["orders"]) == {"docvqa", "vqa2"}
    assert settings["orders"]["vqa2"]["measured_on"] == "others"
    again = ElasticModel.from_pretrained(checkpoint)
    assert (again.order, again.identity) == (plain.order, plain.identity)
    named = [ElasticModel.from_pretrained(checkpoint, block_order=name) for name in ("docvqa", "vqa2")]
    assert [one.order.removal for one in named] == [result.removal, (5, 1, 3)]
    assert [one.order.source for one in named] == ["docvqa", "vqa2"]
    assert len({plain.identity, *(one.identity for one in named)}) == 3
    with pytest.raises(ConfigError, match=r"block_order is 'chartqa'.*importance, early_exit, docvqa, vqa2"):
        ElasticModel.from_pretrained(checkpoint, block_order="chartqa")


def test_bad_settings_are_refused(model: ElasticModel, examples: list[Example]) -> None:
    for min_num_blocks in (0, 6, 7):
        with pytest.raises(ConfigError, match="min_num_blocks"):
            measure_importance(model, examples, min_num_blocks)
    with pytest.raises(ConfigError, match="num_candidates"):
        measure_importance(model, examples, 3, num_candidates=0)
    with pytest.raises(DataError, match="at least one example"):
        measure_importance(model, [], 3)
    with pytest.raises(DataError, match="ids of their own"):
        measure_importance(model, [examples[0], examples[0]], 3)


def test_a_stopped_measurement_goes_on_and_ends_the_same(
    model: ElasticModel, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pacevlm.evaluation.importance.CHUNK", 2)
    whole = measure_importance(model, examples, 4)
    path, num_calls = tmp_path / "partial.jsonl", 0

    def stop(done: int, total: int) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_importance(model, examples, 4, progress=stop, partial_path=path)
    kept = path.read_bytes()
    lines = kept.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # killed half-way through the last set
    resumed = measure_importance(model, examples, 4, partial_path=path)
    assert resumed.to_dict() == whole.to_dict()
    assert path.read_bytes().startswith(b"".join(lines[:-1]))
    # More candidates try sets of which some are known.
    more = measure_importance(model, examples, 4, num_candidates=9, partial_path=path)
    assert more.to_dict() == measure_importance(model, examples, 4, num_candidates=9).to_dict()
    # The header says the same in every process: a metric by its name, which no address of a function is.
    assert json.loads(lines[0])["metric"] == "exact_match"
    measure_importance(model, examples, 4, metric=load_metric("anls"), partial_path=path)
    assert json.loads(path.read_bytes().splitlines()[0])["metric"] == "anls"
    # Other examples are other work.
    measure_importance(model, examples[1:], 5, partial_path=path)
    assert not path.read_bytes().startswith(lines[0])
    path.write_bytes(path.read_bytes() + b'{"first": 0, "removed": [[1]], "scores": [[7]]}\n')
    with pytest.raises(DataError, match="remove the file"):
        measure_importance(model, examples[1:], 5, partial_path=path)
