"""What artefacts are made for, and the one sentence that refuses what was made for something else."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pacevlm.errors import IdentityError
from pacevlm.knobs import KnobSpace

_NAMES = {
    "model": "model",
    "knob_space": "knob space",
    "estimator": "latency estimator",
    "device": "device (type, name, threads, dtype, loops)",
    "max_new_tokens": "limit of answer tokens",
    "d_model": "model width",
}
_REMEDIES = {
    "model": "use that model, or make it again for this one",
    "knob_space": "use that knob space, or make it again for this one",
    "estimator": "use the estimator that it was made with, or calibrate and train anew",
    "device": "profile this device",
    "max_new_tokens": "fit output lengths anew",
    "d_model": "use that model, or make it again for this one",
}


@dataclass(frozen=True)
class Identity:
    """What something was made for; what is None is not said, and not compared.

    Attributes:
        model: fingerprint of weights and settings.
        knob_space: the configurations.
        estimator: fingerprint of the latency estimator.
        device: type, name, threads, dtype and kind of loops of the device.
        max_new_tokens: most tokens that the model may generate.
        d_model: width of the model.
    """

    model: str | None = None
    knob_space: KnobSpace | None = None
    estimator: str | None = None
    device: tuple[str | int, ...] | None = None
    max_new_tokens: int | None = None
    d_model: int | None = None

    def check(self, what: str, wanted: Identity) -> None:
        """Raise IdentityError, naming what differs, unless all that both say agrees.

        Args:
            what: the thing that was made for this, for example `the controller in runs/a`.
            wanted: what it is to be used with.
        """
        for entry in fields(self):
            mine, given = getattr(self, entry.name), getattr(wanted, entry.name)
            if mine is not None and given is not None and mine != given:
                raise IdentityError(
                    f"{what} was made for another {_NAMES[entry.name]}: {mine!r}, not {given!r}; "
                    f"{_REMEDIES[entry.name]}"
                )


ANYTHING = Identity()
"""What everything agrees with."""
