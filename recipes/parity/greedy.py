"""Greedy decoding through the model's own forward, for rows that are padded in front or behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pacevlm.models.molmoe.modeling_molmoe import MolmoEForConditionalGeneration


def decode_greedily(
    model: MolmoEForConditionalGeneration,
    inputs: dict[str, Tensor],
    num_tokens: int,
    follow: Tensor | None = None,
    **knobs: Any,
) -> tuple[Tensor, Tensor]:
    """Greedy decoding with a cache, for rows that are padded on either side; no token ends it.

    Generated tokens are appended behind the padding, whose mask stays 0, and positions continue from each row's last.

    Args:
        model: the model, which sees the image in the first step only.
        inputs: `input_ids` and `attention_mask`, both `(batch, tokens)`, and the image inputs if there are any.
        num_tokens: how many tokens to generate.
        follow: `(batch, num_tokens)`, tokens to continue with instead of the generated ones.
        knobs: `top_k_per_block` and `removed_blocks`.

    Returns:
        generated ids `(batch, num_tokens)` and the logits that chose them `(batch, num_tokens, embedding_size)`.
    """
    mask = inputs["attention_mask"]
    last = last_positions(mask)
    out = model(**inputs, use_cache=True, **knobs)
    step_logits = [out.logits[torch.arange(len(last)), last]]
    ids = [step_logits[0].argmax(-1)]
    for step in range(1, num_tokens):
        token = ids[-1] if follow is None else follow[:, step - 1]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        out = model(token[:, None], attention_mask=mask, past_key_values=out.past_key_values, use_cache=True, **knobs)
        step_logits.append(out.logits[:, -1])
        ids.append(step_logits[-1].argmax(-1))
    return torch.stack(ids, 1), torch.stack(step_logits, 1)


def last_positions(mask: Tensor) -> Tensor:
    """Place of each row's last real token, `(batch, tokens)` to `(batch,)`."""
    return (mask * torch.arange(mask.shape[1])).argmax(1)
