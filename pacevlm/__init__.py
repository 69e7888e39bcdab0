"""pacevlm: answers questions about images with as much of a frozen model as each request's latency budget allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pacevlm.errors import PacevlmError
    from pacevlm.knobs import Knobs, KnobSpace
    from pacevlm.pacer import Pacer
    from pacevlm.types import Answer

__version__ = "0.1.0"

__all__ = ["Answer", "KnobSpace", "Knobs", "Pacer", "PacevlmError", "__version__"]

_HOMES = {
    "Answer": "pacevlm.types",
    "KnobSpace": "pacevlm.knobs",
    "Knobs": "pacevlm.knobs",
    "Pacer": "pacevlm.pacer",
    "PacevlmError": "pacevlm.errors",
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to load: `import pacevlm` does not wait for what nobody has asked for.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
