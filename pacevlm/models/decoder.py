"""Elastic execution: the explicit loop over blocks, with every row's own tier, top_k and blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pacevlm.models.adapter import Adapter, RowDecode
from pacevlm.models.block_order import BlockOrder
from pacevlm.models.prefix_tree import PrefixTree
from pacevlm.models.static_decode import StaticDecode


@dataclass(frozen=True)
class Prefix:
    """A prompt after the blocks that always run; shared by every continuation of the same image, tier and question.

    Attributes:
        hidden: residual stream after those blocks, `(tokens, d_model)`.
        keys, values: one entry per block that ran, each `(heads, tokens, head_dim)`.
    """

    hidden: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def num_tokens(self) -> int:
        """Prompt tokens."""
        return self.hidden.shape[0]


@dataclass
class _BlockCache:
    """Keys and values of one block for the rows that keep it, `(rows, heads, capacity, head_dim)`."""

    rows: Tensor | None  # places of these rows in the batch; None: all of them, in order
    keys: Tensor
    values: Tensor


class ElasticDecoder:
    """Runs a frozen decoder with per-row knobs.

    Args:
        adapter: the model.
        order: which blocks each num_blocks keeps.
        stage2_after: blocks that always run, at the trained top_k, before stage 2 decides.
        static: decode steps of single rows, with fixed shapes; None runs them in the loop like any others.
    """

    def __init__(
        self,
        adapter: Adapter[Any, Any],
        order: BlockOrder,
        stage2_after: int = 1,
        static: StaticDecode | None = None,
    ) -> None:
        self.adapter, self.order, self.stage2_after, self.static = adapter, order, stage2_after, static

    def prefix(self, embeddings: Sequence[Tensor]) -> list[Prefix]:
        """Run the first `stage2_after` blocks on prompts, each `(tokens, d_model)`."""
        x, lengths = _pad(embeddings)
        rope = self.adapter.rope(torch.arange(x.shape[1], device=x.device)[None])
        kept = []
        for block in range(self.stage2_after):
            q, k, v = self.adapter.project(block, x, rope)
            kept.append((k, v))
            x = x + self.adapter.attend(block, q, k, v, None, is_causal=True)
            x = x + self.adapter.mix_experts(block, x, self.adapter.trained_top_k)
        return [
            Prefix(x[i, :n], tuple(k[i, :, :n] for k, _ in kept), tuple(v[i, :, :n] for _, v in kept))
            for i, n in enumerate(lengths)
        ]

    def latency_token(self, prefixes: Sequence[Prefix], tokens: Sequence[Tensor]) -> Tensor:
        """Run latency tokens through the first blocks behind prompts that have been run already.

        A token sees the whole prompt and itself, and nothing sees it: it is last in causal order, its keys and values
        are not kept, and several tokens behind one prompt do not see each other. Differentiable in `tokens`.

        Args:
            prefixes: prompts.
            tokens: for each prompt its latency tokens, `(n_i, d_model)`.

        Returns:
            `(sum of n_i, d_model)`, in order.
        """
        if len(prefixes) == 1 and tokens[0].shape[0] == 1:
            return self._one_latency_token(prefixes[0], tokens[0])
        counts = [t.shape[0] for t in tokens]
        lengths = [p.num_tokens for p in prefixes]
        x, _ = _pad(tokens)
        device = x.device
        # Padded queries compute garbage that is cut off below; padded keys are masked.
        seen = None
        if len(lengths) > 1:
            seen = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
        position = torch.tensor(lengths, device=device)[:, None].expand(-1, x.shape[1])
        rope = self.adapter.rope(position)
        for block in range(self.stage2_after):
            q, k, v = self.adapter.project(block, x, rope)
            keys = _pad_heads([p.keys[block] for p in prefixes])
            values = _pad_heads([p.values[block] for p in prefixes])
            groups = q.shape[1] // keys.shape[1]
            if groups > 1:
                keys, values, k, v = (t.repeat_interleave(groups, dim=1) for t in (keys, values, k, v))
            scale = q.shape[-1] ** -0.5
            prompt = (q @ keys.transpose(-1, -2)).float() * scale
            if seen is not None:
                prompt = prompt.masked_fill(~seen[:, None, None, :], float("-inf"))
            itself = (q * k).sum(-1, keepdim=True).float() * scale
            weights = torch.softmax(torch.cat([prompt, itself], dim=-1), dim=-1).to(q.dtype)
            mixed = weights[..., :-1] @ values + weights[..., -1:] * v
            x = x + self.adapter.project_out(block, mixed)
            x = x + self.adapter.mix_experts(block, x, self.adapter.trained_top_k)
        return torch.cat([x[i, :n] for i, n in enumerate(counts)])

    def _one_latency_token(self, prefix: Prefix, token: Tensor) -> Tensor:
        """The same for one token behind one prompt, where it is the next position of an ordinary decode step."""
        row = None if token.requires_grad else self.adapter.row_decode(prefix.num_tokens + 1)
        if row is not None:
            for block in range(self.stage2_after):
                row.load(block, prefix.keys[block][None], prefix.values[block][None])
            return row.run(
                token, prefix.num_tokens, dict.fromkeys(range(self.stage2_after), self.adapter.trained_top_k)
            )
        x = token[None]
        rope = self.adapter.rope(torch.tensor([[prefix.num_tokens]], device=x.device))
        for block in range(self.stage2_after):
            q, k, v = self.adapter.project(block, x, rope)
            keys = torch.cat([prefix.keys[block][None], k], dim=2)
            values = torch.cat([prefix.values[block][None], v], dim=2)
            x = x + self.adapter.attend(block, q, keys, values, None, is_causal=False)
            x = x + self.adapter.mix_experts(block, x, self.adapter.trained_top_k)
        return x[0]

    def generate(
        self,
        prefixes: Sequence[Prefix],
        top_k: Sequence[int],
        num_blocks: Sequence[int],
        max_new_tokens: int,
        *,
        min_new_tokens: int = 0,
        on_token: Callable[[int], None] | None = None,
        keep_logits: bool = False,
    ) -> tuple[list[list[int]], list[Tensor]]:
        """Finish the prefill and decode greedily, every row with its own knobs.

        A row stops at end-of-text or after `max_new_tokens` and then leaves the batch.

        Args:
            prefixes: one per row; rows may share a prefix object.
            top_k: experts per token in the blocks behind the first ones, one per row.
            num_blocks: blocks that run, one per row.
            max_new_tokens: most generated tokens, end-of-text included.
            min_new_tokens: end-of-text ends nothing before so many tokens, for measurements of a given length.
            on_token: called after every step with its number, 0 being the prefill.
            keep_logits: also return the logits of every step.

        Returns:
            generated ids of each row (end-of-text included), and the logits of each step `(alive rows, vocabulary)`.
        """
        loop = _Generation(self, prefixes, top_k, num_blocks, max_new_tokens, min_new_tokens)
        kept_logits = []
        for step in range(max_new_tokens):
            logits = loop.step()
            if keep_logits:
                kept_logits.append(logits.clone())
            finished = loop.accept(logits.argmax(-1))
            if on_token is not None:
                on_token(step)
            if finished:
                break
        return loop.generated, kept_logits


class _Generation:
    """State of one batch being decoded."""

    def __init__(
        self,
        decoder: ElasticDecoder,
        prefixes: Sequence[Prefix],
        top_k: Sequence[int],
        num_blocks: Sequence[int],
        max_new_tokens: int,
        min_new_tokens: int = 0,
    ) -> None:
        self.decoder, self.adapter = decoder, decoder.adapter
        self.max_new_tokens, self.min_new_tokens = max_new_tokens, min_new_tokens
        self.prefixes = prefixes
        one_row = len(prefixes) == 1
        self.static = decoder.static if one_row else None
        device = prefixes[0].hidden.device
        lengths = [p.num_tokens for p in prefixes]
        self.same_length = len(set(lengths)) == 1
        self.padded_length = max(lengths)
        self.lengths = torch.tensor(lengths, device=device)
        most = self.padded_length + max_new_tokens
        self.row_decode = self.adapter.row_decode(most) if one_row and self.static is None else None
        # Steps of a single row have a cache of their own.
        self.capacity = most if self.static is None and self.row_decode is None else self.padded_length
        self.num_blocks = list(num_blocks)
        self.top_k = torch.tensor(list(top_k), device=device)
        self.only_top_k = top_k[0] if len(set(top_k)) == 1 else None
        self.kept_blocks = [frozenset(decoder.order.kept(n)) for n in num_blocks]
        self.generated: list[list[int]] = [[] for _ in prefixes]
        self.alive = list(range(len(prefixes)))
        self.caches: dict[int, _BlockCache] = {}
        self.num_steps = 0
        self.last = self.lengths  # ids fed at the next step; set by `accept`

    def step(self) -> Tensor:
        """Logits of the next token of every alive row, `(alive rows, vocabulary)`."""
        return self._prefill() if self.num_steps == 0 else self._decode()

    def accept(self, token_ids: Tensor) -> bool:
        """Append tokens, drop rows that have finished; returns whether none is left."""
        self.num_steps += 1
        ids = token_ids.tolist()
        stay = []
        for place, (row, token) in enumerate(zip(self.alive, ids, strict=True)):
            self.generated[row].append(token)
            ended = token == self.adapter.eos_token_id and len(self.generated[row]) >= self.min_new_tokens
            if not ended and len(self.generated[row]) < self.max_new_tokens:
                stay.append(place)
        self.last = token_ids
        if len(stay) < len(ids) and stay:
            self._leave(stay)
        return not stay

    def _row_top_k(self, rows: Tensor | list[int] | None) -> int | Tensor:
        if self.only_top_k is not None:
            return self.only_top_k
        top_k = self.top_k if rows is None else self.top_k[rows]
        first = int(top_k[0])
        return first if bool((top_k == first).all()) else top_k

    def _prefill(self) -> Tensor:
        starts = [(id(prefix), top_k) for prefix, top_k in zip(self.prefixes, self.top_k.tolist(), strict=True)]
        tree = PrefixTree(starts, self.kept_blocks)
        prefixes = [self.prefixes[row] for row in tree.some_row()]
        # Padding stands behind every real token, so causal attention already hides it from them.
        x, _ = _pad([prefix.hidden for prefix in prefixes])
        rope = self.adapter.rope(torch.arange(x.shape[1], device=x.device)[None])
        first = self.decoder.stage2_after
        for block in range(first):
            keys = _pad_heads([prefix.keys[block] for prefix in prefixes])
            values = _pad_heads([prefix.values[block] for prefix in prefixes])
            self.caches[block] = self._cache(tree, block, None, keys, values)
        last = max(max(kept) for kept in self.kept_blocks)
        for block in range(first, last + 1):
            x, members = tree.split(block, x)
            if members == []:
                continue
            index = None if members is None else torch.tensor(members, device=x.device)
            part = x if index is None else x[index]
            q, k, v = self.adapter.project(block, part, rope)
            self.caches[block] = self._cache(tree, block, members, k, v)
            mask = None
            if block == last:
                lengths = self.lengths[tree.some_row()]
                # Behind the last block only the last token of each prompt is read: the others need keys and values.
                own = lengths if index is None else lengths[index]
                part, q = _ends(part, own), _ends(q.transpose(1, 2), own).transpose(1, 2)
                if not self.same_length:
                    mask = (torch.arange(k.shape[2], device=x.device) < own[:, None])[:, None, None]
                x = _ends(x, lengths)
            part = part + self.adapter.attend(block, q, k, v, mask, is_causal=block < last)
            part = part + self.adapter.mix_experts(block, part, self._row_top_k(tree.some_row(members)))
            x = part if index is None else x.index_copy(0, index, part)
        x = x[:, 0] if last >= first else _ends(x, self.lengths[tree.some_row()])[:, 0]
        return tree.spread(None, self.adapter.logits(x))[1]

    def _cache(
        self, tree: PrefixTree, block: int, members: list[int] | None, keys: Tensor, values: Tensor
    ) -> _BlockCache:
        rows, keys = tree.spread(members, keys)
        rows, values = tree.spread(members, values)
        if self.row_decode is not None:
            # Now rather than before the first step, which would take longer than the others.
            self.row_decode.load(block, keys, values)
        room = (0, 0, 0, self.capacity - keys.shape[2])
        if room[3]:
            keys, values = F.pad(keys, room), F.pad(values, room)
        return _BlockCache(rows, keys, values)

    def _decode_static(self, static: StaticDecode) -> Tensor:
        if self.num_steps == 1:
            for block, cache in self.caches.items():
                static.load(block, cache.keys, cache.values)
        assert self.only_top_k is not None
        position = self.padded_length + self.num_steps - 1
        most = self.padded_length + self.max_new_tokens
        return static.step(self.last, position, self.only_top_k, self.num_blocks[0], most)

    def _decode_row(self, row: RowDecode) -> Tensor:
        assert self.only_top_k is not None
        first, trained = self.decoder.stage2_after, self.adapter.trained_top_k
        top_k_of = {block: trained if block < first else self.only_top_k for block in sorted(self.caches)}
        x = self.adapter.embed_tokens(self.last)
        return self.adapter.logits(row.run(x, self.padded_length + self.num_steps - 1, top_k_of))

    def _decode(self) -> Tensor:
        if self.static is not None:
            return self._decode_static(self.static)
        if self.row_decode is not None:
            return self._decode_row(self.row_decode)
        x = self.adapter.embed_tokens(self.last)[:, None]
        end = self.padded_length + self.num_steps  # columns in use after this step
        rope = self.adapter.rope((self.lengths + self.num_steps - 1)[:, None])
        mask = None
        if not self.same_length:
            columns = torch.arange(end, device=x.device)
            mask = (columns < self.lengths[:, None]) | (columns >= self.padded_length)
            mask = mask[:, None, None]
        for block in range(self.adapter.num_blocks):
            cache = self.caches.get(block)
            if cache is None:
                continue
            rows = cache.rows
            part = x if rows is None else x[rows]
            part_rope = rope if rows is None else (rope[0][rows], rope[1][rows])
            q, k, v = self.adapter.project(block, part, part_rope)
            cache.keys.narrow(2, end - 1, 1).copy_(k)
            cache.values.narrow(2, end - 1, 1).copy_(v)
            part_mask = mask if mask is None or rows is None else mask[rows]
            keys, values = cache.keys.narrow(2, 0, end), cache.values.narrow(2, 0, end)
            part = part + self.adapter.attend(block, q, keys, values, part_mask, is_causal=False)
            top_k = self.adapter.trained_top_k if block < self.decoder.stage2_after else self._row_top_k(rows)
            part = part + self.adapter.mix_experts(block, part, top_k)
            x = part if rows is None else x.index_copy(0, rows, part)
        return self.adapter.logits(x[:, 0])

    def _leave(self, stay: list[int]) -> None:
        """Keep only the rows at places `stay`, in the batch and in every cache."""
        index = torch.tensor(stay, device=self.lengths.device)
        new_place = {old: new for new, old in enumerate(stay)}
        for block, cache in list(self.caches.items()):
            if cache.rows is None:
                cache.keys, cache.values = cache.keys[index], cache.values[index]
                continue
            old_rows = cache.rows.tolist()
            inside = [i for i, old in enumerate(old_rows) if old in new_place]
            if not inside:
                del self.caches[block]
                continue
            chosen = torch.tensor(inside, device=index.device)
            rows = [new_place[old_rows[i]] for i in inside]
            cache.keys, cache.values = cache.keys[chosen], cache.values[chosen]
            cache.rows = None if len(rows) == len(stay) else torch.tensor(rows, device=index.device)
        self.alive = [self.alive[i] for i in stay]
        self.lengths, self.top_k, self.last = self.lengths[index], self.top_k[index], self.last[index]


def _ends(x: Tensor, lengths: Tensor) -> Tensor:
    """Last real token of every row, `(rows, tokens, ...)` to `(rows, 1, ...)`."""
    return x[torch.arange(x.shape[0], device=x.device), lengths - 1][:, None]


def _pad(rows: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Stack `(n_i, width)`, padded behind with zeros, and their lengths."""
    lengths = [row.shape[0] for row in rows]
    if len(rows) == 1:
        return rows[0][None], lengths
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True), lengths


def _pad_heads(tensors: Sequence[Tensor]) -> Tensor:
    """Stack `(heads, tokens_i, head_dim)` behind-padded with zeros to `(rows, heads, tokens, head_dim)`."""
    if len(tensors) == 1:
        return tensors[0][None]
    if len({t.shape[1] for t in tensors}) == 1:
        return torch.stack(list(tensors))
    return torch.nn.utils.rnn.pad_sequence([t.transpose(0, 1) for t in tensors], batch_first=True).transpose(1, 2)
