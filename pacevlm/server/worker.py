"""The process that runs requests, one after another: `python -m pacevlm.server.worker DESCRIPTOR`.

It gets its settings and then one request at a time through a socket that it was started with, and ends when the other
side is gone. Signals that stop the server are the front's to act on.
"""

from __future__ import annotations

import gc
import logging
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pacevlm.baselines.cheapest import CheapestPolicy
from pacevlm.baselines.full import FullPolicy
from pacevlm.baselines.lookup_table import LookupTable
from pacevlm.baselines.most import MostPolicy
from pacevlm.baselines.one_choice import OneChoicePolicy
from pacevlm.controller.policy_interface import Policy, PolicyInput
from pacevlm.errors import CheckpointError, PacevlmError, ProfileError
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.latency.measuring import use_num_threads
from pacevlm.pacer import Pacer, bundle_folder
from pacevlm.pipeline.artefacts import LOOKUP_NAME
from pacevlm.request.run import run_forced, run_request
from pacevlm.server.logs import log_as_json
from pacevlm.server.wire import NO_IMAGE, answer_to_dict, receive, send
from pacevlm.signals import STOP_SIGNALS
from pacevlm.types import Answer, Objective

log = logging.getLogger("pacevlm.server.worker")

# Rounds of warm-up requests with the cheapest, the full and middle knobs.
WARM_UP_ROUNDS = 5
# So long without a request is a pause, in which garbage is collected; drift is saved in one, this often at most.
PAUSE_S, SAVE_EVERY_S = 0.5, 60.0
# Requests between two collections where there is no pause.
COLLECT_EVERY = 500
# Tokens whose embeddings are read at once.
CHUNK = 8192


class GivenPolicy(OneChoicePolicy):
    """The knobs that a client asked for, whatever the guardrail says."""

    name = "given"

    def __init__(self, space: KnobSpace, knobs: Knobs) -> None:
        super().__init__(space)
        self.knobs = knobs

    def choose(self, request: PolicyInput) -> Knobs:
        """The given configuration."""
        return self.knobs


class Worker:
    """A pacer behind a socket.

    Args:
        connection: to the front.
        settings: as `Engine` sends them first.
    """

    def __init__(self, connection: socket.socket, settings: dict[str, Any]) -> None:
        self.connection = connection
        self.pacer = Pacer.from_pretrained(
            settings["run_dir"], device=settings["device"], model_path=settings["model_path"]
        )
        self.space = self.pacer.model.knob_space
        self.policy = self._load_policy(Path(settings["run_dir"]), settings["policy"])
        folder = bundle_folder(settings["run_dir"])
        self.drift_path = Path(settings["drift_path"] or folder.with_name(f"{folder.name}-drift.json"))
        self.saved_s, self.is_untidy, self.num_served = time.monotonic(), False, 0
        self.sample = Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8))
        self.loose = Objective(1e9, self.pacer.kind)

    def run(self) -> None:
        """Warm up, say what the front must know, and answer until the front is gone or says stop."""
        with use_num_threads(self.pacer.num_threads):
            self._warm_up()
            self._track_drift()
            gc.collect()
            gc.freeze()
            gc.disable()
            scores = self._length_scores()
            send(self.connection, {"type": "ready", "drift_factor": self.drift_factor}, scores)
            while (message := self._next()) is not None:
                if message[0]["type"] == "stop":
                    break
                if message[0]["type"] == "probe":
                    self._probe()
                else:
                    self._serve(*message)
        self._save_drift()

    @property
    def drift_factor(self) -> float:
        """How many times the profiled bounds those of now are."""
        assert self.pacer.drift is not None
        return self.pacer.drift.factor

    def _next(self) -> tuple[dict[str, Any], bytes] | None:
        """The next message; a pause before it is used to put things in order."""
        if self.num_served % COLLECT_EVERY == COLLECT_EVERY - 1:
            gc.collect()
        if self.is_untidy and not select.select([self.connection], [], [], PAUSE_S)[0]:
            gc.collect()
            self.is_untidy = False
            if time.monotonic() - self.saved_s > SAVE_EVERY_S:
                self._save_drift()
        return receive(self.connection)

    def _serve(self, job: dict[str, Any], image: bytes) -> None:
        pacer, connection = self.pacer, self.connection
        policy = self.policy if image != NO_IMAGE else MostPolicy(self.space)
        if job["knobs"] is not None:
            policy = GivenPolicy(self.space, Knobs.parse(job["knobs"]))
        kind, *others = sorted(job["budgets_ms"], key=lambda kind: kind != pacer.kind)
        objective = Objective(
            job["budgets_ms"][kind],
            kind,
            max(pacer.default_price if job["price"] is None else job["price"], job["least_price"]),
            *(job["budgets_ms"][other] for other in others),
        )

        is_answered = False
        began_s = time.perf_counter()
        waited_ms = (began_s - job["arrived_s"]) * 1e3

        def tell_choice(knobs: Knobs, bound_ms: float) -> None:
            end_s = began_s + bound_ms / 1e3
            send(connection, {"type": "choice", "end_s": end_s, "drift_factor": self.drift_factor})

        def tell_token(token_id: int) -> None:
            send(connection, {"type": "token", "id": token_id})

        def tell_answer(answer: Answer) -> None:
            nonlocal is_answered
            is_answered = True
            is_cut = answer.token_ids[-1] not in pacer.model.adapter.end_token_ids
            reason = "length" if is_cut else "stop"
            times = {"queue_ms": waited_ms, "finished_s": time.perf_counter()}
            send(connection, {"type": "answer", "answer": answer_to_dict(answer), "finish_reason": reason, **times})

        try:
            run_request(
                pacer.model,
                policy,
                image or None,
                job["question"],
                objective,
                pacer.pacing,
                drift=pacer.drift,
                waited_ms=waited_ms,
                most_ms=max((job["until_s"] - began_s) * 1e3, 0.0),
                max_new_tokens=job["max_new_tokens"],
                on_choice=tell_choice,
                on_token=tell_token if job["stream"] else None,
                on_answer=tell_answer,
            )
        except Exception as error:
            if is_answered or (isinstance(error, OSError) and not isinstance(error, PacevlmError)):
                raise
            name, text = type(error).__name__, str(error)
            if not isinstance(error, PacevlmError):
                log.exception("request %s failed", job["request_id"])
                name, text = "WorkerError", f"the request could not be run: {name}"
            send(connection, {"type": "failed", "error": name, "message": text})
            return
        self.is_untidy = True
        self.num_served += 1

    def _load_policy(self, run_dir: Path, name: str) -> Policy:
        if name == "full":
            return FullPolicy(self.space)
        if name == "lookup_table":
            folder = bundle_folder(run_dir).parent
            if not (folder / LOOKUP_NAME).is_file():
                raise CheckpointError(
                    f"policy is lookup_table, but there is no {LOOKUP_NAME} in {folder}; evaluate the run first"
                )
            return LookupTable.load(folder / LOOKUP_NAME, self.space)
        return self.pacer.policy

    def _warm_up(self) -> None:
        """Run made-up requests, so that the first real one finds everything compiled and in memory."""
        space = self.space
        middle = space[len(space) // 2]
        for _ in range(WARM_UP_ROUNDS):
            for knobs in (space.cheapest, middle, space.full):
                run_forced(self.pacer.model, self.sample, "?", knobs)
        for policy, image in ((self.policy, self.sample), (MostPolicy(space), None)):
            run_request(self.pacer.model, policy, image, "?", self.loose, self.pacer.pacing)

    def _probe(self) -> None:
        """Run a made-up request, so that the machine's speed is learned while nobody is accepted, or nobody asks."""
        pacer = self.pacer
        answer = run_request(
            pacer.model, CheapestPolicy(self.space), self.sample, "?", self.loose, pacer.pacing, drift=pacer.drift
        )
        times = {"predicted_ms": answer.predicted_ms, "took_ms": answer.times.covered_ms(answer.kind)}
        send(self.connection, {"type": "probed", "drift_factor": self.drift_factor, **times})

    def _track_drift(self) -> None:
        try:
            self.pacer.track_drift(self.drift_path)
        except (CheckpointError, ProfileError) as error:  # of another profile, or damaged
            log.warning("what was known of the machine's drift is given up: %s", error)
            self.drift_path.unlink()
            self.pacer.track_drift(self.drift_path)

    def _save_drift(self) -> None:
        self.saved_s = time.monotonic()
        try:
            self.pacer.save_drift()
        except PacevlmError as error:
            log.warning("the drift correction was not saved: %s", error)

    def _length_scores(self) -> bytes:
        """What every text token adds to the bound on an answer's length, as 64-bit floats; empty without a bound."""
        model, lengths = self.pacer.model, self.pacer.pacing.output_length
        if lengths is None:
            return b""
        with torch.inference_mode():
            stream = torch.zeros(1, model.d_model, device=model.device, dtype=model.dtype)
            num_tokens = model.adapter.logits(stream).shape[-1]
            parts = [
                model.adapter.embed_tokens(torch.arange(start, min(start + CHUNK, num_tokens), device=model.device))
                .double()
                .cpu()
                .numpy()
                @ np.array(lengths.weights)
                for start in range(0, num_tokens, CHUNK)
            ]
        return np.concatenate(parts).astype("<f8").tobytes()


def main(descriptor: int) -> None:
    """Serve the socket of this number."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=descriptor)
    first = receive(connection)
    if first is None:
        return
    log_as_json(first[0]["log_level"])
    try:
        worker = Worker(connection, first[0])
    except Exception as error:
        name = type(error).__name__
        told = (name, str(error)) if isinstance(error, PacevlmError) else ("WorkerError", f"{name}: {error}")
        send(connection, {"type": "failed", "error": told[0], "message": told[1]})
        return
    try:
        worker.run()
    except (BrokenPipeError, ConnectionResetError):
        log.info("the front is gone")


if __name__ == "__main__":
    main(int(sys.argv[1]))
