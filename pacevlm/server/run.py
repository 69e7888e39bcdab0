"""The whole server: engine, application, listening, until a signal ends it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
from collections.abc import Callable

from pacevlm.errors import ConfigError
from pacevlm.server.app import create_app
from pacevlm.server.config import ServeConfig
from pacevlm.server.engine import Engine
from pacevlm.server.listening import Listener
from pacevlm.server.logs import log_as_json

KEY_VARIABLE = "PACEVLM_API_KEY"


def run_server(config: ServeConfig, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP; what was accepted by then is finished.

    Args:
        on_ready: told the address once the model is loaded and warm.

    Raises:
        ConfigError: the address cannot be listened on, or the API key is none.
        PacevlmError: the bundle cannot be served; see `Pacer.from_pretrained`.
    """
    log_as_json(config.log_level)

    def begin(address: str) -> None:
        gc.collect()
        gc.freeze()  # collections then look at what requests leave, not at all that was imported, which takes 0.2 s
        on_ready(address)

    listener = Listener(create_app(Engine(config), config, find_api_key(config)), config, begin)
    asyncio.run(listener.listen())
    logging.getLogger("pacevlm.server").info("stopped; what was accepted is finished")


def find_api_key(config: ServeConfig) -> str | None:
    """What clients must send: the setting, else the environment's; raises ConfigError if that can be no key."""
    key = os.environ.get(KEY_VARIABLE) if config.api_key is None else config.api_key
    if key is not None and not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ConfigError(f"{KEY_VARIABLE} must hold one or more visible ASCII characters; unset it to ask for no key")
    return key
