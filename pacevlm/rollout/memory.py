"""Remembered outcomes: what a frozen model answered once, it would answer again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pacevlm.errors import DataError, IdentityError
from pacevlm.files import read_jsonl, write_text_atomic
from pacevlm.knobs import Knobs
from pacevlm.types import Outcome


class OutcomeMemory:
    """Outcomes of one model by (example, knobs).

    Args:
        model_identity: fingerprint of the model that produced them; outcomes of another model are another thing.
    """

    def __init__(self, model_identity: str) -> None:
        self.model_identity = model_identity
        self._outcomes: dict[tuple[str, Knobs], Outcome] = {}

    def __len__(self) -> int:
        return len(self._outcomes)

    def __iter__(self) -> Iterator[Outcome]:
        return iter(self._outcomes.values())

    def __contains__(self, key: tuple[str, Knobs]) -> bool:
        return key in self._outcomes

    def get(self, example_id: str, knobs: Knobs) -> Outcome | None:
        """The remembered outcome, or None."""
        return self._outcomes.get((example_id, knobs))

    def add(self, outcome: Outcome) -> None:
        """Remember an outcome."""
        self._outcomes[(outcome.example_id, outcome.knobs)] = outcome

    def save(self, path: str | Path) -> None:
        """Write everything as JSON lines, the model's identity first; raises StorageError."""
        lines = [json.dumps({"model_identity": self.model_identity})]
        lines += [
            json.dumps(
                {
                    "example_id": o.example_id,
                    "knobs": str(o.knobs),
                    "answer": o.answer,
                    "accuracy": o.accuracy,
                    "num_prompt_tokens": o.num_prompt_tokens,
                    "num_output_tokens": o.num_output_tokens,
                }
            )
            for o in self
        ]
        write_text_atomic(path, "\n".join(lines) + "\n")

    @classmethod
    def load(cls, path: str | Path, model_identity: str) -> OutcomeMemory:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing or malformed.
            IdentityError: the outcomes are another model's.
        """
        head, *records = read_jsonl(path, "remembered outcomes", DataError) or [{}]
        if "model_identity" not in head:
            raise DataError(f"{path} does not begin with a model's identity; remove it")
        if head.get("model_identity") != model_identity:
            raise IdentityError(
                f"{path} holds outcomes of model {head.get('model_identity')!r}, not of {model_identity!r}; remove it"
            )
        memory = cls(model_identity)
        try:
            for r in records:
                memory.add(
                    Outcome(
                        example_id=str(r["example_id"]),
                        knobs=Knobs.parse(r["knobs"]),
                        answer=str(r["answer"]),
                        accuracy=float(r["accuracy"]),
                        num_prompt_tokens=int(r["num_prompt_tokens"]),
                        num_output_tokens=int(r["num_output_tokens"]),
                    )
                )
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise DataError(f"{path} holds a line that is no outcome ({error}); remove the file") from error
        return memory
