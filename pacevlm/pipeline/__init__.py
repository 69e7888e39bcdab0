"""The whole path from a frozen model to a judged controller, step by step, resumable and without printing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pacevlm.pipeline.context import Reporter, RunContext
    from pacevlm.pipeline.loading import load_elastic_model
    from pacevlm.pipeline.run import STEPS, run_pipeline
    from pacevlm.pipeline.run_config import RunConfig, quickstart_config

__all__ = ["STEPS", "Reporter", "RunConfig", "RunContext", "load_elastic_model", "quickstart_config", "run_pipeline"]

_HOMES = {
    "Reporter": "context",
    "RunContext": "context",
    "load_elastic_model": "loading",
    "STEPS": "run",
    "run_pipeline": "run",
    "RunConfig": "run_config",
    "quickstart_config": "run_config",
}


def __getattr__(name: str) -> Any:
    # Settings are read, and wrong ones refused, without waiting for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
