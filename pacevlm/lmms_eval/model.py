"""A paced model among those of lmms-eval, which needs the extra `lmms`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from loguru import logger
from PIL import Image
from tqdm import tqdm

from pacevlm.checks import shown, whole_number
from pacevlm.errors import ConfigError, DataError
from pacevlm.evaluation.statistics import violation_proportion
from pacevlm.images import ImageSource
from pacevlm.knobs import Knobs, check_budget_ms, check_price
from pacevlm.latency.measuring import use_num_threads
from pacevlm.pacer import Pacer
from pacevlm.request.run import run_forced
from pacevlm.types import Answer, BudgetKind, check_budget_kind

# In full latencies: what a price is given for a budget where there is none, and hardly anything ever exceeds.
LOOSE_BUDGET = 10.0
# What is recorded of each request, of `Answer.to_dict`.
RECORDED = ("knobs", "kind", "budget_ms", "price", "measured_ms", "feasible", "budget_met", "predicted_ms")


@dataclass
class PacedCounts(TokenCounts):  # type: ignore[misc]
    """Tokens of one request and how it kept its budget; lmms-eval writes them beside the answer (`--log_samples`)."""

    answer: Answer | None = None

    def to_dict(self) -> dict[str, Any]:
        """The tokens, and of the answer what is `RECORDED`."""
        values = {} if self.answer is None else self.answer.to_dict()
        return {**super().to_dict(), **{name: values[name] for name in RECORDED if name in values}}


class PacedModel(lmms):  # type: ignore[misc]
    """Answers the questions of lmms-eval's tasks one at a time, within a budget, at a price, or with fixed knobs.

    Answers are decoded greedily, up to the number of tokens that the run was profiled for. A task that asks for fewer
    gets the first ones, as if decoding had stopped there; the latency stays that of the whole answer. Latencies begin
    with the picture as the task gives it, which most tasks have decoded by then.

    Args:
        run_dir: folder of a trained run, or a bundle.
        budget_ms: milliseconds for each request.
        budget_kind: what the budget covers; only for making sure, since the run has settled it.
        price: points of accuracy that one full latency is worth; as calibrated if None. Without a budget, one of
            `LOOSE_BUDGET` full latencies stands beside it.
        knobs: the same knobs for all requests, such as `low/4/12`, with no budget and no price.
        device: where the model runs.
        batch_size: 1.
        max_batch_size: what lmms-eval passes on; no batch is ever larger than 1.

    Raises:
        ConfigError: the settings contradict each other, or this is one of several processes.
        BudgetError: the budget is not a positive, finite number.
        KnobError: the knobs are not in the run's knob space.
        CheckpointError, IdentityError, ProfileError: as `Pacer.from_pretrained`.
    """

    is_simple = False

    def __init__(
        self,
        run_dir: str,
        budget_ms: float | None = None,
        budget_kind: BudgetKind | None = None,
        price: float | None = None,
        knobs: str | None = None,
        device: str = "cpu",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if str(batch_size) != "1":
            raise ConfigError(f"batch_size is {shown(batch_size)}; use 1, because a latency is that of one request")
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ConfigError(
                f"WORLD_SIZE is {shown(os.environ['WORLD_SIZE'])}; start one process, because several would slow each "
                "other's requests down"
            )
        if (knobs is None) is (budget_ms is None and price is None):
            raise ConfigError(
                "model_args need budget_ms, price or both, for example budget_ms=80, or else knobs alone, for example "
                "knobs=low/4/12"
            )
        self.knobs = None if knobs is None else Knobs.parse(knobs)
        self.price = None if price is None else check_price(price)
        if budget_ms is not None:
            budget_ms = check_budget_ms(budget_ms)
        self.pacer = Pacer.from_pretrained(str(run_dir), device=device)
        self.budget_ms = LOOSE_BUDGET * self.pacer.full_p50_ms if budget_ms is None else budget_ms
        if budget_kind is not None:
            check_budget_kind(budget_kind)
            if budget_kind != self.pacer.kind:
                raise ConfigError(
                    f"budget_kind is {budget_kind!r}, but the budgets of {run_dir} are of the kind "
                    f"{self.pacer.kind!r}; leave it out, or train with --train.budget-kind {budget_kind}"
                )
        # The first request of a process takes longer.
        self._answer(Image.new("RGB", (336, 336)), "What is this?")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer each request, in order; logs mean latency, the shares that were late, and those of each knob's values.

        Raises:
            ConfigError: a task asks for sampling or beams, or for an odd number of tokens.
            DataError: a request is not one question about one picture.
            ImageError, QuestionError: the input cannot be used.
        """
        self._check_settings([request.args[2] for request in requests])
        answers: list[Answer] = []
        results = []
        for request in tqdm(requests, desc="paced requests"):
            answer = self._answer(*self._read(request))
            num_prompt_tokens = answer.sizes.num_text_tokens + answer.vision.num_image_tokens
            counts = PacedCounts(num_prompt_tokens, answer.num_output_tokens, answer=answer)
            answers.append(answer)
            results.append(GenerationResult(self._cut(answer, request.args[2]), counts))
        if answers:
            self._log(answers)
        return results

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        """Not supported."""
        raise NotImplementedError("pacevlm writes answers and has no likelihoods; take a task of type generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        """Not supported."""
        raise NotImplementedError(
            "pacevlm answers one question and remembers no earlier ones; take a task of type generate_until"
        )

    def _check_settings(self, settings: Sequence[dict[str, Any]]) -> None:
        """Refuse, before anything runs, what greedy decoding of one answer cannot give; say where lengths differ."""
        limit = self.pacer.model.max_new_tokens
        lengths = set()
        for wanted in settings:
            if (wanted.get("temperature") or 0) > 0 or (wanted.get("num_beams") or 1) > 1:
                asked = {name: wanted[name] for name in ("temperature", "num_beams") if name in wanted}
                raise ConfigError(
                    f"a task asks for {asked}, but pacevlm decodes greedily; accept that with --gen_kwargs "
                    "temperature=0,num_beams=1"
                )
            if wanted.get("max_new_tokens") is not None:
                lengths.add(whole_number("max_new_tokens", wanted["max_new_tokens"]))
        if lengths and max(lengths) > limit:
            logger.warning(
                f"tasks ask for up to {max(lengths)} new tokens, but what was profiled are answers of at most {limit} "
                "(model.max_new_tokens of the run): longer ones end there"
            )
        if lengths and min(lengths) < limit:
            logger.warning(
                f"tasks ask for as few as {min(lengths)} new tokens: answers are cut to that, but generated and timed "
                f"as they come, up to {limit}"
            )

    def _read(self, request: Instance) -> tuple[ImageSource, str]:
        """Picture and question of a request; raises DataError if it is anything else."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        chat = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        images, videos, sounds = chat.extract_media()
        roles = [message.role for message in chat.messages]
        if roles != ["user"] or (len(images), len(videos), len(sounds)) != (1, 0, 0):
            raise DataError(
                f"request {doc_id} of task {task} has {len(images)} pictures, {len(videos)} videos and {len(sounds)} "
                f"sounds in messages of {roles}; pacevlm answers one message of a user with one picture"
            )
        texts = [content.text for content in chat.messages[0].content if content.type == "text"]
        return images[0], "\n".join(texts)

    def _answer(self, image: ImageSource, question: str) -> Answer:
        if self.knobs is None:
            return self.pacer.answer(image, question, self.budget_ms, price=self.price)
        with use_num_threads(self.pacer.num_threads):
            return run_forced(self.pacer.model, image, question, self.knobs)

    def _cut(self, answer: Answer, settings: dict[str, Any]) -> str:
        """The answer's text up to the task's number of tokens, and to the first of the texts that end it."""
        text, most = answer.answer, settings.get("max_new_tokens")
        if most is not None and most < answer.num_output_tokens:
            text = self.pacer.model.adapter.decode(list(answer.token_ids[:most]))
        until = settings.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0] if stop else text
        return text

    def _log(self, answers: Sequence[Answer]) -> None:
        latency_ms = np.array([answer.measured_ms for answer in answers])
        extras: dict[str, float] = {"total_requests": len(answers), "latency_ms": float(latency_ms.mean())}
        if self.knobs is None:
            feasible = np.array([answer.feasible for answer in answers])
            extras["share_infeasible"] = float(1 - feasible.mean())
            rate = violation_proportion(latency_ms, np.full(len(answers), self.budget_ms), feasible).rate
            if rate is not None:
                extras["share_late"] = rate
        space = self.pacer.model.knob_space
        for knob, values in (("tier", space.tiers), ("top_k", space.top_ks), ("num_blocks", space.num_blocks)):
            chosen = [getattr(answer.knobs, knob) for answer in answers]
            extras |= {f"share_{knob}_{value}": chosen.count(value) / len(chosen) for value in values}
        seconds = sum(answer.waited_ms + answer.times.e2e_ms for answer in answers) / 1e3
        num_tokens = sum(answer.num_output_tokens for answer in answers)
        log_metrics(seconds, num_tokens, num_tokens / seconds, extras)
