"""Laws of elastic execution: what the block loop gives is what the model gives, whatever else runs beside it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from decoding import generate_with_logits
from families.reference import naive_experts, pad_token_id, reference_pass, transformers_request, weights_of
from families.toy_moe import ToyAdapter
from torch import Tensor

from pacevlm.knobs import Knobs
from pacevlm.models.adapter import EmbeddedPrompt
from pacevlm.models.block_order import BlockOrder
from pacevlm.models.decoder import ElasticDecoder, Generation, Prefix
from pacevlm.models.elastic import ElasticModel
from pacevlm.types import Example

STEPS = 6


def assert_same(found: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> None:
    """Equal but for the rounding of sums in another order: 1e-5 of the largest value, or of one if that is larger."""
    if not isinstance(found, Tensor):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
        return
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


def prompt_of(model: ElasticModel, example: Example, tier: str) -> EmbeddedPrompt:
    prompt = model.adapter.encode_question(example.question)
    prepared = model.adapter.prepare(example.image, prompt, model.vision_budgets[tier])
    return model.adapter.embed(prepared, model.adapter.encode_vision([prepared])[0])


def embed_ids(model: ElasticModel, ids: list[int]) -> Tensor:
    return model.adapter.embed_tokens(torch.tensor(ids, dtype=torch.long, device=model.device))


def random_tokens(model: ElasticModel, *shape: int) -> Tensor:
    """The same on every device."""
    return torch.randn(*shape, model.d_model, generator=torch.Generator().manual_seed(0)).to(model.device)


def prefix_of(model: ElasticModel, example: Example, tier: str) -> Prefix:
    return model.decoder.prefix([prompt_of(model, example, tier)])[0]


def row_logits(generated: list[list[int]], logits: list[Tensor]) -> list[Tensor]:
    """Logits of every row, `(its steps, vocabulary)`: a row is in the batch until it has all its tokens."""
    rows: list[list[Tensor]] = [[] for _ in generated]
    for step, block in enumerate(logits):
        alive = [row for row, tokens in enumerate(generated) if len(tokens) > step]
        for place, row in enumerate(alive):
            rows[row].append(block[place])
        assert len(alive) == block.shape[0]
    return [torch.stack(row) for row in rows]


def generate(
    decoder: ElasticDecoder, prefixes: Sequence[Prefix], knobs: Sequence[Knobs], steps: int = STEPS
) -> tuple[list[list[int]], list[Tensor]]:
    computes = [k.top_k for k in knobs], [k.num_blocks for k in knobs]
    generated, logits = generate_with_logits(decoder, prefixes, *computes, steps)
    return generated, row_logits(generated, logits)


def choose_end(generated: list[list[int]]) -> int:
    """The token which, taken as end-of-text, makes the lengths of these answers differ most."""

    def num_lengths(token: int) -> int:
        return len({row.index(token) if token in row else len(row) for row in generated})

    return max(sorted({token for row in generated for token in row}), key=num_lengths)


def mixed_jobs(model: ElasticModel, examples: list[Example]) -> list[tuple[Example, Knobs]]:
    """Every example with several knobs, so that tier, top_k, num_blocks and prompt length all differ."""
    space = model.knob_space
    pairs = list(range(0, space.num_stage2, max(1, space.num_stage2 // 3)))
    jobs = []
    for i, example in enumerate(examples):
        for j, pair in enumerate(pairs):
            jobs.append((example, Knobs(space.tiers[(i + j) % len(space.tiers)], *space.compute(pair))))
        jobs.append((example, space.full))
    return jobs


def test_full_knobs_are_the_unmodified_checkpoint(law_model: ElasticModel, law_examples: list[Example]) -> None:
    space = law_model.knob_space
    full = Knobs(space.tiers[-1], law_model.trained_top_k, law_model.adapter.num_blocks)
    for example in (law_examples[1], law_examples[3]):
        prompt = prompt_of(law_model, example, full.tier)
        generated, logits = generate(law_model.decoder, law_model.decoder.prefix([prompt]), [full])
        whole = reference_pass(law_model, prompt, embed_ids(law_model, generated[0][:-1]))
        assert_same(logits[0], whole.logits[len(prompt.hidden) - 1 :])


@pytest.mark.parametrize("with_image", [True, False])
def test_full_knobs_are_what_transformers_generates(
    law_model: ElasticModel, law_examples: list[Example], with_image: bool
) -> None:
    if isinstance(law_model.adapter, ToyAdapter):
        pytest.skip("transformers does not know this family")
    space, adapter = law_model.knob_space, law_model.adapter
    full = Knobs(space.tiers[-1], law_model.trained_top_k, adapter.num_blocks)
    for example in (law_examples[1], law_examples[3]):
        batch, prompt = transformers_request(law_model, example, full.tier, with_image)
        generated, logits = generate(law_model.decoder, law_model.decoder.prefix([prompt]), [full])
        tokens, prompt_length = generated[0], batch["input_ids"].shape[1]
        fed = torch.cat([batch["input_ids"], batch["input_ids"].new_tensor([tokens[:-1]])], dim=1)
        types = batch.get("mm_token_type_ids")
        more = {} if types is None else {"mm_token_type_ids": F.pad(types, (0, len(tokens) - 1))}
        images = {name: batch[name] for name in batch if name.startswith(("image", "pixel"))}
        with torch.no_grad():
            out = adapter.model(input_ids=fed, use_cache=False, **images, **more)
        assert_same(logits[0], out.logits[0, prompt_length - 1 :])
        ends, pad = sorted(adapter.end_token_ids), pad_token_id(law_model)
        whole = adapter.model.generate(
            **batch, max_new_tokens=STEPS, do_sample=False, eos_token_id=ends, pad_token_id=pad
        )
        assert whole[0, prompt_length:].tolist() == tokens


def test_mixed_batch_gives_every_row_what_it_gets_alone(
    law_model: ElasticModel, law_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = mixed_jobs(law_model, law_examples)
    knobs = [k for _, k in jobs]
    embeddings = [prompt_of(law_model, example, k.tier) for example, k in jobs]
    lone = [law_model.decoder.prefix([e])[0] for e in embeddings]
    monkeypatch.setattr(law_model.adapter, "end_token_ids", frozenset({-1}))
    endless = law_model.decoder.generate(lone, [k.top_k for k in knobs], [k.num_blocks for k in knobs], STEPS)
    monkeypatch.setattr(law_model.adapter, "end_token_ids", frozenset({choose_end(endless)}))

    together = law_model.decoder.prefix(embeddings)
    for alone, row in zip(lone, together, strict=True):
        assert_same(row.hidden, alone.hidden)
        assert_same(row.keys, alone.keys)
        assert_same(row.values, alone.values)
    generated, logits = generate(law_model.decoder, together, knobs)
    assert len({len(row) for row in generated}) >= 2  # rows really leave at different steps
    assert len({p.num_tokens for p in together}) >= 3
    for i, prefix in enumerate(lone):
        one, one_logits = generate(law_model.decoder, [prefix], [knobs[i]])
        assert generated[i] == one[0]
        assert_same(logits[i], one_logits[0])


def test_rows_share_every_block_up_to_the_first_they_disagree_on(
    law_model: ElasticModel, law_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(law_model.adapter, "end_token_ids", frozenset({-1}))
    space, order, after = law_model.knob_space, law_model.order, law_model.stage2_after
    prefixes = [prefix_of(law_model, example, space.full.tier) for example in law_examples[:2]]
    jobs = [(prefix, Knobs(space.full.tier, *space.compute(i))) for prefix in prefixes for i in range(space.num_stage2)]
    # In no order at all: what is shared must be found, not come side by side.
    jobs = [jobs[i] for i in torch.randperm(len(jobs), generator=torch.Generator().manual_seed(0)).tolist()]
    expected = 0
    for block in range(after, law_model.adapter.num_blocks):
        histories = {
            (id(prefix), knobs.top_k, tuple(b for b in order.kept(knobs.num_blocks) if b < block))
            for prefix, knobs in jobs
            if block in order.kept(knobs.num_blocks)
        }
        expected += len(histories)
    num_rows, mix_experts = 0, law_model.adapter.mix_experts

    def count(block: int, x: Tensor, top_k: int | Tensor) -> Tensor:
        nonlocal num_rows
        num_rows += x.shape[0]
        return mix_experts(block, x, top_k)

    with monkeypatch.context() as counting:
        counting.setattr(law_model.adapter, "mix_experts", count)
        law_model.decoder.generate(
            [prefix for prefix, _ in jobs], [k.top_k for _, k in jobs], [k.num_blocks for _, k in jobs], 1
        )
    assert num_rows == expected < len(jobs) * (law_model.adapter.num_blocks - after)
    generated, logits = generate(law_model.decoder, [prefix for prefix, _ in jobs], [knobs for _, knobs in jobs])
    for i in range(0, len(jobs), 7):
        one, one_logits = generate(law_model.decoder, [jobs[i][0]], [jobs[i][1]])
        assert generated[i] == one[0]
        assert_same(logits[i], one_logits[0])


def test_rows_that_leave_do_not_disturb_the_others(
    tiny_elastic: ElasticModel, law_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = mixed_jobs(tiny_elastic, law_examples)
    prefixes, knobs = [prefix_of(tiny_elastic, e, k.tier) for e, k in jobs], [k for _, k in jobs]
    monkeypatch.setattr(tiny_elastic.adapter, "end_token_ids", frozenset({-1}))
    stayed, stayed_logits = generate(tiny_elastic.decoder, prefixes, knobs)
    for end in sorted({row[1] for row in stayed})[:4]:
        monkeypatch.setattr(tiny_elastic.adapter, "end_token_ids", frozenset({end}))
        generated, logits = generate(tiny_elastic.decoder, prefixes, knobs)
        assert any(len(row) < STEPS for row in generated)
        for row, whole, row_logits_, whole_logits in zip(generated, stayed, logits, stayed_logits, strict=True):
            assert row == whole[: whole.index(end) + 1 if end in whole else STEPS]
            assert_same(row_logits_, whole_logits[: len(row)])


def test_order_of_rows_does_not_matter(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    jobs = mixed_jobs(tiny_elastic, law_examples)
    prefixes, knobs = [prefix_of(tiny_elastic, e, k.tier) for e, k in jobs], [k for _, k in jobs]
    forwards, _ = generate(tiny_elastic.decoder, prefixes, knobs)
    backwards, _ = generate(tiny_elastic.decoder, prefixes[::-1], knobs[::-1])
    assert forwards == backwards[::-1]


def test_skipped_blocks_keep_no_keys_and_values(
    law_model: ElasticModel, law_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    space, order, first = law_model.knob_space, law_model.order, law_model.stage2_after
    counts = [space.num_blocks[0], space.num_blocks[-1], space.num_blocks[1], space.num_blocks[0]]
    prefixes = [prefix_of(law_model, example, space.tiers[0]) for example in law_examples]
    top_k = [space.top_ks[-1]] * len(counts)

    def check(loop: Generation) -> None:
        for block in range(law_model.adapter.num_blocks):
            keeping = [i for i, row in enumerate(loop.alive) if block < first or block in order.kept(counts[row])]
            cache = loop.caches.get(block)
            if not keeping:
                assert cache is None
                continue
            assert cache is not None
            assert cache.keys.shape[0] == cache.values.shape[0] == len(keeping)
            places = list(range(len(loop.alive))) if cache.rows is None else cache.rows.tolist()
            assert places == keeping

    loop = Generation(law_model.decoder, prefixes, top_k, counts, STEPS)
    loop.step()
    check(loop)
    # The second row, the only one that keeps every block, ends at the next step, and with it the first block to go.
    (end,) = {row[1] for row in law_model.decoder.generate(prefixes[1:2], top_k[1:2], counts[1:2], 2)}
    monkeypatch.setattr(law_model.adapter, "end_token_ids", frozenset({end}))
    loop.step()
    assert 1 not in loop.alive
    if loop.alive:
        check(loop)
        assert order.removal[0] not in loop.caches
        loop.step()
        check(loop)


def test_a_block_that_every_row_skips_equals_a_model_without_it(
    law_model: ElasticModel, law_examples: list[Example]
) -> None:
    space = law_model.knob_space
    for num_blocks in space.num_blocks:
        removed = set(range(law_model.adapter.num_blocks)) - set(law_model.order.kept(num_blocks))
        knobs = [Knobs(space.tiers[0], law_model.trained_top_k, num_blocks)] * 2
        prompts = [prompt_of(law_model, example, space.tiers[0]) for example in law_examples[:2]]
        generated, logits = generate(law_model.decoder, law_model.decoder.prefix(prompts), knobs, 3)
        for prompt, tokens, found in zip(prompts, generated, logits, strict=True):
            whole = reference_pass(law_model, prompt, embed_ids(law_model, tokens[:-1]), removed=removed)
            assert_same(found, whole.logits[len(prompt.hidden) - 1 :])


def test_smaller_top_k_keeps_the_leading_experts_as_the_family_was_trained(law_model: ElasticModel) -> None:
    space = law_model.knob_space
    x = random_tokens(law_model, len(space.top_ks), 4)
    for block in (0, law_model.adapter.num_blocks - 1):
        naive = torch.stack([naive_experts(law_model, block, row, k) for row, k in zip(x, space.top_ks, strict=True)])
        mixed = law_model.adapter.mix_experts(block, x, torch.tensor(space.top_ks, device=x.device))
        torch.testing.assert_close(mixed, naive, atol=1e-5, rtol=1e-4)
        for i, k in enumerate(space.top_ks):
            assert_same(law_model.adapter.mix_experts(block, x[i : i + 1], k)[0], mixed[i])


def test_smaller_top_k_holds_behind_stage_2_only(law_model: ElasticModel, law_examples: list[Example]) -> None:
    space, num_blocks = law_model.knob_space, law_model.adapter.num_blocks
    prompt = prompt_of(law_model, law_examples[2], space.tiers[0])
    prefix = law_model.decoder.prefix([prompt])
    for top_k in space.top_ks[:2]:
        per_block = [law_model.trained_top_k] * law_model.stage2_after
        per_block += [top_k] * (num_blocks - law_model.stage2_after)
        generated, logits = generate(law_model.decoder, prefix, [Knobs(space.tiers[0], top_k, num_blocks)], 3)
        whole = reference_pass(law_model, prompt, embed_ids(law_model, generated[0][:-1]), top_ks=per_block)
        assert_same(logits[0], whole.logits[len(prompt.hidden) - 1 :])


def with_stage2_after(model: ElasticModel, stage2_after: int) -> ElasticDecoder:
    removal = tuple(block for block in model.order.removal if block >= stage2_after)
    return ElasticDecoder(model.adapter, BlockOrder(model.adapter.num_blocks, removal), stage2_after)


@pytest.mark.parametrize("stage2_after", [1, 2])
def test_latency_token_is_a_real_last_token(
    law_model: ElasticModel, law_examples: list[Example], stage2_after: int
) -> None:
    decoder, space = with_stage2_after(law_model, stage2_after), law_model.knob_space
    prompts = [prompt_of(law_model, e, t) for e, t in zip(law_examples, space.tiers, strict=False)]
    prefixes = decoder.prefix(prompts)
    groups = random_tokens(law_model, 6).split([2, 1, 3])
    outputs = decoder.latency_token(prefixes, groups).split([2, 1, 3])
    for prompt, prefix, group, found in zip(prompts, prefixes, groups, outputs, strict=True):
        for token, output in zip(group, found, strict=True):
            state = reference_pass(law_model, prompt, token[None]).states[stage2_after - 1]
            assert_same(output, state[-1])
            # The prompt's states are those behind which no token stood.
            assert_same(prefix.hidden, state[:-1])


@pytest.mark.parametrize("stage2_after", [1, 2])
def test_latency_token_leaves_no_trace(law_model: ElasticModel, law_examples: list[Example], stage2_after: int) -> None:
    decoder, space = with_stage2_after(law_model, stage2_after), law_model.knob_space
    knobs = [
        Knobs(t, space.top_ks[i % len(space.top_ks)], space.num_blocks[-1 - i % 2]) for i, t in enumerate(space.tiers)
    ]
    embeddings = [prompt_of(law_model, e, k.tier) for e, k in zip(law_examples, knobs, strict=False)]

    def run(token: Tensor | None) -> tuple[list[Prefix], Tensor | None, list[Tensor], dict[int, tuple[Tensor, Tensor]]]:
        prefixes, output = decoder.prefix(embeddings), None
        if token is not None:
            output = decoder.latency_token(prefixes, [token[None]] * len(prefixes))
        loop = Generation(decoder, prefixes, [k.top_k for k in knobs], [k.num_blocks for k in knobs], 3)
        logits = []
        while loop.alive:
            logits.append(loop.step().clone())
        return prefixes, output, logits, {block: (c.keys, c.values) for block, c in loop.caches.items()}

    small, large = random_tokens(law_model, 2)
    tokens = [None, 0.1 * small, 10.0 * large]
    none, low, high = (run(token) for token in tokens)
    assert not torch.equal(low[1], high[1])

    def equal(one: Tensor, other: Tensor) -> bool:
        # On a GPU the experts' outputs add up in an order that changes from run to run.
        rounding = 1e-5 * max(1.0, float(other.abs().max())) if one.is_cuda else 0.0
        return torch.allclose(one, other, rtol=0, atol=rounding)

    for seen in (low, high):
        for prefix, plain in zip(seen[0], none[0], strict=True):
            assert equal(prefix.hidden, plain.hidden)
            assert all(map(equal, prefix.keys + prefix.values, plain.keys + plain.values))
        assert all(map(equal, seen[2], none[2]))
        assert seen[3].keys() == none[3].keys()
        assert all(equal(a, b) for block in none[3] for a, b in zip(seen[3][block], none[3][block], strict=True))


def test_stage_2_after_two_blocks_is_the_same_model(law_model: ElasticModel, law_examples: list[Example]) -> None:
    later, space = with_stage2_after(law_model, 2), law_model.knob_space
    num_blocks = law_model.adapter.num_blocks
    embeddings = [prompt_of(law_model, example, space.tiers[0]) for example in law_examples]
    full = [Knobs(space.tiers[0], law_model.trained_top_k, num_blocks)] * len(embeddings)
    _, expected = generate(law_model.decoder, law_model.decoder.prefix(embeddings), full, 3)
    _, found = generate(later, later.prefix(embeddings), full, 3)
    assert_same(found, expected)

    # With fewer experts, the second block keeps the trained number of them.
    top_k = space.top_ks[0]
    per_block = [law_model.trained_top_k] * 2 + [top_k] * (num_blocks - 2)
    _, found = generate(later, later.prefix(embeddings[:1]), [Knobs(space.tiers[0], top_k, num_blocks)], 1)
    nothing = embeddings[0].hidden[:0]
    assert_same(found[0][0], reference_pass(law_model, embeddings[0], nothing, top_ks=per_block).logits[-1])


def test_gradient_reaches_tokens_and_no_weight(law_model: ElasticModel, law_examples: list[Example]) -> None:
    space = law_model.knob_space
    prefixes = [prefix_of(law_model, example, space.tiers[0]) for example in law_examples[:2]]
    tokens = random_tokens(law_model, 3).requires_grad_()
    output = law_model.decoder.latency_token(prefixes, [tokens[:2], tokens[2:]])
    output.square().sum().backward()
    assert tokens.grad is not None
    assert (tokens.grad.abs().sum(1) > 0).all()
    assert all(weight.grad is None and not weight.requires_grad for weight in weights_of(law_model))

    # One token's gradient is its own: a change of another token leaves it alone, and it is the numerical one.
    def loss(x: Tensor) -> Tensor:
        return law_model.decoder.latency_token(prefixes, [x[:2], x[2:]])[0].square().sum()

    x = tokens.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    assert (gradient[1:] == 0).all()
    direction = torch.zeros_like(x).detach()
    direction[0] = gradient[0] / gradient[0].norm()
    step = 1e-2
    with torch.no_grad():
        numeric = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    torch.testing.assert_close(numeric, gradient[0].norm(), rtol=2e-2, atol=1e-3)


def test_a_step_appends_a_token_to_every_row_that_is_alive(
    tiny_elastic: ElasticModel, law_examples: list[Example]
) -> None:
    prefixes = [prefix_of(tiny_elastic, example, "low") for example in law_examples[:2]]
    generation = Generation(tiny_elastic.decoder, prefixes, [4, 3], [6, 5], 4)
    assert generation.alive == [0, 1]
    while generation.alive:
        alive, before = list(generation.alive), [len(row) for row in generation.generated]
        logits = generation.step()
        assert logits.shape[0] == len(alive)
        for row in (0, 1):
            assert len(generation.generated[row]) - before[row] == (row in alive)
    assert generation.generated == tiny_elastic.decoder.generate(prefixes, [4, 3], [6, 5], 4)


def test_one_token_alone_gets_what_it_gets_among_others(law_model: ElasticModel) -> None:
    tokens, adapter = random_tokens(law_model, 1, 5), law_model.adapter
    for top_k in range(1, adapter.num_experts + 1):
        together = adapter.mix_experts(2, tokens, top_k)
        for token in range(tokens.shape[1]):
            part = slice(token, token + 1)
            assert_same(adapter.mix_experts(2, tokens[:, part], top_k), together[:, part])
