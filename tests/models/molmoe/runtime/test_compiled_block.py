"""Compiled loops compute what torch computes, but for rounding, and stay out of the way where they cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoding import generate_with_logits
from torch import Tensor

from pacevlm.knobs import Knobs
from pacevlm.models.decoder import Prefix
from pacevlm.models.elastic import ElasticModel
from pacevlm.models.molmoe import MolmoEForConditionalGeneration
from pacevlm.models.molmoe.blocks import rope_tables
from pacevlm.models.molmoe.runtime import compiled_block, loading
from pacevlm.models.molmoe.runtime.adapter import MolmoEAdapter
from pacevlm.models.molmoe.runtime.compiled_adapter import CompiledMolmoEAdapter
from pacevlm.models.molmoe.runtime.compiled_block import CompiledBlock
from pacevlm.models.molmoe.runtime.frozen_block import FrozenBlock
from pacevlm.request.run import run_forced
from pacevlm.types import Example

MakeModel = Callable[..., MolmoEForConditionalGeneration]
STEPS = 6


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["small block", "large block"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that one core runs alone, and such that leave their products to torch."""
    if request.param == "large block":
        monkeypatch.setattr(compiled_block, "ONE_CORE_WEIGHTS", 0)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 7), (2, 40)], ids=str)
@pytest.mark.parametrize("top_k", [3, 1, (1, 4)], ids=str)
@pytest.mark.parametrize("few_rows", [1000, 0])
@torch.no_grad()
def test_compiled_and_frozen_blocks_agree(
    make_model: MakeModel,
    monkeypatch: pytest.MonkeyPatch,
    num_kv_heads: int,
    shape: tuple[int, int],
    top_k: int | tuple[int, int],
    few_rows: int,
) -> None:
    monkeypatch.setattr(compiled_block, "FEW_ROWS", few_rows)
    # 32 outputs of 13 numbers: the compiled products take 3 and, vectorised, 8 at a time.
    model = make_model(seed=1, n_kv_heads=num_kv_heads, mlp_hidden_size=26)
    frozen = FrozenBlock.from_module(model.model.transformer.blocks[1])  # type: ignore[arg-type]
    compiled = CompiledBlock(frozen)
    batch, num_tokens = shape
    per_row = top_k if isinstance(top_k, int) else torch.tensor(top_k[:batch])
    # Every second token: what a block is given need not lie in one piece.
    x = random(batch, 2 * num_tokens, model.config.d_model)[:, ::2]
    positions = 3 + torch.arange(num_tokens)[None] + (torch.arange(batch)[:, None] if num_tokens == 1 else 0)
    rope = rope_tables(positions, model.config.head_dim_, model.config.rope_theta)
    q, k, v = compiled.project(x, rope)
    for found, expected in zip((q, k, v), frozen.project(x, rope), strict=True):
        close(found, expected)
    x = x + compiled.attend(q, k, v, None, True)
    close(compiled.mix_experts(x, per_row), frozen.mix_experts(x, per_row))


@pytest.mark.parametrize("size", [1.0, 1e-3, 300.0])
@torch.no_grad()
def test_tokens_of_any_size(make_model: MakeModel, size: float) -> None:
    frozen = FrozenBlock.from_module(make_model(seed=2).model.transformer.blocks[1])  # type: ignore[arg-type]
    for num_tokens in (1, 5):
        x = size * random(1, num_tokens, 32)
        # The router's logits grow with the norm's weight, far beyond what an exponential can take.
        frozen.ff_norm.fill_(size)
        found = CompiledBlock(frozen).mix_experts(x, 2)
        assert torch.isfinite(found).all()
        close(found, frozen.mix_experts(x, 2))


def test_gradients_are_the_frozen_blocks(make_model: MakeModel) -> None:
    model = make_model(seed=3).requires_grad_(False)
    frozen = FrozenBlock.from_module(model.model.transformer.blocks[0])  # type: ignore[arg-type]
    rope = rope_tables(torch.arange(4)[None], model.config.head_dim_, model.config.rope_theta)
    gradients = []
    for block in (frozen, CompiledBlock(frozen)):
        x = random(1, 4, 32).requires_grad_()
        q, k, v = block.project(x, rope)
        (block.attend(q, k, v, None, True) + block.mix_experts(x, 2)).square().sum().backward()  # type: ignore[no-untyped-call]
        gradients.append(x.grad)
    assert gradients[0] is not None
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)  # type: ignore[arg-type]


def test_weights_are_the_modules_own(make_model: MakeModel) -> None:
    block: Any = make_model().model.transformer.blocks[0]
    compiled = CompiledBlock(FrozenBlock.from_module(block))
    pointers = {value.ctypes.data for value in vars(compiled).values() if isinstance(value, np.ndarray)}
    assert pointers == {parameter.data_ptr() for parameter in block.parameters()}


def prefixes_of(model: ElasticModel, examples: list[Example]) -> list[Prefix]:
    prefixes = []
    for example in examples:
        prompt = model.adapter.encode_question(example.question)
        prepared = model.adapter.prepare(example.image, prompt, model.vision_budgets["high"])
        embeddings = model.adapter.embed(prepared, model.adapter.encode_vision([prepared])[0])
        prefixes += model.decoder.prefix([embeddings])
    return prefixes


def generate(model: ElasticModel, prefix: Prefix, knobs: Knobs) -> tuple[list[int], Tensor]:
    tokens, logits = generate_with_logits(model.decoder, [prefix], [knobs.top_k], [knobs.num_blocks], STEPS)
    return tokens[0], torch.cat(logits)


@torch.inference_mode()
def test_steps_of_one_row_are_the_loops_steps(
    law_model: ElasticModel, law_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = law_model.adapter
    if adapter.compiler != "numba":
        pytest.skip("loops are compiled for MolmoE on a CPU")
    assert isinstance(adapter, CompiledMolmoEAdapter)
    assert adapter.row_decode(10) is not None
    monkeypatch.setattr(adapter, "end_token_ids", frozenset({-1}))
    prefixes = prefixes_of(law_model, law_examples)
    token = 0.1 * random(1, law_model.d_model)
    for prefix in prefixes:
        for knobs in list(law_model.knob_space)[::7]:
            tokens, logits = generate(law_model, prefix, knobs)
            output = law_model.decoder.latency_token([prefix], [token])
            with monkeypatch.context() as loop:
                loop.setattr(adapter, "row_decode", lambda _: None)
                expected_tokens, expected = generate(law_model, prefix, knobs)
                close(output, law_model.decoder.latency_token([prefix], [token]))
            assert tokens == expected_tokens
            close(logits, expected)


@torch.no_grad()
def test_large_blocks_have_no_steps_of_one_row(
    tiny_elastic_dir: Path, law_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ElasticModel.from_pretrained(tiny_elastic_dir)
    monkeypatch.setattr(compiled_block, "ONE_CORE_WEIGHTS", 0)
    large = ElasticModel.from_pretrained(tiny_elastic_dir)
    assert large.adapter.row_decode(10) is None
    full, example = small.knob_space.full, law_examples[1]
    answers = [run_forced(model, example.image, example.question, full).token_ids for model in (small, large)]
    assert answers[0] == answers[1]


@torch.no_grad()
def test_a_large_block_reads_only_the_experts_of_a_single_token(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_block, "ONE_CORE_WEIGHTS", 0)
    frozen = FrozenBlock.from_module(make_model(seed=1).model.transformer.blocks[1])  # type: ignore[arg-type]
    compiled, x = CompiledBlock(frozen), random(1, 1, 32)

    def refuse(*_: Tensor) -> Tensor:
        raise AssertionError("a grouped product walks over all experts")

    monkeypatch.setattr(compiled_block, "grouped_product", refuse)
    close(compiled.mix_experts(x, 2), frozen.mix_experts(x, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_without_numba_the_answers_are_the_same(
    tiny_elastic_dir: Path, law_examples: list[Example], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    compiled = ElasticModel.from_pretrained(tiny_elastic_dir, dtype=dtype)
    monkeypatch.setattr(loading, "find_spec", lambda _: None)
    plain = ElasticModel.from_pretrained(tiny_elastic_dir, dtype=dtype)
    assert type(plain.adapter) is MolmoEAdapter
    assert isinstance(compiled.adapter, CompiledMolmoEAdapter) == (dtype == torch.float32)
    assert plain.identity == compiled.identity
    for example in law_examples:
        for knobs in list(plain.knob_space)[::11]:
            one, other = (run_forced(model, example.image, example.question, knobs) for model in (plain, compiled))
            assert one.token_ids == other.token_ids
