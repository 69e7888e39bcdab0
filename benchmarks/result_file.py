"""What every benchmark's result says of where it was made, and where it goes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from pacevlm.files import write_json_atomic
from pacevlm.latency.profile import DeviceFacts
from pacevlm.training.run_record import source_commit


def provenance(device: DeviceFacts) -> dict[str, Any]:
    """Device, commit, dtype and versions, as every result names them."""
    return {
        "device": {"type": device.device_type, "name": device.device_name, "num_threads": device.num_threads},
        "commit": source_commit() or "unknown",
        "dtype": device.dtype,
        "versions": {
            "torch": device.torch_version,
            "transformers": device.transformers_version,
            "compiler": device.compiler,
        },
    }


def keep_result(results: Mapping[str, Any], folder: Path, benchmark: str) -> Path:
    """Write `BENCHMARK-DEVICE.json`, or what there is of it so far; returns its path."""
    device = results["device"]
    name = device["type"] if device["type"] == "cpu" else device["name"].replace(" ", "-").lower()
    target = folder / f"{benchmark}-{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(target, results)
    return target


def write_result(results: Mapping[str, Any], folder: Path, benchmark: str, console: Console) -> None:
    """Write `BENCHMARK-DEVICE.json` and say where, then print the same as one line."""
    console.print(f"written to {keep_result(results, folder, benchmark)}")
    print(json.dumps(results))
