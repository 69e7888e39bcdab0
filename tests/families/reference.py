"""What every law compares the elastic loop with: one plain pass of the checkpoint, whatever its family."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from families import tiny_gemma4 as gemma
from families import tiny_qwen3_vl as qwen
from families.toy_moe import ToyAdapter, plain_pass
from families.toy_moe import naive_experts as naive_toy_experts
from pacevlm.models.adapter import EmbeddedPrompt
from pacevlm.models.elastic import ElasticModel
from pacevlm.models.gemma4.adapter import Gemma4Adapter
from pacevlm.models.qwen3_vl.adapter import Qwen3VLAdapter
from pacevlm.types import Example


class Pass(NamedTuple):
    """The stream behind the blocks that ran, `(tokens, d_model)` each, and the logits `(tokens, vocabulary)`."""

    states: list[Tensor]
    logits: Tensor


@torch.no_grad()
def reference_pass(
    model: ElasticModel,
    prompt: EmbeddedPrompt,
    behind: Tensor,
    *,
    removed: Collection[int] = (),
    top_ks: Sequence[int] | None = None,
) -> Pass:
    """Run the checkpoint on a prompt and what follows it.

    Args:
        behind: embeddings that follow the prompt, `(more, d_model)`.
        removed: blocks that are left out.
        top_ks: experts per token, one number per block of the checkpoint; the trained one if None.
    """
    adapter = model.adapter
    if isinstance(adapter, ToyAdapter):
        each = [model.trained_top_k] * adapter.num_blocks if top_ks is None else top_ks
        return Pass(*plain_pass(adapter, prompt, behind, removed, each))
    if isinstance(adapter, Qwen3VLAdapter):
        return Pass(*qwen.transformers_pass(adapter, prompt, behind, removed, top_ks))
    if isinstance(adapter, Gemma4Adapter):
        return Pass(*gemma.transformers_pass(adapter, prompt, behind, removed, top_ks))
    out = adapter.model(
        inputs_embeds=torch.cat([prompt.hidden, behind])[None],
        use_cache=False,
        output_hidden_states=True,
        removed_blocks=tuple(removed),
        top_k_per_block=top_ks,
    )
    return Pass([state[0] for state in out.hidden_states[1:]], out.logits[0])


def naive_experts(model: ElasticModel, block: int, x: Tensor, top_k: int) -> Tensor:
    """One token after the other, one expert after the other; `x` is `(tokens, d_model)`."""
    if isinstance(model.adapter, ToyAdapter):
        return naive_toy_experts(model.adapter, block, x, top_k)
    if isinstance(model.adapter, Qwen3VLAdapter):
        return qwen.naive_experts(model.adapter, block, x, top_k)
    if isinstance(model.adapter, Gemma4Adapter):
        return gemma.naive_experts(model.adapter, block, x, top_k)
    mlp = model.adapter.model.model.transformer.blocks[block].mlp
    out = torch.zeros_like(x)
    for t, row in enumerate(x):
        h = mlp.ff_norm.weight * row / torch.sqrt(row.pow(2).mean() + mlp.ff_norm.eps)
        share = torch.softmax(mlp.gate.weight @ h, dim=0)
        for expert in sorted(range(share.numel()), key=lambda e: -float(share[e]))[:top_k]:
            gate, up = (mlp.experts.gate_up_proj[expert] @ h).chunk(2)
            out[t] += share[expert] * (mlp.experts.down_proj[expert] @ (gate * torch.sigmoid(gate) * up))
    return out


def weights_of(model: ElasticModel) -> list[Tensor]:
    """All weights of a model."""
    adapter = model.adapter
    return list(adapter.weights.values()) if isinstance(adapter, ToyAdapter) else list(adapter.model.parameters())


def transformers_request(
    model: ElasticModel, example: Example, tier: str, with_image: bool
) -> tuple[dict[str, Tensor], EmbeddedPrompt]:
    """What transformers' own model is given for a question, with or without its picture, and what the blocks read."""
    adapter, budget = model.adapter, model.vision_budgets[tier]
    image = example.image if with_image else None
    prepared = adapter.prepare(image, adapter.encode_question(example.question, with_image), budget)
    prompt = adapter.embed(prepared, adapter.encode_vision([prepared])[0] if with_image else None)
    if isinstance(adapter, Qwen3VLAdapter):
        batch = qwen.transformers_inputs(adapter, image, example.question, budget)
    elif isinstance(adapter, Gemma4Adapter):
        batch = gemma.transformers_inputs(adapter, image, example.question, budget)
    elif with_image:
        batch = adapter.processor(images=example.image, text=example.question, max_crops=budget)
    else:
        batch = adapter.processor(text=example.question)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return {name: values.to(model.device) for name, values in batch.items()}, prompt


def pad_token_id(model: ElasticModel) -> int:
    """The token that fills rows that ended."""
    adapter = model.adapter
    tokenizer = (
        adapter.tokenizer if isinstance(adapter, (Qwen3VLAdapter, Gemma4Adapter)) else adapter.processor.tokenizer
    )
    return tokenizer.pad_token_id
