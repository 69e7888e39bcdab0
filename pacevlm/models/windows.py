"""Which tokens see which in blocks whose attention has a window, where a picture's tokens may see each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pacevlm.models.adapter import EmbeddedPrompt


def prompt_mask(prompts: Sequence[EmbeddedPrompt], num_tokens: int, window: int) -> Tensor | None:
    """What tokens of padded prompts see: what is before them inside the window, and all of their own span behind them.

    Args:
        prompts: one per row.
        num_tokens: of the longest.
        window: how many tokens back a token sees, itself included.

    Returns:
        `(rows, 1, tokens, tokens)`, one row for all where rows do not differ; None where causal order says it all.
    """
    spans = [prompt.seen_both_ways for prompt in prompts]
    if num_tokens <= window and not any(spans):
        return None
    places = torch.arange(num_tokens, device=prompts[0].hidden.device)
    behind, window_start = places <= places[:, None], places > places[:, None] - window
    if not any(spans):
        return (behind & window_start)[None, None]
    some = spans[:1] if len(set(spans)) == 1 else spans
    ends = torch.tensor([span or (0, 0) for span in some], device=places.device)
    inside = (places >= ends[:, :1]) & (places < ends[:, 1:])
    seen = behind | inside[:, :, None] & inside[:, None]
    return (seen & window_start)[:, None]


def window_start(places: Tensor, key_places: Tensor, window: int) -> Tensor:
    """Which keys are inside the window of a query, `(rows, 1, queries, keys)`, whatever else is masked.

    Args:
        places: of the queries, `(rows, queries)`.
        key_places: `(rows, keys)`, or `(1, keys)` if they are the same for all.
    """
    return (key_places[:, None] > places[..., None] - window)[:, None]
