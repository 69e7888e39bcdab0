"""What turns an objective into a mask over knobs, for one request and for many."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from pacings import bounds_of, constant_length, make_pacing, middle_objective

from pacevlm.errors import IdentityError
from pacevlm.latency.guardrail import Calibration
from pacevlm.latency.output_length import OutputLengthModel
from pacevlm.request.pacing import policy_inputs
from pacevlm.types import Objective

if TYPE_CHECKING:
    from pacevlm.models.elastic import ElasticModel
    from pacevlm.types import Example


def test_a_policy_is_told_what_the_guardrail_says(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    for example in law_examples:
        pacing = make_pacing(tiny_elastic, constant_length(tiny_elastic, 3))
        objective = middle_objective(tiny_elastic, example, pacing)
        view = tiny_elastic.view(example.image, example.question)
        request = pacing.look(view, objective, example.example_id)
        bounds_ms = pacing.guardrail.upper_bounds_ms(view.sizes, 3)
        assert np.array_equal(request.bounds_ms, bounds_ms)
        assert np.array_equal(request.feasible, bounds_ms <= objective.budget_ms)
        assert request.any_feasible
        assert not request.feasible.all()
        assert (request.example_id, request.objective) == (example.example_id, objective)
        assert request.view is view


def test_longer_answers_admit_less(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    view = tiny_elastic.view(law_examples[1].image, law_examples[1].question)
    short, long, unknown = (
        make_pacing(tiny_elastic, length)
        for length in (constant_length(tiny_elastic, 1), constant_length(tiny_elastic, 5), None)
    )
    assert (bounds_of(short, view) < bounds_of(long, view)).all()
    assert (bounds_of(long, view) < bounds_of(unknown, view)).all()
    assert unknown.output_tokens_upper([view]) == [tiny_elastic.max_new_tokens]
    by_text = make_pacing(tiny_elastic, constant_length(tiny_elastic, 0, text_weight=0.1))
    assert by_text.output_tokens_upper([view]) == [
        min(int(np.ceil(0.1 * view.sizes.num_text_tokens - 1e-6)), tiny_elastic.max_new_tokens)
    ]
    # Time to the first token does not depend on how many follow.
    first = [bounds_of(pacing, view, "ttft") for pacing in (short, long)]
    assert np.array_equal(*first)


def test_one_and_many_are_bounded_alike(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    pacing = make_pacing(tiny_elastic, constant_length(tiny_elastic, 0, text_weight=0.1))
    views = [tiny_elastic.view(example.image, example.question) for example in law_examples]
    for kind in ("e2e", "ttft"):
        together = pacing.upper_bounds_ms(views, kind)
        assert np.array_equal(together, [bounds_of(pacing, view, kind) for view in views])
        objectives = [Objective(float(np.median(bounds)), kind) for bounds in together]
        names = [example.example_id for example in law_examples]
        for one, view, objective in zip(
            policy_inputs(views, objectives, together, names), views, objectives, strict=True
        ):
            alone = pacing.look(view, objective, one.example_id)
            assert np.array_equal(one.feasible, alone.feasible)
            assert (one.view, one.objective, one.any_feasible) == (view, objective, alone.any_feasible)


def test_a_larger_factor_never_admits_more(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    pacing = make_pacing(tiny_elastic)
    for example in law_examples:
        view = tiny_elastic.view(example.image, example.question)
        for budget_ms in np.quantile(bounds_of(pacing, view), [0.1, 0.5, 0.9, 1.0]).tolist():
            masks = []
            for factor in (0.7, 1.0, 1.1, 1.5, 3.0, 16.0):
                request = pacing.look(view, Objective(budget_ms / factor))
                masks.append(request.feasible & request.any_feasible)
            assert all((more >= less).all() for more, less in itertools.pairwise(masks))


def test_other_models_artefacts_are_refused(tiny_elastic: ElasticModel) -> None:
    lengths = OutputLengthModel(
        "another", (0.0,) * tiny_elastic.d_model, None, 1.0, 0, tiny_elastic.max_new_tokens, 0.1
    )
    with pytest.raises(IdentityError, match="another"):
        make_pacing(tiny_elastic, lengths)
    shorter = OutputLengthModel(tiny_elastic.identity, (0.0,) * tiny_elastic.d_model, None, 1.0, 0, 2, 0.1)
    with pytest.raises(IdentityError, match="another limit of answer tokens: 2, not 6"):
        make_pacing(tiny_elastic, shorter)


def test_a_pacings_identity_tells_everything_that_bounds_depend_on(tiny_elastic: ElasticModel) -> None:
    pacing = make_pacing(tiny_elastic, constant_length(tiny_elastic, 2))
    guardrail = pacing.guardrail
    wider = Calibration(0.1, {}, float(np.log(1.6)), {})
    others = [
        replace(pacing, output_length=None),
        replace(pacing, output_length=constant_length(tiny_elastic, 1)),
        replace(pacing, guardrail=replace(guardrail, picture=wider)),
        replace(pacing, guardrail=replace(guardrail, group_by="tier")),
        replace(pacing, guardrail=replace(guardrail, calibrations={**guardrail.calibrations, "e2e": wider})),
        replace(pacing, guardrail=replace(guardrail, estimator=replace(guardrail.estimator, max_text_tokens=101))),
    ]
    told = [json.dumps(each.identity, sort_keys=True) for each in (pacing, *others)]
    assert len(set(told)) == len(told)
    again = make_pacing(tiny_elastic, constant_length(tiny_elastic, 2))
    assert json.dumps(again.identity, sort_keys=True) == told[0]
