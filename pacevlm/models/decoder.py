"""Elastic execution: the explicit loop over blocks, with every row's own tier, top_k and blocks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pacevlm.models.adapter import Adapter, EmbeddedPrompt, Rope, RowDecode
from pacevlm.models.block_order import BlockOrder
from pacevlm.models.graph_decode import GraphDecode
from pacevlm.models.prefix_tree import PrefixTree
from pacevlm.models.windows import prompt_mask, window_start


@dataclass(frozen=True)
class Prefix:
    """A prompt after the blocks that always run; shared by every continuation of the same image, tier and question.

    Attributes:
        prompt: what the first block read, its `hidden` replaced by the stream behind those blocks.
        keys, values: one entry per block that ran, each `(heads, tokens, head_dim)`.
    """

    prompt: EmbeddedPrompt
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def hidden(self) -> Tensor:
        """Residual stream behind the first blocks, `(tokens, d_model)`."""
        return self.prompt.hidden

    @property
    def num_tokens(self) -> int:
        """Prompt tokens."""
        return self.prompt.hidden.shape[0]

    @property
    def next_position(self) -> int:
        """Position of the token behind the prompt."""
        return self.num_tokens if self.prompt.next_position is None else self.prompt.next_position

    @property
    def num_bytes(self) -> int:
        """Memory that it keeps."""
        tensors = (self.hidden, *self.keys, *self.values, *self.prompt.added.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def clone(self) -> Prefix:
        """A copy that shares no memory, for example with the padded batch that it came from."""
        added = {block: tensor.clone() for block, tensor in self.prompt.added.items()}
        prompt = replace(self.prompt, hidden=self.hidden.clone(), added=added)
        return Prefix(prompt, tuple(k.clone() for k in self.keys), tuple(v.clone() for v in self.values))


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
        graph: decode steps of single rows, with fixed shapes; None runs them in the loop like any others.
    """

    def __init__(
        self,
        adapter: Adapter[Any, Any],
        order: BlockOrder,
        stage2_after: int = 1,
        graph: GraphDecode | None = None,
    ) -> None:
        self.adapter, self.order, self.stage2_after, self.graph = adapter, order, stage2_after, graph

    def prefix(self, prompts: Sequence[EmbeddedPrompt]) -> list[Prefix]:
        """Run the first `stage2_after` blocks on prompts."""
        x, lengths = _pad([prompt.hidden for prompt in prompts])
        rope = self.rope(prompts)
        kept = []
        for block in range(self.stage2_after):
            q, k, v = self.adapter.project(block, x, rope)
            kept.append((k, v))
            mask = self.window_mask(block, prompts, x.shape[1])
            x = self.adapter.add_attention(block, x, q, k, v, mask, is_causal=mask is None)
            x = self.adapter.add_experts(block, x, self.adapter.trained_top_k)
            x = _add(x, block, prompts)
        return [
            Prefix(
                replace(
                    prompt,
                    hidden=x[i, :n],
                    added={b: added for b, added in prompt.added.items() if b >= self.stage2_after},
                ),
                tuple(k[i, :, :n] for k, _ in kept),
                tuple(v[i, :, :n] for _, v in kept),
            )
            for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True))
        ]

    def rope(self, prompts: Sequence[EmbeddedPrompt]) -> Rope:
        """Rotary tables of padded prompts; one row for all where positions count 0, 1, 2 and so on."""
        if not self.adapter.position_axes:
            hidden = max((prompt.hidden for prompt in prompts), key=len)
            return self.adapter.rope(torch.arange(len(hidden), device=hidden.device)[None])
        positions = [prompt.positions for prompt in prompts if prompt.positions is not None]
        return self.adapter.rope(_pad(positions)[0])

    def rope_at(self, positions: Tensor) -> Rope:
        """Rotary tables of tokens behind prompts, at positions `(rows, tokens)`, the same on all axes."""
        axes = self.adapter.position_axes
        return self.adapter.rope(positions[..., None].expand(*positions.shape, axes) if axes else positions)

    def window_mask(self, block: int, prompts: Sequence[EmbeddedPrompt], num_tokens: int) -> Tensor | None:
        """What padded prompts' tokens see in a block; None where causal order says it all."""
        window = self.adapter.windows.get(block)
        return None if window is None else prompt_mask(prompts, num_tokens, window)

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
        x, counts = _pad(tokens)
        lengths, most = [prefix.num_tokens for prefix in prefixes], max(counts)
        alone = len(prefixes) == 1 and most == 1
        row = self.row_decode(lengths[0] + 1) if alone and not x.requires_grad else None
        if row is not None:
            # One token behind one prompt is an ordinary decode step.
            for block in range(self.stage2_after):
                row.load(block, prefixes[0].keys[block][None], prefixes[0].values[block][None])
            return row.run(x[0], lengths[0], dict.fromkeys(range(self.stage2_after), self.adapter.trained_top_k))
        mask = None
        if not alone:
            # Padded queries compute garbage that is cut off below; padded keys are masked.
            real = torch.arange(max(lengths), device=x.device) < torch.tensor(lengths, device=x.device)[:, None]
            itself = torch.eye(most, dtype=torch.bool, device=x.device).expand(len(lengths), -1, -1)
            mask = torch.cat([real[:, None].expand(-1, most, -1), itself], dim=-1)[:, None]
        positions = torch.tensor([prefix.next_position for prefix in prefixes], device=x.device)
        rope = self.rope_at(positions[:, None].expand(-1, most))
        for block in range(self.stage2_after):
            q, k, v = self.adapter.project(block, x, rope)
            keys = torch.cat([_pad_heads([prefix.keys[block] for prefix in prefixes]), k], dim=2)
            values = torch.cat([_pad_heads([prefix.values[block] for prefix in prefixes]), v], dim=2)
            seen = mask
            if (window := self.adapter.windows.get(block, max(lengths) + 1)) <= max(lengths):
                places = torch.tensor(lengths, device=x.device)[:, None]
                own = torch.full((1, most), max(lengths), device=x.device)  # behind all prompts, so inside any window
                places_of_keys = torch.cat([torch.arange(max(lengths), device=x.device)[None], own], dim=1)
                seen = _both(mask, window_start(places.expand(-1, most), places_of_keys, window))
            x = self.adapter.add_attention(block, x, q, keys, values, seen, is_causal=False)
            x = self.adapter.add_experts(block, x, self.adapter.trained_top_k)
        return torch.cat([x[i, :n] for i, n in enumerate(counts)])

    def row_decode(self, num_tokens: int) -> RowDecode | None:
        """The adapter's quicker steps of a single row, where positions are places."""
        return None if self.adapter.position_axes else self.adapter.row_decode(num_tokens)

    def generate(
        self, prefixes: Sequence[Prefix], top_k: Sequence[int], num_blocks: Sequence[int], max_new_tokens: int
    ) -> list[list[int]]:
        """Finish the prefill and decode greedily, every row with its own knobs; arguments as `Generation` takes them.

        Returns:
            generated ids of each row, end-of-text included.
        """
        return Generation(self, prefixes, top_k, num_blocks, max_new_tokens).finish()

    def generate_without(
        self, prefixes: Sequence[Prefix], removed: Sequence[Collection[int]], max_new_tokens: int
    ) -> list[list[int]]:
        """Finish the prefill and decode greedily at the trained top_k, every row without some blocks of its own.

        Args:
            removed: blocks left out, one collection per row, whatever the block order.

        Returns:
            generated ids of each row, end-of-text included.
        """
        num_rows = len(prefixes)
        top_k, num_blocks = [self.adapter.trained_top_k] * num_rows, [self.adapter.num_blocks] * num_rows
        return Generation(self, prefixes, top_k, num_blocks, max_new_tokens, removed=removed).finish()


class Generation:
    """A batch being decoded greedily, step by step.

    A row stops at end-of-text or after `max_new_tokens` and then leaves the batch.

    Args:
        decoder: runs the blocks.
        prefixes: one per row; rows may share a prefix object.
        top_k: experts per token in the blocks behind the first ones, one per row.
        num_blocks: blocks that run, one per row.
        max_new_tokens: most generated tokens, end-of-text included.
        min_new_tokens: end-of-text ends nothing before so many tokens, for measurements of a given length.
        removed: blocks that every row leaves out besides; what the block order says alone if None.

    Attributes:
        generated: ids of each row so far, end-of-text included.
        alive: rows that have not finished.
    """

    def __init__(
        self,
        decoder: ElasticDecoder,
        prefixes: Sequence[Prefix],
        top_k: Sequence[int],
        num_blocks: Sequence[int],
        max_new_tokens: int,
        min_new_tokens: int = 0,
        removed: Sequence[Collection[int]] | None = None,
    ) -> None:
        self.decoder, self.adapter = decoder, decoder.adapter
        self.max_new_tokens, self.min_new_tokens = max_new_tokens, min_new_tokens
        self.prefixes, self.adds = prefixes, any(prefix.prompt.added for prefix in prefixes)
        one_row = len(prefixes) == 1
        # Graphs were captured for the block order's sets.
        self.graph = decoder.graph if one_row and removed is None else None
        device = prefixes[0].hidden.device
        lengths = [p.num_tokens for p in prefixes]
        self.same_length = len(set(lengths)) == 1
        self.padded_length = max(lengths)
        self.lengths = torch.tensor(lengths, device=device)
        self.next_positions = torch.tensor([prefix.next_position for prefix in prefixes], device=device)
        most = self.padded_length + max_new_tokens
        self.row_decode = decoder.row_decode(most) if one_row and self.graph is None else None
        # Steps of a single row have a cache of their own.
        self.capacity = most if self.graph is None and self.row_decode is None else self.padded_length
        self.num_blocks = list(num_blocks)
        self.top_k = torch.tensor(list(top_k), device=device)
        self.only_top_k = top_k[0] if len(set(top_k)) == 1 else None
        self.kept_blocks = [frozenset(decoder.order.kept(n)) for n in num_blocks]
        if removed is not None:
            self.kept_blocks = [kept.difference(gone) for kept, gone in zip(self.kept_blocks, removed, strict=True)]
        self.generated: list[list[int]] = [[] for _ in prefixes]
        self.alive = list(range(len(prefixes)))
        self.caches: dict[int, _BlockCache] = {}
        self.num_steps = 0
        self.latest_mask: tuple[tuple[int, tuple[int, ...]], Tensor | None] | None = None
        self.last = self.lengths  # ids fed at the next step; set by `_accept`

    def finish(self) -> list[list[int]]:
        """Decode until every row has ended; returns the ids of each, end-of-text included."""
        while self.alive:
            self.step()
        return self.generated

    def step(self) -> Tensor:
        """Append the next token of every alive row and drop rows that have finished; the first step is the prefill.

        Returns:
            logits of these tokens, `(rows that were alive, vocabulary)`; the next step may overwrite them.
        """
        logits = self._prefill() if self.num_steps == 0 else self._decode()
        self._accept(logits.argmax(-1))
        return logits

    def _accept(self, token_ids: Tensor) -> None:
        self.num_steps += 1
        ids = token_ids.tolist()
        stay = []
        for place, (row, token) in enumerate(zip(self.alive, ids, strict=True)):
            self.generated[row].append(token)
            ended = token in self.adapter.end_token_ids and len(self.generated[row]) >= self.min_new_tokens
            if not ended and len(self.generated[row]) < self.max_new_tokens:
                stay.append(place)
        self.last = token_ids
        if not stay:
            self.alive = []
        elif len(stay) < len(ids):
            self._leave(stay)

    def _row_top_k(self, rows: Tensor | list[int] | None) -> int | Tensor:
        if self.only_top_k is not None:
            return self.only_top_k
        top_k = self.top_k if rows is None else self.top_k[rows]
        first = int(top_k[0])
        return first if bool((top_k == first).all()) else top_k

    def _prefill(self) -> Tensor:
        if self.graph is not None and not self.adds and self.graph.prefill.takes(self.padded_length):
            return self._prefill_graph(self.graph, self.prefixes[0])
        starts = [(id(prefix), top_k) for prefix, top_k in zip(self.prefixes, self.top_k.tolist(), strict=True)]
        tree = PrefixTree(starts, self.kept_blocks)
        prefixes = [self.prefixes[row] for row in tree.some_row()]
        # Padding stands behind every real token, so causal attention already hides it from them.
        x, _ = _pad([prefix.hidden for prefix in prefixes])
        rope = self.decoder.rope([prefix.prompt for prefix in self.prefixes])
        first = self.decoder.stage2_after
        for block in range(first):
            keys = _pad_heads([prefix.keys[block] for prefix in prefixes])
            values = _pad_heads([prefix.values[block] for prefix in prefixes])
            self.caches[block] = self._cache(tree, block, None, keys, values)
        last = max(max(kept) for kept in self.kept_blocks)
        is_cut = False  # whether only the last token of each prompt is left of the stream
        for block in range(first, self.adapter.num_blocks):
            x, members = tree.split(block, x)
            if members == []:
                x = self._add(tree, x, block, is_cut)
                continue
            index = None if members is None else torch.tensor(members, device=x.device)
            part = x if index is None else x[index]
            q, k, v = self.adapter.project(block, part, _take(rope, tree.some_row(members)))
            self.caches[block] = self._cache(tree, block, members, k, v)
            mask = self._prompt_mask(block, tree.some_row(members)) if block < last else None
            if block == last:
                lengths = self.lengths[tree.some_row()]
                # Behind the last block only the last token of each prompt is read: the others need keys and values.
                own = lengths if index is None else lengths[index]
                part, q = _ends(part, own), _ends(q.transpose(1, 2), own).transpose(1, 2)
                columns = torch.arange(k.shape[2], device=x.device)[None]
                if not self.same_length:
                    mask = (columns < own[:, None])[:, None, None]
                if (window := self.adapter.windows.get(block, k.shape[2])) < k.shape[2]:
                    mask = _both(mask, window_start(own[:, None] - 1, columns, window))
                x, is_cut = _ends(x, lengths), True
            part = self.adapter.add_attention(block, part, q, k, v, mask, is_causal=block < last and mask is None)
            part = self.adapter.add_experts(block, part, self._row_top_k(tree.some_row(members)))
            x = part if index is None else x.index_copy(0, index, part)
            x = self._add(tree, x, block, is_cut)
        x = x[:, 0] if is_cut else _ends(x, self.lengths[tree.some_row()])[:, 0]
        return tree.spread(None, self.adapter.logits(x))[1]

    def _prompt_mask(self, block: int, rows: Sequence[int]) -> Tensor | None:
        """What the prompts of some rows see in a block; the latest mask is kept, because blocks ask in turn."""
        window = self.adapter.windows.get(block)
        if window is None:
            return None
        key = window, tuple(rows)
        if self.latest_mask is None or self.latest_mask[0] != key:
            prompts = [self.prefixes[row].prompt for row in rows]
            self.latest_mask = key, self.decoder.window_mask(block, prompts, self.padded_length)
        return self.latest_mask[1]

    def _add(self, tree: PrefixTree, x: Tensor, block: int, is_cut: bool) -> Tensor:
        """The branches' stream with what their prompts add behind a block; only its ends are left once it is cut."""
        if not self.adds:
            return x
        rows = tree.some_row()
        return _add(x, block, [self.prefixes[row].prompt for row in rows], self.lengths[rows] if is_cut else None)

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

    def _prefill_graph(self, graph: GraphDecode, prefix: Prefix) -> Tensor:
        first = range(self.decoder.stage2_after)
        for block in first:
            graph.load(block, prefix.keys[block][None], prefix.values[block][None])
        assert self.only_top_k is not None
        return graph.prefill.run(prefix.hidden, sorted(self.kept_blocks[0].difference(first)), self.only_top_k)

    def _decode_graph(self, graph: GraphDecode) -> Tensor:
        if self.num_steps == 1:
            for block, cache in self.caches.items():
                graph.load(block, cache.keys, cache.values)
        assert self.only_top_k is not None
        step, most = self.num_steps - 1, self.padded_length + self.max_new_tokens
        place, position = self.padded_length + step, self.prefixes[0].next_position + step
        return graph.step(self.last, place, position, self.only_top_k, self.num_blocks[0], most)

    def _decode_row(self, row: RowDecode) -> Tensor:
        assert self.only_top_k is not None
        first, trained = self.decoder.stage2_after, self.adapter.trained_top_k
        top_k_of = {block: trained if block < first else self.only_top_k for block in sorted(self.caches)}
        x = self.adapter.embed_tokens(self.last)
        return self.adapter.logits(row.run(x, self.padded_length + self.num_steps - 1, top_k_of))

    def _decode(self) -> Tensor:
        if self.graph is not None:
            return self._decode_graph(self.graph)
        if self.row_decode is not None:
            return self._decode_row(self.row_decode)
        x = self.adapter.embed_tokens(self.last)[:, None]
        end = self.padded_length + self.num_steps  # columns in use after this step
        rope = self.decoder.rope_at((self.next_positions + self.num_steps - 1)[:, None])
        mask = None
        if not self.same_length:
            columns = torch.arange(end, device=x.device)
            mask = (columns < self.lengths[:, None]) | (columns >= self.padded_length)
            mask = mask[:, None, None]
        masks: dict[int | None, Tensor | None] = {None: mask}
        for window in set(self.adapter.windows.values()):
            masks[window] = mask if end <= window else _both(mask, self._inside(window, end))
        for block in range(self.adapter.num_blocks):
            cache = self.caches.get(block)
            if cache is None:
                continue
            rows, mask = cache.rows, masks[self.adapter.windows.get(block)]
            part = x if rows is None else x[rows]
            q, k, v = self.adapter.project(block, part, rope if rows is None else _take(rope, rows))
            cache.keys.narrow(2, end - 1, 1).copy_(k)
            cache.values.narrow(2, end - 1, 1).copy_(v)
            part_mask = mask if mask is None or rows is None else mask[rows]
            keys, values = cache.keys.narrow(2, 0, end), cache.values.narrow(2, 0, end)
            part = self.adapter.add_attention(block, part, q, keys, values, part_mask, is_causal=False)
            top_k = self.adapter.trained_top_k if block < self.decoder.stage2_after else self._row_top_k(rows)
            part = self.adapter.add_experts(block, part, top_k)
            x = part if rows is None else x.index_copy(0, rows, part)
        return self.adapter.logits(x[:, 0])

    def _inside(self, window: int, end: int) -> Tensor:
        """Which of the columns in use are inside the window of the newest tokens, `(rows, 1, 1, columns)`."""
        columns = torch.arange(end, device=self.lengths.device)[None]
        # What was generated stands behind the padding, but follows the prompt.
        padding = (self.padded_length - self.lengths)[:, None]
        places = torch.where(columns < self.padded_length, columns, columns - padding)
        return window_start(end - 1 - padding, places, window)

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
        self.lengths, self.next_positions = self.lengths[index], self.next_positions[index]
        self.top_k, self.last = self.top_k[index], self.last[index]


def _take(rope: Rope, rows: Sequence[int] | Tensor) -> Rope:
    """The tables of some rows; those that all rows share stay as they are."""
    return tuple(table if table.shape[0] == 1 else table[rows] for table in rope)


def _both(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask & other


def _add(x: Tensor, block: int, prompts: Sequence[EmbeddedPrompt], ends: Tensor | None = None) -> Tensor:
    """The stream with what prompts add behind a block, `(prompts, tokens, d_model)`.

    Args:
        ends: lengths of the prompts where x holds their last tokens alone, `(prompts,)`.
    """
    if not any(block in prompt.added for prompt in prompts):
        return x
    added, _ = _pad([prompt.added.get(block, torch.zeros_like(prompt.hidden)) for prompt in prompts])
    return x + (added if ends is None else _ends(added, ends))


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
