"""Settings of `pacevlm serve`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pacevlm.checks import MAX_COUNT, check_path, check_real, check_whole, shown
from pacevlm.errors import ConfigError

PolicyName = Literal["bundle", "lookup_table", "full"]
AdmissionName = Literal["bounds", "predictions"]
LogLevel = Literal["debug", "info", "warning", "error"]

MAX_BUDGET_MS = 3_600_000.0
"""Longest budget of a request, an hour; with a longer one a place in the queue is no promise."""


@dataclass(frozen=True)
class ServeConfig:
    """What is served, and how.

    Attributes:
        run_dir: folder of a trained run, or a bundle.
        model_path: where the model is, if no longer where the bundle says.
        device: `cpu`, or `cuda` with an optional number; the one that was profiled.
        host: address to listen on; this machine alone hears 127.0.0.1.
        port: TCP port; 0 takes a free one.
        model_name: what clients call the model.
        policy: what chooses the knobs: the `bundle`, its run's `lookup_table`, or nothing, with `full` knobs for all.
        admission: what has to fit into a request's budget, behind what others take: the `bounds` on its latency, or its
            `predictions`, which admit more and are late more often.
        default_budget_ms: budget of the whole request where a client gives none; 4 x the full configuration's median if
            None.
        api_key: what clients must send as bearer token; the environment's PACEVLM_API_KEY if None, and nothing if that
            is missing as well.
        image_hosts: hosts that pictures may be fetched from; none by default.
        max_body_bytes: largest request, picture included.
        max_image_pixels: largest picture; what the bundle accepts if None.
        max_waiting: most requests that wait at a time.
        drift_path: file that remembers how much slower the machine is than profiled; `bundle-drift.json` beside the
            bundle if None.
        log_level: least severe of the messages that are logged.

    Raises:
        ConfigError: a value is outside its range.
    """

    run_dir: Path = Path("runs/quickstart")
    model_path: str | None = None
    device: str = "cpu"
    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str = "pacevlm"
    policy: PolicyName = "bundle"
    admission: AdmissionName = "bounds"
    default_budget_ms: float | None = None
    api_key: str | None = None
    image_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 20_000_000
    max_image_pixels: int | None = None
    max_waiting: int = 256
    drift_path: Path | None = None
    log_level: LogLevel = "info"

    def __post_init__(self) -> None:
        check_path("run_dir", self.run_dir)
        for name in ("model_path", "drift_path"):
            if getattr(self, name) is not None:
                check_path(name, getattr(self, name))
        check_whole(self, 0, 65535, "port")
        check_real(self, 0, MAX_BUDGET_MS, "default_budget_ms", above=True, optional=True)
        check_whole(self, 1000, 2**31 - 1, "max_body_bytes")
        check_whole(self, 1, 10**9, "max_image_pixels", optional=True)
        check_whole(self, 1, MAX_COUNT, "max_waiting")
        for name in ("device", "host", "model_name"):
            value = getattr(self, name)
            if not isinstance(value, str) or not re.fullmatch(r"[\x21-\x7e]{1,253}", value):
                raise ConfigError(f"{name} is {shown(value)}; it must be text without spaces")
        if self.api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", self.api_key):
            raise ConfigError("api_key must be text of one or more visible ASCII characters, as headers carry them")
        for host in self.image_hosts:
            if not isinstance(host, str) or not re.fullmatch(r"[A-Za-z0-9.-]{1,253}", host):
                raise ConfigError(f"image_hosts holds {shown(host)}; give names such as images.example.org")
        for name, kind in (("policy", PolicyName), ("admission", AdmissionName), ("log_level", LogLevel)):
            choices = get_args(kind)
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {shown(getattr(self, name))}; use one of {', '.join(choices)}")
