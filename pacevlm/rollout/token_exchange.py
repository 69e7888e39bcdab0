"""Latency tokens that run on other ranks: tokens out, outputs back; in the backward pass gradients out and back.

The controller is on rank 0 alone, and only the latency token's way through the frozen blocks has to be differentiated
where the prefixes are. So what crosses is a vector for each visit and direction, and no gradient of a weight.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pacevlm.models.elastic import ElasticModel
from pacevlm.rollout.ranks import HelperRank, Place, Ranks
from pacevlm.types import Example

_numbers = itertools.count(1)


def spread_tokens(
    ranks: Ranks,
    model: ElasticModel,
    examples: Sequence[Example],
    tiers: Sequence[str],
    tokens: Tensor,
    rank_of: Mapping[Place, int],
    run_here: Callable[[list[Example], list[str], Tensor], Tensor],
) -> Tensor:
    """Outputs of latency tokens `(n, d_model)`, differentiable in them, each from the rank of its content and tier.

    Args:
        examples, tiers: one per token.
        rank_of: where each content and tier runs.
        run_here: rank 0's own part.
    """
    for visit, rank in rank_of.items():
        ranks.ready.setdefault(visit, set()).add(rank)
    at = [rank_of[example.content_id, tier] for example, tier in zip(examples, tiers, strict=True)]
    places = [[i for i, rank in enumerate(at) if rank == this] for this in range(len(ranks))]
    (own_examples, own_tiers), *others = [([examples[i] for i in part], [tiers[i] for i in part]) for part in places]
    parts = [Part(helper, *other) for helper, other in zip(ranks.helpers, others, strict=True) if other[0]]
    order = torch.tensor([i for part in places for i in part], device=tokens.device)
    # index_select: the gradient of plain indexing adds up in an order that depends on the threads.
    mine, theirs = tokens.index_select(0, order).split([len(own_examples), len(at) - len(own_examples)])
    exchange = TokenExchange(model.identity, parts)
    begun = exchange.begin(theirs) if parts else theirs
    started = time.monotonic()
    here = run_here(own_examples, own_tiers, mine)
    ranks.note(0, time.monotonic() - started, model.device)
    there = exchange.end(begun) if parts else theirs
    return torch.cat([here, there]).index_select(0, order.argsort())


class Part(NamedTuple):
    """What one rank runs: one example and tier for each of its tokens."""

    helper: HelperRank
    examples: list[Example]
    tiers: list[str]


class TokenExchange:
    """One pass of latency tokens on other ranks.

    The other ranks work between `begin` and `end`, and so does rank 0 meanwhile; in the backward pass the same in
    reverse. They keep what a backward pass needs until this one's graph is gone.

    Args:
        model_identity: the model that they have to hold.
        parts: what each rank runs.
    """

    def __init__(self, model_identity: str, parts: Sequence[Part]) -> None:
        self._model, self._parts = model_identity, parts
        self._sizes = [len(part.examples) for part in parts]
        self._graph: int | None = None
        self._asked: list[Future[tuple[dict[str, Any], list[Tensor]]]] = []

    def __del__(self) -> None:
        if self._graph is not None:
            for part in self._parts:
                part.helper.forgotten_graphs.append(self._graph)

    def begin(self, tokens: Tensor) -> Tensor:
        """Send `(n, d_model)` tokens, those of one part behind those of the other; returns what `end` takes."""
        if tokens.requires_grad and torch.is_grad_enabled():
            self._graph = next(_numbers)
        begun: Tensor = _Begin.apply(tokens, self)  # type: ignore[no-untyped-call]
        return begun

    def end(self, begun: Tensor) -> Tensor:
        """The outputs `(n, d_model)` of the tokens, differentiable in them."""
        outputs: Tensor = _End.apply(begun, self)  # type: ignore[no-untyped-call]
        return outputs

    def send(self, tokens: Tensor) -> None:
        """Ask every rank for its tokens' outputs."""
        self._asked = [
            part.helper.submit(
                "tokens",
                [piece],
                part.examples,
                model=self._model,
                visits=[[e.content_id, tier] for e, tier in zip(part.examples, part.tiers, strict=True)],
                graph=self._graph,
            )
            for part, piece in zip(self._parts, tokens.detach().split(self._sizes), strict=True)
        ]

    def send_gradients(self, gradients: Tensor) -> None:
        """Ask every rank for its tokens' gradients."""
        self._asked = [
            part.helper.submit("gradients", [piece], graph=self._graph)
            for part, piece in zip(self._parts, gradients.split(self._sizes), strict=True)
        ]

    def receive(self, like: Tensor) -> Tensor:
        """What was asked for last, `(n, d_model)`."""
        return torch.cat([asked.result()[1][0] for asked in self._asked]).to(like)


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, exchange: TokenExchange) -> Tensor:
        ctx.exchange = exchange
        exchange.send(tokens)
        return torch.zeros_like(tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.receive(gradients[0]), None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, begun: Tensor, exchange: TokenExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.receive(begun)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # Autograd runs what was made last first: gradients leave, rank 0's own part runs, and `_Begin` waits for them.
        ctx.exchange.send_gradients(gradients[0])
        return torch.zeros_like(gradients[0]), None
