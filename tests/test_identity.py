"""What was made for one thing is refused for another, in one sentence that names what differs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pacevlm.errors import IdentityError
from pacevlm.identity import ANYTHING, Identity
from pacevlm.knobs import KnobSpace

SAID: dict[str, tuple[Any, Any]] = {
    "model": ("weights-a", "weights-b"),
    "knob_space": (KnobSpace(), KnobSpace(top_ks=(4, 8))),
    "estimator": ("f" * 64, "e" * 64),
    "device": (("cpu", "EPYC", 1, "float32", "compiled"), ("cpu", "EPYC", 2, "float32", "compiled")),
    "max_new_tokens": (8, 9),
    "d_model": (96, 2048),
}


def test_every_entry_is_compared() -> None:
    assert set(SAID) == {entry.name for entry in dataclasses.fields(Identity)}
    whole = Identity(**{name: one for name, (one, _) in SAID.items()})
    whole.check("it", whole)
    for name, (one, other) in SAID.items():
        with pytest.raises(IdentityError) as refusal:
            dataclasses.replace(whole, **{name: other}).check("the thing", whole)
        message = str(refusal.value)
        assert message.startswith("the thing was made for another ")
        assert repr(other) in message
        assert repr(one) in message
        assert "; " in message


@pytest.mark.parametrize("name", SAID)
def test_what_is_not_said_is_not_compared(name: str) -> None:
    alone = Identity(**{name: SAID[name][0]})
    alone.check("it", ANYTHING)
    ANYTHING.check("it", alone)
    others = {other: values[1] for other, values in SAID.items() if other != name}
    alone.check("it", Identity(**others))
