"""Laws of rollouts: shared, deduplicated, remembered and batched work gives what naive runs give."""

from __future__ import annotations

import dataclasses
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pacevlm.data.metrics import Metric, load_metric
from pacevlm.errors import (
    ConfigError,
    IdentityError,
    ImageError,
    KnobError,
    MemoryLimitError,
    QuestionError,
)
from pacevlm.knobs import Knobs
from pacevlm.latency.measuring import use_num_threads
from pacevlm.models.elastic import ElasticModel
from pacevlm.request.run import run_forced
from pacevlm.rollout.engine import RolloutEngine
from pacevlm.rollout.outcome_store import OutcomeStore, StoredAnswer
from pacevlm.types import Example, Outcome
from tests.stored_answers import change, read_answers

Job = tuple[Example, Knobs]
TIGHT = [{"max_rows": 1}, {"max_rows": 3}, {"max_tokens": 1}, {"max_tokens": 150}, {"max_prefix_bytes": 1}]


# A metric that differs from the default one and is not all zero for random answers.
LENGTHS = Metric("lengths", lambda answer, references, choices: (len(answer) + len(references[0])) % 4 / 4)


def jobs_of(model: ElasticModel, examples: list[Example], num_jobs: int = 24) -> list[Job]:
    """Jobs in a random order, some of them repeated."""
    rng = random.Random(0)
    space = model.knob_space
    jobs = [(rng.choice(examples), space[rng.randrange(len(space))]) for _ in range(num_jobs)]
    jobs += jobs[: num_jobs // 4]
    rng.shuffle(jobs)
    return jobs


def naive(model: ElasticModel, job: Job) -> Outcome:
    example, knobs = job
    result = run_forced(model, example.image, example.question, knobs)
    num_prompt_tokens = result.vision.num_image_tokens + result.sizes.num_text_tokens
    accuracy = LENGTHS(result.answer, example)
    return Outcome(example.example_id, knobs, result.answer, accuracy, num_prompt_tokens, result.num_output_tokens)


def end_some_answers_early(model: ElasticModel, jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a token end answers that makes them differ most in length, as end-of-text does in a trained model."""
    monkeypatch.setattr(model.adapter, "end_token_ids", frozenset({-1}))
    rows = [run_forced(model, e.image, e.question, k).token_ids for e, k in jobs[:8]]

    def lengths(token: int) -> set[int]:
        return {row.index(token) if token in row else len(row) for row in rows}

    tokens = sorted({token for row in rows for token in row})
    monkeypatch.setattr(model.adapter, "end_token_ids", frozenset({max(tokens, key=lambda t: len(lengths(t)))}))


def test_rollouts_are_naive_runs(
    law_model: ElasticModel, law_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(law_model, law_examples)
    end_some_answers_early(law_model, jobs, monkeypatch)
    engine = RolloutEngine(law_model, LENGTHS)
    outcomes = engine.run(jobs)
    assert outcomes == [naive(law_model, job) for job in jobs]
    assert len({o.num_output_tokens for o in outcomes}) > 1
    # Again, and in another order: remembered, and the same.
    assert engine.run(jobs[::-1]) == outcomes[::-1]


@pytest.mark.parametrize("limits", TIGHT, ids=str)
def test_limits_change_no_outcome(
    tiny_elastic: ElasticModel, law_examples: list[Example], limits: dict[str, int]
) -> None:
    jobs = jobs_of(tiny_elastic, law_examples)
    expected = RolloutEngine(tiny_elastic, LENGTHS).run(jobs)
    assert RolloutEngine(tiny_elastic, LENGTHS, **limits).run(jobs) == expected


def test_work_is_done_once(
    tiny_elastic: ElasticModel, law_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(tiny_elastic, law_examples)
    encoded: list[Any] = []
    encode = tiny_elastic.adapter.encode_vision

    def counted(requests: Any) -> Any:
        encoded.extend(requests)
        return encode(requests)

    monkeypatch.setattr(tiny_elastic.adapter, "encode_vision", counted)
    engine, num_distinct = RolloutEngine(tiny_elastic), len({(e.example_id, k) for e, k in jobs})
    progress: list[tuple[int, int]] = []
    engine.run(jobs, progress=lambda done, total: progress.append((done, total)))
    assert progress == [(num_distinct, num_distinct)]
    assert (engine.num_run, engine.num_remembered) == (num_distinct, len(jobs) - num_distinct)
    assert len(encoded) == len({(e.example_id, k.tier) for e, k in jobs})

    engine.run(jobs)
    assert (engine.num_run, engine.num_remembered) == (num_distinct, 2 * len(jobs) - num_distinct)
    token = torch.zeros(len(jobs), tiny_elastic.d_model)
    engine.latency_token_outputs([e for e, _ in jobs], [k.tier for _, k in jobs], token)
    assert len(encoded) == len({(e.example_id, k.tier) for e, k in jobs})  # the prefixes were still there


def test_progress_counts_up_to_the_total(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    jobs = jobs_of(tiny_elastic, law_examples)
    progress: list[tuple[int, int]] = []
    RolloutEngine(tiny_elastic, max_rows=4).run(jobs, progress=lambda done, total: progress.append((done, total)))
    done, totals = zip(*progress, strict=True)
    assert list(done) == sorted(set(done))
    assert set(totals) == {done[-1]} == {len({(e.example_id, k) for e, k in jobs})}


def test_no_batch_exceeds_its_limits(
    tiny_elastic: ElasticModel, law_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[int]] = []
    generate = tiny_elastic.decoder.generate

    def counted(prefixes: Any, *args: Any, **kwargs: Any) -> Any:
        batches.append([prefix.num_tokens for prefix in prefixes])
        return generate(prefixes, *args, **kwargs)

    monkeypatch.setattr(tiny_elastic.decoder, "generate", counted)
    RolloutEngine(tiny_elastic, max_rows=5, max_tokens=230).run(jobs_of(tiny_elastic, law_examples, 40))
    assert len(batches) > 2
    assert all(len(batch) <= 5 and len(batch) * max(batch) <= 230 for batch in batches)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_batches_side_by_side_give_what_batches_in_turn_give(
    tiny_elastic: ElasticModel, law_examples: list[Example], monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    jobs = jobs_of(tiny_elastic, law_examples, 60)
    with use_num_threads(1):
        expected = RolloutEngine(tiny_elastic, LENGTHS, max_rows=4).run(jobs)
    seen: list[tuple[int, int]] = []
    generate = tiny_elastic.decoder.generate

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append((threading.get_ident(), torch.get_num_threads()))
        return generate(*args, **kwargs)

    monkeypatch.setattr(tiny_elastic.decoder, "generate", watched)
    progress: list[int] = []
    with use_num_threads(num_threads):
        engine = RolloutEngine(tiny_elastic, LENGTHS, max_rows=4)
        assert engine.run(jobs, progress=lambda done, _: progress.append(done)) == expected
        assert torch.get_num_threads() == num_threads
    assert threading.get_ident() not in {thread for thread, _ in seen}
    assert {threads for _, threads in seen} == {1}
    assert progress == sorted(set(progress))
    assert progress[-1] == engine.num_run == len({(e.example_id, k) for e, k in jobs})


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_latency_tokens_take_one_thread_however_many_there_are(
    tiny_elastic: ElasticModel, law_examples: list[Example], monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    tiers = [tiny_elastic.knob_space.tiers[i % 2] for i in range(len(law_examples))]
    tokens = torch.randn(len(tiers), tiny_elastic.d_model, generator=torch.Generator().manual_seed(0))
    with use_num_threads(1):
        expected = RolloutEngine(tiny_elastic).latency_token_outputs(law_examples, tiers, tokens)
    seen: set[int] = set()

    def watched(call: Any) -> Any:
        def run(*args: Any) -> Any:
            seen.add(torch.get_num_threads())
            return call(*args)

        return run

    for part, name in ((tiny_elastic.adapter, "encode_vision"), (tiny_elastic.decoder, "latency_token")):
        monkeypatch.setattr(part, name, watched(getattr(part, name)))
    with use_num_threads(num_threads):
        assert torch.equal(RolloutEngine(tiny_elastic).latency_token_outputs(law_examples, tiers, tokens), expected)
        assert torch.get_num_threads() == num_threads
    assert seen == {1}


def test_a_fault_in_one_of_several_batches_comes_out(
    tiny_elastic: ElasticModel, law_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Memory(tiny_elastic, monkeypatch, OUT_OF_MEMORY[0])
    device.num_fitting = 0
    with use_num_threads(2):
        with pytest.raises(MemoryLimitError, match="memory for a single row of"):
            RolloutEngine(tiny_elastic, max_rows=4).run(jobs_of(tiny_elastic, law_examples, 40))
        assert torch.get_num_threads() == 2


class Memory:
    """A device on which so many rows or prompts fit at once; a stand-in for what torch raises beyond that."""

    def __init__(self, model: ElasticModel, monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
        self.num_failed, self.num_fitting = 0, 1000
        for name in ("generate", "prefix", "latency_token"):
            monkeypatch.setattr(model.decoder, name, self.limited(getattr(model.decoder, name), error))

    def limited(self, run: Any, error: RuntimeError) -> Any:
        def wrapper(rows: Any, *args: Any, **kwargs: Any) -> Any:
            if len(rows) > self.num_fitting:
                self.num_failed += 1
                raise error
            return run(rows, *args, **kwargs)

        return wrapper


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu"])
def test_out_of_memory_halves_batches_and_goes_on(
    tiny_elastic: ElasticModel, law_examples: list[Example], monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    jobs = jobs_of(tiny_elastic, law_examples, 40)
    examples, tiers = [example for example, _ in jobs], [knobs.tier for _, knobs in jobs]
    tokens = torch.randn(len(jobs), tiny_elastic.d_model, generator=torch.Generator().manual_seed(0))
    roomy = RolloutEngine(tiny_elastic, LENGTHS)
    expected, expected_tokens = roomy.run(jobs), roomy.latency_token_outputs(examples, tiers, tokens)
    device = Memory(tiny_elastic, monkeypatch, error)
    device.num_fitting = 3
    engine = RolloutEngine(tiny_elastic, LENGTHS)
    before = engine.limits
    assert engine.run(jobs) == expected
    assert engine.num_run == roomy.num_run
    assert engine.limits.max_rows <= 3 < before.max_rows
    # What was learned holds on: a few batches failed, not all of them.
    assert 2 <= device.num_failed <= 12
    num_failed = device.num_failed
    torch.testing.assert_close(engine.latency_token_outputs(examples, tiers, tokens), expected_tokens)
    assert device.num_failed == num_failed


def test_what_does_not_fit_even_alone_is_said(
    tiny_elastic: ElasticModel, law_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(tiny_elastic, law_examples)
    engine = RolloutEngine(tiny_elastic)
    device = Memory(tiny_elastic, monkeypatch, OUT_OF_MEMORY[0])
    device.num_fitting = 0
    with pytest.raises(MemoryLimitError, match="memory for a single row of"):
        engine.run(jobs)
    device.num_fitting = 1000
    assert len(engine.run(jobs)) == len(jobs)


def test_other_faults_are_not_taken_for_a_lack_of_memory(
    tiny_elastic: ElasticModel, law_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Memory(tiny_elastic, monkeypatch, RuntimeError("shapes do not match"))
    device.num_fitting = 3
    with pytest.raises(RuntimeError, match="shapes do not match"):
        RolloutEngine(tiny_elastic).run(jobs_of(tiny_elastic, law_examples))
    assert device.num_failed == 1


def test_stored_answers_are_given_back_and_not_run(
    tiny_elastic: ElasticModel, law_examples: list[Example], tmp_path: Path
) -> None:
    jobs = jobs_of(tiny_elastic, law_examples)
    path = tmp_path / "outcomes.sqlite"
    RolloutEngine(tiny_elastic, LENGTHS, OutcomeStore(tiny_elastic.identity, path)).run(jobs[:10])
    mark = read_answers(path)[0]
    change(path, "UPDATE outcomes SET answer = 'stored' WHERE (content, knobs) = (?, ?)", mark.content, mark.knobs)
    engine = RolloutEngine(tiny_elastic, LENGTHS, OutcomeStore(tiny_elastic.identity, path))
    outcomes = engine.run(jobs)
    fresh = RolloutEngine(tiny_elastic, LENGTHS).run(jobs)
    marked = [(e.content_id, str(k)) == (mark.content, mark.knobs) for e, k in jobs]
    assert any(marked)
    assert all((outcome.answer == "stored") == is_marked for outcome, is_marked in zip(outcomes, marked, strict=True))
    assert [o for o, m in zip(outcomes, marked, strict=True) if not m] == [
        o for o, m in zip(fresh, marked, strict=True) if not m
    ]
    assert engine.num_run == len({(e.example_id, k) for e, k in jobs} - {(e.example_id, k) for e, k in jobs[:10]})
    assert len(read_answers(path)) == len({(e.example_id, k) for e, k in jobs})


def test_an_interrupted_run_keeps_every_batch_that_was_done(
    tiny_elastic: ElasticModel, law_examples: list[Example], tmp_path: Path
) -> None:
    jobs, path = jobs_of(tiny_elastic, law_examples), tmp_path / "outcomes.sqlite"

    def stop(done: int, total: int) -> None:
        if done >= 6:
            raise KeyboardInterrupt

    with use_num_threads(1), pytest.raises(KeyboardInterrupt):
        RolloutEngine(tiny_elastic, store=OutcomeStore(tiny_elastic.identity, path), max_rows=3).run(jobs, stop)
    assert len(OutcomeStore(tiny_elastic.identity, path)) == 6


def test_answers_outlive_metric_and_references_but_scores_do_not(
    tiny_elastic: ElasticModel, law_examples: list[Example]
) -> None:
    jobs, store = jobs_of(tiny_elastic, law_examples), OutcomeStore(tiny_elastic.identity)
    first = RolloutEngine(tiny_elastic, LENGTHS, store).run(jobs)
    other = RolloutEngine(tiny_elastic, load_metric("anls"), store)
    rescored = [load_metric("anls")(o.answer, e) for o, (e, _) in zip(first, jobs, strict=True)]
    assert [o.accuracy for o in other.run(jobs)] == rescored
    engine = RolloutEngine(tiny_elastic, store=store)
    right = [(dataclasses.replace(e, references=("no", o.answer)), k) for (e, k), o in zip(jobs, first, strict=True)]
    assert all(outcome.accuracy == 1.0 for outcome in engine.run(right))
    wrong = [(dataclasses.replace(e, references=(o.answer + "!",)), k) for (e, k), o in zip(jobs, first, strict=True)]
    assert all(outcome.accuracy == 0.0 for outcome in engine.run(wrong))
    assert other.num_run == engine.num_run == 0


def test_what_is_known_belongs_to_picture_and_question(
    tiny_elastic: ElasticModel, law_examples: list[Example], tmp_path: Path
) -> None:
    """Whatever of an example changes, what was known of the old one is not served; and what did not change is."""
    knobs = tiny_elastic.knob_space.full
    path = tmp_path / "picture.png"
    law_examples[3].image.save(path)
    example = dataclasses.replace(law_examples[3], source=path)
    engine = RolloutEngine(tiny_elastic, max_prefix_bytes=1 << 20)
    expected = engine.run([(example, knobs)])[0]
    token = torch.zeros(1, tiny_elastic.d_model)
    expected_token = engine.latency_token_outputs([example], ["high"], token)

    same = [
        dataclasses.replace(example, example_id="other"),
        dataclasses.replace(example, references=("other",)),
        dataclasses.replace(example, source=law_examples[3].image),
        dataclasses.replace(example, metadata={"family": "x"}),
    ]
    for other in same:
        assert engine.run([(other, knobs)])[0].answer == expected.answer
    assert engine.num_run == 1

    law_examples[2].image.save(path)  # another picture in the same place, and with the same id
    for other in (dataclasses.replace(example), dataclasses.replace(example, question="2?")):
        num_run = engine.num_run
        naive_result = run_forced(tiny_elastic, other.image, other.question, knobs)
        assert engine.run([(other, knobs)])[0].answer == naive_result.answer
        assert engine.num_run == num_run + 1
        assert engine.view(other).sizes == tiny_elastic.view(other.source, other.question).sizes
        assert not torch.equal(engine.latency_token_outputs([other], ["high"], token), expected_token)


def test_a_picture_that_cannot_be_read_names_file_and_line(tiny_elastic: ElasticModel, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    example = Example("x", tmp_path / "broken.png", "What?", ("1",), where="set.jsonl, line 7")
    engine = RolloutEngine(tiny_elastic)
    with pytest.raises(ImageError, match=r"set\.jsonl, line 7: .*broken\.png"):
        engine.run([(example, tiny_elastic.knob_space.full)])
    known = dataclasses.replace(example, known_picture_id="0" * 32)
    with pytest.raises(ImageError, match=r"set\.jsonl, line 7: .*broken\.png"):
        engine.view(known)


def token_jobs(model: ElasticModel, examples: list[Example]) -> tuple[list[Example], list[str], torch.Tensor]:
    rng = random.Random(1)
    pairs = [(rng.choice(examples), rng.choice(model.knob_space.tiers)) for _ in range(11)]
    tokens = torch.randn(len(pairs), model.d_model, generator=torch.Generator().manual_seed(0))
    return [e for e, _ in pairs], [t for _, t in pairs], tokens


@pytest.mark.parametrize("limits", [{}, {"max_rows": 2, "max_prefix_bytes": 1}], ids=str)
def test_latency_tokens_together_are_latency_tokens_alone(
    law_model: ElasticModel, law_examples: list[Example], limits: dict[str, int]
) -> None:
    examples, tiers, tokens = token_jobs(law_model, law_examples)
    tokens.requires_grad_()
    together = RolloutEngine(law_model, **limits).latency_token_outputs(examples, tiers, tokens)
    weights = torch.randn(together.shape, generator=torch.Generator().manual_seed(1)).to(law_model.device)
    (gradient,) = torch.autograd.grad((together * weights).sum(), tokens)
    for i, (example, tier) in enumerate(zip(examples, tiers, strict=True)):
        token = tokens[i : i + 1].detach().to(law_model.device).requires_grad_()
        # Not through the engine: request by request, as `run_request` does it.
        prompt = law_model.adapter.encode_question(example.question)
        prepared = law_model.adapter.prepare(example.image, prompt, law_model.vision_budgets[tier])
        features = law_model.adapter.encode_vision([prepared])[0]
        prefix = law_model.decoder.prefix([law_model.adapter.embed(prepared, features)])
        alone = law_model.decoder.latency_token(prefix, [token])
        torch.testing.assert_close(
            together[i], alone[0], atol=1e-5 * max(1.0, float(alone.detach().abs().max())), rtol=0
        )
        (lone_gradient,) = torch.autograd.grad((alone[0] * weights[i]).sum(), token)
        scale = max(1.0, float(lone_gradient.abs().max()))
        torch.testing.assert_close(gradient[i], lone_gradient[0].cpu(), atol=1e-5 * scale, rtol=0)


def test_gradient_survives_a_run_in_inference_mode(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    engine, example = RolloutEngine(tiny_elastic), law_examples[0]
    with torch.inference_mode():
        engine.run([(example, tiny_elastic.knob_space.full)])
    token = torch.ones(1, tiny_elastic.d_model, requires_grad=True)
    engine.latency_token_outputs([example], ["high"], token).sum().backward()
    assert token.grad is not None
    assert token.grad.abs().sum() > 0


def test_nothing_to_do_is_nothing(tiny_elastic: ElasticModel) -> None:
    engine = RolloutEngine(tiny_elastic)
    assert engine.run([]) == []
    assert engine.latency_token_outputs([], [], torch.zeros(0, tiny_elastic.d_model)).shape == (0, tiny_elastic.d_model)


def test_views_are_the_models_and_computed_once(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    engine = RolloutEngine(tiny_elastic)
    view, expected = engine.view(law_examples[0]), tiny_elastic.view(law_examples[0].image, law_examples[0].question)
    assert view.sizes == expected.sizes
    assert torch.equal(view.question_embedding, expected.question_embedding)
    assert engine.view(law_examples[0]) is view


def test_two_examples_may_share_an_id_or_their_content(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    knobs = tiny_elastic.knob_space.full
    one = law_examples[0]
    others = [
        dataclasses.replace(law_examples[1], example_id=one.example_id),
        dataclasses.replace(one, example_id="copy", references=("another",)),
    ]
    engine = RolloutEngine(tiny_elastic, LENGTHS)
    outcomes = engine.run([(example, knobs) for example in (one, *others)])
    assert outcomes == [naive(tiny_elastic, (example, knobs)) for example in (one, *others)]
    assert engine.num_run == 2


@pytest.mark.parametrize("limits", [{"max_rows": 0}, {"max_tokens": 0}, {"max_prefix_bytes": -1}], ids=str)
def test_senseless_limits_are_refused(tiny_elastic: ElasticModel, limits: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="whole number from 1"):
        RolloutEngine(tiny_elastic, **limits)


def test_anothers_store_is_refused(tiny_elastic: ElasticModel) -> None:
    with pytest.raises(IdentityError, match="another"):
        RolloutEngine(tiny_elastic, store=OutcomeStore("another"))


def test_foreign_knobs_are_refused_before_any_work(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    foreign, example = Knobs("low", 8, 6), law_examples[0]
    engine = RolloutEngine(tiny_elastic)
    with pytest.raises(KnobError, match="low/8/6"):
        engine.run([(example, tiny_elastic.knob_space.full), (example, foreign)])
    assert engine.num_run == engine.num_remembered == len(engine.store) == 0
    engine.store.add([(example.content_id, foreign, StoredAnswer("", 1, 1))])
    with pytest.raises(KnobError, match="low/8/6"):
        engine.run([(example, foreign)])


def test_unusable_examples_are_refused(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    knobs = tiny_elastic.knob_space.full
    with pytest.raises(QuestionError):
        RolloutEngine(tiny_elastic).run([(dataclasses.replace(law_examples[0], question=" "), knobs)])
    elongated = Image.fromarray(np.zeros((1, 4000, 3), np.uint8))
    with pytest.raises(ImageError, match="elongated"):
        RolloutEngine(tiny_elastic).run([(dataclasses.replace(law_examples[0], source=elongated), knobs)])


def test_a_prefix_is_the_same_to_the_bit_whatever_is_made_with_it(
    tiny_elastic: ElasticModel, law_examples: list[Example]
) -> None:
    together = RolloutEngine(tiny_elastic)._shared_prefixes([(example, "high") for example in law_examples])
    engine = RolloutEngine(tiny_elastic)
    for example, prefix in zip(law_examples, together, strict=True):
        (alone,) = engine._shared_prefixes([(example, "high")])
        assert torch.equal(alone.hidden, prefix.hidden)
        assert all(torch.equal(a, b) for a, b in zip(alone.keys, prefix.keys, strict=True))
