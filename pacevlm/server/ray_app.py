"""The server on several devices or machines, as a Ray Serve application.

Every replica is one queue with its worker; Ray routes between them, restarts them and scales their number. What Ray's
proxy takes before a replica hears of a request is not counted in its budget.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve

from pacevlm.config import config_from_dict
from pacevlm.errors import WorkerError
from pacevlm.server.app import create_app
from pacevlm.server.config import ServeConfig
from pacevlm.server.engine import Engine
from pacevlm.server.logs import log_as_json
from pacevlm.server.run import find_api_key


# A replica refuses by itself what it cannot answer in time, so Ray hands it all that its queue could hold.
@serve.deployment(
    name="pacevlm",
    max_ongoing_requests=ServeConfig.max_waiting + 1,
    health_check_period_s=5,
    graceful_shutdown_timeout_s=120,
)
@serve.ingress()
class Replica:
    """One engine and the HTTP application in front of it; Ray keeps the application's lifespan.

    Args:
        config: what is served; where to listen is Ray's.
    """

    def __init__(self, config: ServeConfig) -> None:
        log_as_json(config.log_level)
        self.config, self.engine = config, Engine(config)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application, made where it runs."""
        return create_app(self.engine, self.config, find_api_key(self.config))

    def check_health(self) -> None:
        """Ray replaces a replica whose worker stays away; raises WorkerError while it does."""
        if not self.engine.ready:
            raise WorkerError("the worker is not ready")


def build(settings: dict[str, Any]) -> serve.Application:
    """The application that `serve run pacevlm.server.ray_app:build run_dir=RUN` starts.

    Args:
        settings: those of `ServeConfig`; relative paths start from the folder of the command.

    Raises:
        ConfigError: a setting is unknown or outside its range.
    """
    config = config_from_dict(ServeConfig, settings)
    return Replica.bind(dataclasses.replace(config, run_dir=Path(config.run_dir).absolute()))  # type: ignore[attr-defined]
