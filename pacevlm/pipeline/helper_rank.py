"""What every rank but the first does: hold the frozen model, and answer what rank 0 asks until that says it is over."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor

from pacevlm.config import ModelConfig, PictureConfig, config_from_dict
from pacevlm.dataset_list import parse_datasets
from pacevlm.errors import IdentityError, RankError
from pacevlm.knobs import Knobs
from pacevlm.launch import Launch
from pacevlm.pipeline.loading import device_of_rank, load_elastic_model
from pacevlm.rollout.engine import RolloutEngine
from pacevlm.rollout.limits import peak_bytes
from pacevlm.rollout.outcome_store import StoredAnswer
from pacevlm.rollout.ranks import GOES_ON, RowKey, Way
from pacevlm.rollout.wire import Wire
from pacevlm.signals import STOP_SIGNALS
from pacevlm.types import Example

# What rank 0 is told of the work of each message.
Said = tuple[dict[str, Any], Sequence[Tensor]]


def help_rank_0(launch: Launch) -> None:
    """Serve rank 0 until it says that it is over; this process ends at once if rank 0 is gone.

    Signals that ask for a stop are rank 0's to heed: it keeps what runs here, and then ends everything.

    Raises:
        RankError: the ranks do not find each other.
    """
    wire = Wire(launch)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    leave = partial(_leave_without_rank_0, launch.rank, threading.Lock())
    wire.watch(0, leave)
    try:
        _serve(wire, _Helper(launch))
    except RankError:
        leave()
    wire.leave([0])


def _serve(wire: Wire, helper: _Helper) -> None:
    while True:
        head, tensors, _ = wire.receive(0)
        if head["do"] == "end":
            return
        started = time.monotonic()
        answer: dict[str, Any] = {"host": wire.host}
        answered: Sequence[Tensor] = ()
        try:
            said, answered = helper.do(head, tensors)
            answer |= said
        except Exception as error:
            answer |= {"error": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
        seconds = 0.0 if head["do"] == "load" else time.monotonic() - started
        wire.send(0, {**answer, "seconds": seconds, "peak_bytes": helper.peak_bytes()}, answered)


def _leave_without_rank_0(rank: int, once: threading.Lock) -> NoReturn:
    """End this process, whatever it is at; the first of those that are left says why."""
    once.acquire()
    if rank == 1:
        print(f"pacevlm: error: rank 0 is gone; {GOES_ON}", file=sys.stderr, flush=True)
    os._exit(1)


class _Helper:
    """The model of one rank, the pictures that it was sent, and what backward passes will need."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.engine: RolloutEngine | None = None
        self.picture = PictureConfig()
        self.examples: dict[str, Example] = {}
        self.graphs: dict[int, tuple[Tensor, Tensor]] = {}

    def peak_bytes(self) -> int:
        return peak_bytes(torch.device("cpu") if self.engine is None else self.engine.model.device)

    def do(self, head: Mapping[str, Any], tensors: Sequence[Tensor]) -> Said:
        """Do what a message asks."""
        for number in head["graphs"]:
            self.graphs.pop(number, None)
        num_pictures = len(head["contents"])
        for about, pixels in zip(head["contents"], tensors[:num_pictures], strict=True):
            self.examples[about["id"]] = self.example(about, pixels)
        for content_id in head["dropped"]:
            del self.examples[content_id]
            if self.engine is not None:
                self.engine.forget(content_id)
        return {"load": self.load, "answer": self.answer, "tokens": self.tokens, "gradients": self.gradients}[
            head["do"]
        ](head, tensors[num_pictures:])

    def example(self, about: Mapping[str, Any], pixels: Tensor) -> Example:
        """The example of a content: what an answer depends on, and where it stands, for messages."""
        data = pixels.numpy().tobytes()
        return Example(
            about["id"],
            data if about["size"] is None else Image.frombytes("RGB", tuple(about["size"]), data),
            about["question"],
            (),
            picture_config=self.picture,
            where=about["where"],
            known_picture_id=about["picture"],
        )

    def load(self, head: Mapping[str, Any], tensors: Sequence[Tensor]) -> Said:
        """Load a model as rank 0 does, on this rank's device; what was there before goes first."""
        self.engine = None
        self.examples.clear()
        self.graphs.clear()
        settings = head["settings"]
        config = config_from_dict(ModelConfig, settings["model"])
        self.picture = config_from_dict(PictureConfig, settings["picture"])
        model = load_elastic_model(
            device_of_rank(config, self.launch), self.picture, parse_datasets(settings["datasets"])
        )
        self.engine = RolloutEngine(model)
        return {"model": model.identity}, ()

    def engine_of(self, model_identity: str) -> RolloutEngine:
        """The engine, if it is of this model."""
        if self.engine is None or self.engine.model.identity != model_identity:
            raise IdentityError("this rank holds another model than rank 0 asks about; start again")
        return self.engine

    def answer(self, head: Mapping[str, Any], tensors: Sequence[Tensor]) -> Said:
        """Answers of rows, in order."""
        keys = [(content_id, _way(way)) for content_id, way in head["rows"]]
        answers: dict[RowKey, StoredAnswer] = {}

        def keep(done: Sequence[RowKey], given: Sequence[StoredAnswer]) -> None:
            answers.update(zip(done, given, strict=True))

        for _ in self.engine_of(head["model"]).answer({key: self.examples[key[0]] for key in keys}, keep):
            pass
        return {"answers": [answers[key] for key in keys]}, ()

    def tokens(self, head: Mapping[str, Any], tensors: Sequence[Tensor]) -> Said:
        """Outputs of latency tokens."""
        engine = self.engine_of(head["model"])
        examples = [self.examples[content] for content, _ in head["visits"]]
        tiers = [tier for _, tier in head["visits"]]
        wants_gradient = head["graph"] is not None
        tokens = tensors[0].to(engine.model.device).requires_grad_(wants_gradient)
        with torch.set_grad_enabled(wants_gradient):
            outputs = engine.latency_token_outputs(examples, tiers, tokens)
        if wants_gradient:
            self.graphs[head["graph"]] = tokens, outputs
        return {}, [outputs]

    def gradients(self, head: Mapping[str, Any], tensors: Sequence[Tensor]) -> Said:
        """Gradients of latency tokens from those of their outputs; a graph stays until rank 0 has none any more."""
        tokens, outputs = self.graphs[head["graph"]]
        return {}, torch.autograd.grad(outputs, tokens, tensors[0].to(outputs), retain_graph=True)


def _way(said: str | list[int]) -> Way:
    return Knobs.parse(said) if isinstance(said, str) else tuple(said)
