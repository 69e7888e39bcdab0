"""The rollout engine: many examples with knobs run for real, with all work that they share done once."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from pacevlm.data.metrics import Metric, load_metric
from pacevlm.errors import MemoryLimitError
from pacevlm.identity import Identity
from pacevlm.knobs import Knobs
from pacevlm.latency.measuring import use_num_threads
from pacevlm.models.decoder import Prefix
from pacevlm.models.elastic import ElasticModel
from pacevlm.rollout.limits import BatchLimits, is_out_of_memory
from pacevlm.rollout.outcome_store import OutcomeStore, StoredAnswer
from pacevlm.rollout.prefix_store import PrefixStore
from pacevlm.rollout.ranks import HelperRank, Place, Ranks, RowKey, Way
from pacevlm.rollout.sharing import Piece, SharedWork, share_out
from pacevlm.rollout.token_exchange import spread_tokens
from pacevlm.types import Example, Outcome, RequestView

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")
Progress = Callable[[int, int], None]
# Is given rows and their answers as soon as these are known, in whatever thread they came from.
Keep = Callable[[Sequence[RowKey], Sequence[StoredAnswer]], None]


class RolloutEngine:
    """Runs examples with knobs in large mixed batches.

    Vision features and first blocks are computed once per (content, tier), identical rollouts once, stored ones not at
    all; what is left runs as rows of mixed batches, and every row gets what it would have got alone. On a CPU batches
    run side by side, one on each thread. With other ranks the work is shared out over them, and a content at a tier
    goes where its prefix is. The content of an example is its picture and question, whatever its id.

    Answers are stored and scored when they are asked for, so another metric or reference needs no other run.

    Args:
        model: the frozen model.
        metric: scores the answers; exact match if None.
        store: answers to start from, which those of every batch are added to; an empty one in memory if None.
        max_rows: most rows in a batch.
        max_tokens: most prompt tokens, padding included, in a batch.
        max_prefix_bytes: memory for shared prefixes.
        ranks: other processes that were told to load the same model; None works alone.

    Limits that are None follow from the memory that is free. A batch that does not fit all the same is halved, and so
    are those behind it.

    Raises:
        ConfigError: a limit is below 1.
        IdentityError: the store, or what another rank loaded, is another model's.

    Attributes:
        num_run: rollouts that the model ran.
        num_remembered: rollouts that cost nothing, because they were repeated or stored.
    """

    def __init__(
        self,
        model: ElasticModel,
        metric: Metric | None = None,
        store: OutcomeStore | None = None,
        *,
        max_rows: int | None = None,
        max_tokens: int | None = None,
        max_prefix_bytes: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if store is not None:
            Identity(store.model_identity).check("the outcome store", model.made_for)
        self.model, self.metric = model, metric or load_metric("exact_match")
        self.store = OutcomeStore(model.identity) if store is None else store
        self.limits = BatchLimits.for_model(
            model, max_rows=max_rows, max_tokens=max_tokens, max_prefix_bytes=max_prefix_bytes
        )
        self.ranks = ranks
        if ranks is not None:
            ranks.check(model.identity)
        self.num_run = 0
        self.num_remembered = 0
        self._views: dict[str, RequestView] = {}
        self._prefixes: PrefixStore[tuple[str, str]] = PrefixStore(self.limits.max_prefix_bytes)

    @property
    def metric_name(self) -> str:
        """The metric's name."""
        return self.metric.name

    def view(self, example: Example) -> RequestView:
        """What is known of an example before the vision encoder; computed once. Raises ImageError and QuestionError."""
        if example.content_id not in self._views:
            with example.naming():
                self._views[example.content_id] = self.model.view(example.source, example.question)
        return self._views[example.content_id]

    def forget(self, content_id: str) -> None:
        """Drop a content's view, which holds its picture; its prefixes stay while there is room."""
        self._views.pop(content_id, None)

    def latency_token_outputs(self, examples: Sequence[Example], tiers: Sequence[str], tokens: Tensor) -> Tensor:
        """Latency tokens behind the first blocks, differentiable in `tokens`.

        Args:
            examples, tiers: one per token; tokens of the same (example, tier) share the prompt's work.
            tokens: encoded budgets, `(n, d_model)`.

        Returns:
            `(n, d_model)`, in the order of `tokens`, on the model's device and of its dtype wherever the tokens are.
        """
        tokens = tokens.to(self.model.device, self.model.dtype)
        if self.ranks is None or not examples:
            return self._latency_tokens_here(examples, tiers, tokens)
        visits = [(example.content_id, tier) for example, tier in zip(examples, tiers, strict=True)]
        setup_costs = {visit: self._prefix_cost(e, visit[1]) for visit, e in zip(visits, examples, strict=True)}
        rank_of = share_out(Counter(visits), setup_costs, self.ranks.ready, len(self.ranks))
        return spread_tokens(self.ranks, self.model, examples, tiers, tokens, rank_of, self._latency_tokens_here)

    def _latency_tokens_here(self, examples: Sequence[Example], tiers: Sequence[str], tokens: Tensor) -> Tensor:
        if not examples:
            return tokens
        places: dict[Place, list[int]] = {}
        by_content = {}
        for i, (example, tier) in enumerate(zip(examples, tiers, strict=True)):
            places.setdefault((example.content_id, tier), []).append(i)
            by_content[example.content_id] = example

        def run_chunk(chunk: list[Place]) -> Tensor:
            prefixes = self._shared_prefixes([(by_content[content_id], tier) for content_id, tier in chunk])
            return self.model.decoder.latency_token(prefixes, [tokens[places[key]] for key in chunk])

        keys = list(places)
        lengths = {key: self._prompt_tokens(by_content[key[0]], key[1]) for key in keys}
        outputs, order = [], []
        # First blocks run one by one, where threads only wait for each other, very long where a core is not free.
        with use_num_threads(1 if self.model.device.type == "cpu" else None):
            for chunk, output in self._in_chunks(run_chunk, keys, lengths):
                outputs.append(output)
                order += [i for key in chunk for i in places[key]]
        return torch.cat(outputs)[torch.tensor(order, device=tokens.device).argsort()]

    def run(self, jobs: Sequence[tuple[Example, Knobs]], progress: Progress | None = None) -> list[Outcome]:
        """Outcomes of examples with knobs, in order.

        Args:
            jobs: (example, knobs); repeated and stored ones cost nothing.
            progress: called with (rollouts done, rollouts to do) after every batch.

        Raises:
            KnobError: knobs are not in the model's knob space.
            ImageError, QuestionError: the model cannot take an example.
            StorageError: answers could not be stored.
        """
        fresh: dict[RowKey, Example] = {}
        for example, knobs in jobs:
            self.model.knob_space.index(knobs)
            key = (example.content_id, knobs)
            if key not in self.store and key not in fresh:
                fresh[key] = example
        self.num_remembered += len(jobs) - len(fresh)
        done = 0

        def keep(keys: Sequence[RowKey], answers: Sequence[StoredAnswer]) -> None:
            pairs = zip(keys, answers, strict=True)
            self.store.add([(content, way, answer) for (content, way), answer in pairs if isinstance(way, Knobs)])

        for number in self.answer(fresh, keep):
            done += number
            self.num_run += number
            if progress is not None:
                progress(done, len(fresh))
        return [self._outcome(example, knobs) for example, knobs in jobs]

    def answer(self, rows: Mapping[RowKey, Example], keep: Keep) -> Iterator[int]:
        """Run rows of the model, whatever is stored; yields how many more are done and kept.

        Args:
            rows: their examples.
            keep: see `Keep`; may be called from several threads at once.

        Raises:
            ImageError, QuestionError: the model cannot take an example.
            MemoryLimitError: not even one row fits.
            RankError: another rank is gone.
        """
        lengths = {key: self._prompt_tokens(example, self._tier(key[1])) for key, example in rows.items()}
        # Rows of like length share a batch, so that little is padded; like ways side by side keep sub-batches whole.
        todo = sorted(rows, key=lambda key: (lengths[key], key[0], _order(key[1])))

        def run(chunk: list[RowKey]) -> None:
            keep(chunk, self._generate([(rows[key], key[1]) for key in chunk]))

        if self.ranks is None or not todo:
            chunks = self._in_parallel(run, todo, lengths)
        else:
            chunks = self._on_ranks(self.ranks, run, rows, todo, lengths, keep)
        for chunk in chunks:
            yield len(chunk)

    def _outcome(self, example: Example, knobs: Knobs) -> Outcome:
        stored = self.store.get(example.content_id, knobs)
        assert stored is not None
        accuracy = self.metric(stored.answer, example)
        return Outcome(
            example.example_id, knobs, stored.answer, accuracy, stored.num_prompt_tokens, stored.num_output_tokens
        )

    def _prompt_tokens(self, example: Example, tier: str) -> int:
        sizes = self.view(example).sizes
        return sizes.num_text_tokens + sizes.vision[self.model.knob_space.tiers.index(tier)].num_image_tokens

    def _tier(self, way: Way) -> str:
        return way.tier if isinstance(way, Knobs) else self.model.knob_space.tiers[-1]

    def _num_blocks(self, way: Way) -> int:
        return way.num_blocks if isinstance(way, Knobs) else self.model.adapter.num_blocks - len(way)

    def _prefix_cost(self, example: Example, tier: str) -> float:
        """What a prefix is reckoned to cost, in tokens times blocks: image tokens take as long to make as to use."""
        num_tokens = self._prompt_tokens(example, tier)
        num_image_tokens = num_tokens - self.view(example).sizes.num_text_tokens
        return num_image_tokens * self.model.adapter.num_blocks + num_tokens * self.model.stage2_after

    def _on_ranks(
        self,
        ranks: Ranks,
        run: Callable[[list[RowKey]], None],
        rows: Mapping[RowKey, Example],
        todo: Sequence[RowKey],
        lengths: Mapping[RowKey, int],
        keep: Keep,
    ) -> Iterator[list[RowKey]]:
        """Run rows here and on the other ranks, the longest first."""
        pieces = {}
        costs: dict[Place, float] = defaultdict(float)
        for key in todo:
            place, num_blocks = (key[0], self._tier(key[1])), self._num_blocks(key[1]) - self.model.stage2_after
            pieces[key] = Piece(place, (lengths[key] + self.model.max_new_tokens) * num_blocks, lengths[key])
            costs[place] += pieces[key].cost
        examples = {pieces[key].group: example for key, example in rows.items()}
        setup_costs = {place: self._prefix_cost(example, place[1]) for place, example in examples.items()}
        rank_of = share_out(costs, setup_costs, ranks.ready, len(ranks))
        work = SharedWork(todo[::-1], pieces, rank_of, ranks.seconds_per_cost)

        def note(rank: int, chunk: list[RowKey]) -> None:
            for key in chunk:
                ranks.ready.setdefault(pieces[key].group, set()).add(rank)

        def run_there(helper: HelperRank, chunk: list[RowKey]) -> None:
            note(helper.number, chunk)
            keep(chunk, helper.answer(self.model.identity, chunk, [rows[key] for key in chunk]))

        def run_here(chunk: list[RowKey]) -> None:
            note(0, chunk)
            started = time.monotonic()
            for _ in self._in_chunks(run, chunk, lengths):
                pass
            ranks.note(len(chunk), (time.monotonic() - started) / num_threads, self.model.device)

        num_threads = self._num_workers
        with use_num_threads(1 if self.model.device.type == "cpu" else None):
            yield from ranks.run(work, self.limits, run_here, run_there, num_threads)

    @property
    def _num_workers(self) -> int:
        return torch.get_num_threads() if self.model.device.type == "cpu" else 1

    def _in_parallel(
        self, run: Callable[[list[Key]], None], keys: Sequence[Key], lengths: Mapping[Key, int]
    ) -> Iterator[list[Key]]:
        """Run keys chunk by chunk; on a CPU as many chunks side by side as it has threads, each on one of them.

        Small operations leave threads that share one chunk waiting for each other; a chunk of its own keeps each busy.
        """
        num_workers = self._num_workers
        share = replace(self.limits, max_tokens=max(1, self.limits.max_tokens // num_workers))
        chunks, start = [], 0
        while start < len(keys):
            chunks.append(_next_chunk(keys, start, lengths, share))
            start += len(chunks[-1])
        if num_workers == 1 or len(chunks) < num_workers:
            for chunk, _ in self._in_chunks(run, keys, lengths):
                yield chunk
            return

        def run_one(chunk: list[Key]) -> list[Key]:
            for _ in self._in_chunks(run, chunk, lengths):
                pass
            return chunk

        with use_num_threads(1), ThreadPoolExecutor(num_workers) as pool:
            try:
                yield from pool.map(run_one, chunks)
            finally:
                pool.shutdown(cancel_futures=True)

    def _in_chunks(
        self, run: Callable[[list[Key]], Result], keys: Sequence[Key], lengths: Mapping[Key, int]
    ) -> Iterator[tuple[list[Key], Result]]:
        """Run keys chunk by chunk within the limits, which are halved whenever memory runs out."""
        start = 0
        while start < len(keys):
            chunk = _next_chunk(keys, start, lengths, self.limits)
            try:
                result = run(chunk)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                longest = max(lengths[key] for key in chunk)
                if len(chunk) == 1:
                    raise MemoryLimitError(
                        f"there is too little memory for a single row of {longest} prompt tokens; use a smaller model, "
                        "another device or lower vision budgets"
                    ) from error
                self.limits = self.limits.halved(len(chunk), len(chunk) * longest)
            else:
                yield chunk, result
                start += len(chunk)
                continue
            # Behind the handler, where nothing of the failed batch is referred to any more.
            if self.model.device.type != "cpu":
                torch.get_device_module(self.model.device).empty_cache()

    # Not inference mode, even inside it: a cached prefix may serve a gradient later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _shared_prefixes(self, wanted: Sequence[tuple[Example, str]]) -> list[Prefix]:
        found: dict[tuple[str, str], Prefix] = {}
        missing: dict[tuple[str, str], Example] = {}
        for example, tier in wanted:
            key = (example.content_id, tier)
            prefix = self._prefixes.get(key)
            if prefix is not None:
                found[key] = prefix
            else:
                missing[key] = example
        lengths = {key: self._prompt_tokens(example, key[1]) for key, example in missing.items()}
        keys = sorted(missing, key=lengths.__getitem__)
        for chunk, prefixes in self._in_chunks(
            lambda chunk: self._run_prefixes([(missing[key], key[1]) for key in chunk]), keys, lengths
        ):
            for key, prefix in zip(chunk, prefixes, strict=True):
                self._prefixes.put(key, prefix)
                found[key] = prefix
        return [found[(example.content_id, tier)] for example, tier in wanted]

    def _run_prefixes(self, wanted: Sequence[tuple[Example, str]]) -> list[Prefix]:
        if self.model.device.type == "cpu" and len(wanted) > 1:
            # What shares a batch changes the last bits, and a training that goes on finds other prefixes kept.
            return [prefix for one in wanted for prefix in self._run_prefixes([one])]
        adapter = self.model.adapter
        prepared = []
        for example, tier in wanted:
            prompt = adapter.encode_question(example.question)
            prepared.append(adapter.prepare(example.image, prompt, self.model.vision_budgets[tier]))
        features = adapter.encode_vision(prepared)
        prompts = [adapter.embed(p, f) for p, f in zip(prepared, features, strict=True)]
        # Views into the padded batch would keep all of it alive.
        return [prefix.clone() for prefix in self.model.decoder.prefix(prompts)]

    @torch.no_grad()
    def _generate(self, rows: Sequence[tuple[Example, Way]]) -> list[StoredAnswer]:
        """Answers of one batch, whose ways are all knobs or all blocks that are left out."""
        decoder, most = self.model.decoder, self.model.max_new_tokens
        prefixes = self._shared_prefixes([(example, self._tier(way)) for example, way in rows])
        knobs = [way for _, way in rows if isinstance(way, Knobs)]
        if knobs:
            top_ks, num_blocks = [each.top_k for each in knobs], [each.num_blocks for each in knobs]
            generated = decoder.generate(prefixes, top_ks, num_blocks, most)
        else:
            removed = [way for _, way in rows if not isinstance(way, Knobs)]
            generated = decoder.generate_without(prefixes, removed, most)
        decode = self.model.adapter.decode
        return [
            StoredAnswer(decode(token_ids), prefix.num_tokens, len(token_ids))
            for prefix, token_ids in zip(prefixes, generated, strict=True)
        ]


def _order(way: Way) -> tuple[int, ...]:
    return (way.num_blocks, way.top_k) if isinstance(way, Knobs) else way


def _next_chunk(keys: Sequence[Key], start: int, lengths: Mapping[Key, int], limits: BatchLimits) -> list[Key]:
    """The keys from `start` on that fit one batch, at least one."""
    longest, end = 0, start
    while end < len(keys) and end - start < limits.max_rows:
        longest = max(longest, lengths[keys[end]])
        if end > start and (end + 1 - start) * longest > limits.max_tokens:
            break
        end += 1
    return list(keys[start:end])
